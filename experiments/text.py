"""A corpus in tokens, how windows are drawn from it, and what binds a run to it."""

import dataclasses
import functools
import json
from collections.abc import Iterable, Iterator
from typing import TYPE_CHECKING, Any

import numpy as np

from configs import char_lm
from qkv_jax import data
from qkv_jax.data.batches import Batch
from qkv_jax.training.run_directory import RunDirectory, write_text_atomic

if TYPE_CHECKING:
    from experiments.setup import DataConfig


TOKEN_FILES, TOKEN_DOCUMENTS = "token_files", "token_documents"  # corpora in tokens already
FLOOR_TOKENS = 2**22  # of token files, from which the floors count: their memory grows with them
DECODED_TOKENS = 2**20  # of token files, at once


@dataclasses.dataclass(frozen=True)
class Text:
    """A corpus in tokens, split by position."""

    corpus: data.Corpus | data.TokenFiles
    tokenizer: data.Tokenizer
    train: np.ndarray | data.ArrayFile  # integers [any number]
    validation: np.ndarray | data.ArrayFile

    about_floors = "The floors are predictors that count, with add-one smoothing"

    @property
    def validation_characters(self) -> int:
        return len(self.tokenizer.decode(self.validation))

    @property
    def validation_targets(self) -> int:
        """The tokens that a model which goes through the validation text predicts."""
        return len(self.validation) - 1

    @functools.cached_property
    def floors(self) -> dict[str, float]:
        """Validation losses, in nats per token, of predictors that only count."""
        return data.ngram_floors(self.train, self.validation, self.tokenizer.vocab_size)

    def with_validation(self, corpus: data.Corpus, tokens: np.ndarray) -> "Text":
        """The same with another text to validate on."""
        return dataclasses.replace(self, corpus=corpus, validation=tokens)

    def train_windows(self, *, rows: slice = data.EVERY_ROW, **windows: int) -> Batch:
        """Random windows to train on: the arguments are those of `data.stacked_windows`."""
        batch = data.stacked_windows(self.train, **windows)
        return {name: array[:, rows] for name, array in batch.items()}

    def random_windows(self, **windows: int) -> Batch:
        """Random windows of the validation text: as `data.random_windows`."""
        return data.random_windows(self.validation, stream=data.EVALUATION, **windows)

    def all_windows(self, *, batch_size: int, context: int) -> Iterator[Batch]:
        """Windows in which every token but the first is a target once."""
        return data.sequential_windows(self.validation, batch_size=batch_size, context=context)

    def checked(self, batches: Iterable[Batch]) -> Iterator[Batch]:
        """Batches of this text, as they are read; ValueError where it has changed meanwhile."""
        return iter(batches)


