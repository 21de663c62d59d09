"""A corpus in tokens, and what binds a run to it."""

import dataclasses
import functools
import json
from typing import TYPE_CHECKING

import numpy as np

from qkv_jax import data
from qkv_jax.training.run_directory import RunDirectory, write_text_atomic

if TYPE_CHECKING:
    from experiments.setup import DataConfig


@dataclasses.dataclass(frozen=True)
class Text:
    """A corpus in tokens, split by position."""

    corpus: data.Corpus
    tokenizer: data.Tokenizer
    train: np.ndarray  # integers [any number]
    validation: np.ndarray

    @property
    def validation_characters(self) -> int:
        return len(self.tokenizer.decode(self.validation))

    @functools.cached_property
    def floors(self) -> dict[str, float]:
        """Validation losses, in nats per token, of predictors that only count."""
        return data.ngram_floors(self.train, self.validation, self.tokenizer.vocab_size)


def load_text(config: "DataConfig", tokenizer: data.Tokenizer | None = None) -> Text:
    """Reads the corpus; builds the tokenizer unless one is given.

    Raises:
      ValueError: the corpus is missing, binary, empty or shorter than a window, or the tokenizer
        does not know it.
    """
    corpus = data.load_corpus(config.corpus, config.path)
    if tokenizer is None:
        tokenizer = data.build_tokenizer(
            config.tokenizer, corpus.text, vocab_size=config.vocab_size, path=config.tokenizer_path
        )
    tokens = data.pack_tokens(tokenizer.encode(corpus.text), tokenizer.vocab_size)
    train, validation = data.split(tokens, config.validation_fraction, context=config.context)
    return Text(corpus, tokenizer, train, validation)


def keep_text(run: RunDirectory, text: Text) -> None:
    """Writes the tokenizer and what identifies the corpus, or checks them against those there.

    Raises:
      ValueError: the run was trained on another text, or with another tokenizer.
    """
    tokens, vocab_size = len(text.train) + len(text.validation), text.tokenizer.vocab_size
    if not keep_corpus(run, text.corpus, tokens=tokens, vocab_size=vocab_size):
        write_text_atomic(run.tokenizer, text.tokenizer.to_json())
    elif data.Tokenizer.load(run.tokenizer).to_json() != text.tokenizer.to_json():
        raise ValueError(
            f"workdir {run.path} holds a run with another tokenizer ({run.tokenizer.name} "
            "differs from the one built now); choose another --workdir"
        )


def keep_corpus(run: RunDirectory, corpus: data.Corpus, **more: int) -> bool:
    """Writes what identifies the corpus, or checks it against what stands there.

    Returns:
      Whether it stood there.

    Raises:
      ValueError: the run was trained on another text.
    """
    path = run.path / "corpus.json"
    now = {
        "name": corpus.name,
        "source": corpus.source,
        "sha256": corpus.sha256,
        "characters": len(corpus.text),
        **more,
    }
    if not path.exists():
        write_text_atomic(path, json.dumps(now, indent=2) + "\n")
        return False
    try:
        before = json.loads(path.read_text(encoding="utf-8"))
    except ValueError as error:
        raise ValueError(f"{path} is damaged: {error}") from error
    if before["sha256"] != now["sha256"]:
        raise ValueError(
            f"workdir {run.path} holds a run on another text ({before['source']}, sha256 "
            f"{before['sha256'][:12]}; now {now['source']}, {now['sha256'][:12]}); choose "
            "another --workdir"
        )
    return True
