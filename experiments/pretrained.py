"""A model and its tokenizer from a folder of Hugging Face's."""

import dataclasses
from pathlib import Path

from qkv_jax import interop
from qkv_jax.data import Tokenizer, pretrained_tokenizer
from qkv_jax.interop import Checkpoint


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
