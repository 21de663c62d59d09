"""A model and its tokenizer from a folder of Hugging Face's, or from the hub."""

import dataclasses
import json
from pathlib import Path

import numpy as np

from experiments.tasks import LabelledPair
from qkv_jax import inference, interop
from qkv_jax.data import Tokenizer, pretrained_tokenizer
from qkv_jax.data.files import read_text
from qkv_jax.interop import Checkpoint

SETTINGS = "tokenizer_config.json"
MOST_WRITTEN = 64  # tokens of what an encoder-decoder writes


@dataclasses.dataclass(frozen=True)
class Pretrained:
    """A folder with config.json, safetensors and the files of a tokenizer.

    Args:
      folder: where pages about it go: its own, or runs/<name> of one that is in the hub's cache.
      checkpoint, tokenizer: what it holds.
      mask_id: of the token that hides others; None: there is none.
    """

    folder: Path
    checkpoint: Checkpoint
    tokenizer: Tokenizer
    mask_id: int | None

    @classmethod
    def load(cls, source: str) -> "Pretrained":
        """Reads it.

        Args:
          source: as for `interop.folder_of`.

        Raises:
          ValueError: a file is missing or damaged, or the tokenizer has ids that the model has not.
        """
        path = interop.folder_of(source)
        checkpoint = interop.load(path)
        tokenizer = pretrained_tokenizer(path)
        if tokenizer.vocab_size > checkpoint.config.vocab_size:
            raise ValueError(
                f"checkpoint: the tokenizer in {source} has {tokenizer.vocab_size} ids, the model "
                f"{checkpoint.config.vocab_size}"
            )
        name = Path(source.partition("@")[0]).name
        folder = path if Path(source).expanduser().exists() else Path("runs", name)
        return cls(folder, checkpoint, tokenizer, _mask_id(path, tokenizer))

    def written(self, text: str) -> LabelledPair:
        """A text and what an encoder-decoder, such as T5, writes when it has read it (greedily)."""
        said = {"decoder_start_token_id": 0, "eos_token_id": 1, **self.checkpoint.token_ids}
        begin, end = said["decoder_start_token_id"], said["eos_token_id"]
        source = self.tokenizer.encode_framed(text)
        written = inference.translate(
            self.checkpoint.graphdef, self.checkpoint.params, source[None],
            np.array([len(source)]), begin=begin, end=end, num_tokens=MOST_WRITTEN,
        )  # fmt: skip
        target = np.asarray(written[0])
        target = target[: int(np.argmax(target == end)) + 1] if end in target else target
        read = np.concatenate([[begin], target[:-1]])
        labels = (self._labels(tokens) for tokens in (source, read, target))
        return LabelledPair(source[None], read[None], *labels)

    def _labels(self, tokens: np.ndarray) -> list[str]:
        """What tokens are called; a model may write ids that no tokenizer has."""
        known = tokens < self.tokenizer.vocab_size
        names = iter(self.tokenizer.labels(tokens[known]))
        return [next(names) if k else f"<{id}>" for k, id in zip(known, tokens, strict=True)]


def _mask_id(folder: Path, tokenizer: Tokenizer) -> int | None:
    """The id of the mask token: as the folder calls it, else as BERT or RoBERTa did."""
    said = None
    if (folder / SETTINGS).exists():
        try:
            said = json.loads(read_text(folder / SETTINGS)).get("mask_token")
        except (AttributeError, json.JSONDecodeError) as error:
            raise ValueError(f"{folder / SETTINGS} is no JSON object: {error}") from error
    said = said.get("content") if isinstance(said, dict) else said
    for mask in filter(None, (said, "[MASK]", "<mask>")):
        ids = tokenizer.encode(mask)
        if len(ids) == 1 and tokenizer.decode(ids) == mask:  # no unknown word
            return int(ids[0])
    return None
