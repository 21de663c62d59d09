"""A corpus in tokens, and what binds a run to it."""

import dataclasses
import functools
import json
from typing import TYPE_CHECKING, Any

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
    now = about(text.corpus) | {
        "tokens": len(text.train) + len(text.validation),
        "vocab_size": text.tokenizer.vocab_size,
    }
    keep_corpus(run, now, text.tokenizer, what="text")


def about(corpus: data.Corpus) -> dict[str, Any]:
    """What identifies a corpus."""
    return {
        "name": corpus.name,
        "source": corpus.source,
        "sha256": corpus.sha256,
        "characters": len(corpus.text),
    }


def keep_corpus(
    run: RunDirectory, now: dict[str, Any], tokenizer: data.Tokenizer | None = None, *, what: str
) -> None:
    """Writes what identifies a corpus, and its tokenizer, or checks them against those there.

    Args:
      run: where to.
      now: of the corpus; `source` says what it is, `sha256` identifies it.
      tokenizer: made for it; None: it is read in bytes.
      what: the corpus is, in an error.

    Raises:
      ValueError: the run was trained on another corpus, or with another tokenizer.
    """
    path = run.path / "corpus.json"
    if path.exists():
        try:
            before = json.loads(path.read_text(encoding="utf-8"))
        except ValueError as error:
            raise ValueError(f"{path} is damaged: {error}") from error
        if before["sha256"] != now["sha256"]:
            raise ValueError(
                f"workdir {run.path} holds a run on another {what} ({before['source']}, sha256 "
                f"{before['sha256'][:12]}; now {now['source']}, {now['sha256'][:12]}); choose "
                "another --workdir"
            )
        if tokenizer and data.Tokenizer.load(run.tokenizer).to_json() != tokenizer.to_json():
            raise ValueError(
                f"workdir {run.path} holds a run with another tokenizer ({run.tokenizer.name} "
                "differs from the one built now); choose another --workdir"
            )
        return
    if tokenizer:
        write_text_atomic(run.tokenizer, tokenizer.to_json())
    write_text_atomic(path, json.dumps(now, indent=2) + "\n")