@dataclasses.dataclass(frozen=True)
class FileText(Text):
    """Token files, of which only the windows are read, each once an epoch.

    With documents, windows say which of them each token is of, and no document's first token is a
    target.
    """

    files: data.TokenFiles
    train_documents: np.ndarray | data.ArrayFile | None = None  # where they start, int64 [number]
    validation_documents: np.ndarray | data.ArrayFile | None = None

    about_floors = (
        f"The floors are predictors that count, with add-one smoothing, in the first "
        f"{FLOOR_TOKENS:,} tokens of each part at most"
    )

    @classmethod
    def load(
        cls, config: "DataConfig", files: data.TokenFiles, tokenizer: data.Tokenizer
    ) -> "FileText":
        """The text of a config whose corpus is token files."""
        train, validation = data.split(
            files.tokens, config.validation_fraction, context=config.context
        )
        text = cls(files, tokenizer, train, validation, files)
        if config.corpus == TOKEN_FILES:
            return text
        boundary, end = len(train), len(files.tokens)
        return dataclasses.replace(
            text,
            train_documents=files.documents_within(0, boundary),
            validation_documents=files.documents_within(boundary, end),
        )

    @property
    def validation_characters(self) -> int:
        """Up to three more for each cut, where a character of several tokens is in two."""
        cuts = range(0, len(self.validation), DECODED_TOKENS)
        decode = self.tokenizer.decode
        return sum(len(decode(self.validation[cut : cut + DECODED_TOKENS])) for cut in cuts)

    @property
    def validation_targets(self) -> int:
        documents = self.validation_documents
        return len(self.validation) - (1 if documents is None else len(documents))

    @functools.cached_property
    def floors(self) -> dict[str, float]:
        parts = (part[:FLOOR_TOKENS] for part in (self.train, self.validation))
        return data.ngram_floors(*parts, self.tokenizer.vocab_size)

    def with_validation(self, corpus: data.Corpus, tokens: np.ndarray) -> "Text":
        one = None if self.validation_documents is None else np.zeros(1, np.int64)
        return dataclasses.replace(self, corpus=corpus, validation=tokens, validation_documents=one)

    def train_windows(self, *, rows: slice = data.EVERY_ROW, **windows: int) -> Batch:
        return self._shuffled(self.train, documents=self.train_documents, rows=rows, **windows)

    def random_windows(self, **windows: int) -> Batch:
        windows = {"num_steps": 1, "stream": data.EVALUATION, **windows}
        batch = self._shuffled(self.validation, documents=self.validation_documents, **windows)
        return {name: array[0] for name, array in batch.items()}

    def _shuffled(self, *args: Any, **windows: Any) -> Batch:
        return self.files.checked(data.shuffled_windows(*args, **windows))

    def all_windows(self, *, batch_size: int, context: int) -> Iterator[Batch]:
        tokens, documents = self.validation, self.validation_documents
        sizes = {"batch_size": batch_size, "context": context}
        if documents is None:
            return self.checked(data.sequential_windows(tokens, **sizes))
        return self.checked(data.sequential_documents(tokens, documents, **sizes))

    def checked(self, batches: Iterable[Batch]) -> Iterator[Batch]:
        return map(self.files.checked, batches)


def load_text(config: "DataConfig", tokenizer: data.Tokenizer | None = None) -> Text:
    """Reads the corpus; builds the tokenizer unless one is given.

    Raises:
      ValueError: the corpus is missing, binary, empty or shorter than a window, or the tokenizer
        does not know it.
    """
    if config.corpus in (TOKEN_FILES, TOKEN_DOCUMENTS):
        return _load_token_files(config, tokenizer)
    if config.corpus not in data.CORPORA:
        known = ", ".join([*data.CORPORA, TOKEN_FILES, TOKEN_DOCUMENTS])
        raise ValueError(f"corpus {config.corpus!r} is unknown; wanted one of: {known}")
    corpus = data.load_corpus(config.corpus, config.path)
    if tokenizer is None:
        tokenizer = data.build_tokenizer(
            config.tokenizer, corpus.text, vocab_size=config.vocab_size, path=config.tokenizer_path
        )
    tokens = data.pack_tokens(tokenizer.encode(corpus.text), tokenizer.vocab_size)
    train, validation = data.split(tokens, config.validation_fraction, context=config.context)
    return Text(corpus, tokenizer, train, validation)


def _load_token_files(config: "DataConfig", tokenizer: data.Tokenizer | None) -> FileText:
    if not config.path:
        raise ValueError(
            f"corpus {config.corpus!r} needs a path: a folder of experiments.prepare_tokens"
        )
    files = data.TokenFiles.open(config.path)
    own, defaults = files.tokenizer, char_lm.get_config().data
    for name in ("tokenizer", "vocab_size", "tokenizer_path"):
        value = getattr(config, name)
        if value not in (defaults[name], own.name if name == "tokenizer" else defaults[name]):
            raise ValueError(
                f"config.data.{name}: {value!r} was set, but config.data.corpus = "
                f"{config.corpus!r} has the tokenizer of its folder, {own.name!r} of "
                f"{own.vocab_size} ids"
            )
    if tokenizer is not None and tokenizer.to_json() != own.to_json():
        raise ValueError(
            f"config.data.path: {config.path} holds tokens of another tokenizer than the run's"
        )
    return FileText.load(config, files, own)


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


def about(corpus: data.Corpus | data.TokenFiles) -> dict[str, Any]:
    """What identifies a corpus."""
    return {
        "name": corpus.name,
        "source": corpus.source,
        "sha256": corpus.sha256,
        "characters": corpus.characters,
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
