"""A model and its tokenizer from a folder of Hugging Face's."""

import dataclasses
from pathlib import Path

import numpy as np

from experiments.tasks import LabelledPair
from qkv_jax import inference, interop
from qkv_jax.data import Tokenizer, pretrained_tokenizer
from qkv_jax.interop import Checkpoint

MOST_WRITTEN = 64  # tokens of what an encoder-decoder writes


@dataclasses.dataclass(frozen=True)
class Pretrained:
    """A folder with config.json, safetensors and the files of a tokenizer."""

    folder: Path
    checkpoint: Checkpoint
    tokenizer: Tokenizer

    @classmethod
    def load(cls, folder: str) -> "Pretrained":
        """Reads it.

        Raises:
          ValueError: a file is missing or damaged, or the tokenizer has ids that the model has not.
        """
        path = Path(folder)
        checkpoint = interop.load(path)
        tokenizer = pretrained_tokenizer(path)
        if tokenizer.vocab_size > checkpoint.config.vocab_size:
            raise ValueError(
                f"checkpoint: the tokenizer in {folder} has {tokenizer.vocab_size} ids, the model "
                f"{checkpoint.config.vocab_size}"
            )
        return cls(path, checkpoint, tokenizer)

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
        labels = (self.tokenizer.labels(tokens) for tokens in (source, read, target))
        return LabelledPair(source[None], read[None], *labels)
