"""Rows that belong to classes: for encoders with a head on their first token."""

from __future__ import annotations

import abc
import functools
from collections.abc import Sequence
from typing import TYPE_CHECKING

import jax
import numpy as np
from flax import nnx

from experiments.tasks.drawn import DrawnTask
from experiments.tasks.task import Example
from experiments.text import about, keep_corpus
from qkv_jax import data, nn
from qkv_jax.data.batches import Batch
from qkv_jax.data.digits import NUM_IDS as DIGIT_IDS
from qkv_jax.data.listops import TOKENS
from qkv_jax.data.passages import NUM_IDS as BYTE_IDS
from qkv_jax.data.passages import to_bytes
from qkv_jax.models import Classifier, EncoderConfig
from qkv_jax.training.run_directory import RunDirectory

if TYPE_CHECKING:
    from experiments.setup import DataConfig, Settings

SHOWN = 64  # ids of a row that a sample or a picture has room for


def predict_class(model: Classifier, batch: Batch, rng: jax.Array | None) -> jax.Array:
    """The logits of each row's class, [B, classes], from `inputs`, int32 [B, T].

    `lengths` [B] and `segments` [B, T] are read where the batch has them.
    """
    more = {name: batch[name] for name in ("lengths", "segments") if name in batch}
    return model(batch["inputs"], rng=rng, **more)


class Classification(DrawnTask):
    """Rows of ids, of which the first stands for the row, and their classes."""

    config, model = EncoderConfig, Classifier
    kind = "An encoder with a head for classes"
    unit = "row"
    predict = staticmethod(predict_class)
    what: str  # rows are made of, in words

    def __init__(self, settings: Settings):
        super().__init__(settings)
        self.generate(0, 1, data.TRAINING)  # raises where the sizes do not fit

    @classmethod
    @abc.abstractmethod
    def num_classes(cls, config: DataConfig) -> int:
        """How many classes there are."""

    @classmethod
    def sizes_of_model(cls, config: DataConfig) -> dict[str, int]:
        return {"num_classes": cls.num_classes(config)}

    @property
    def source(self) -> str:
        return f"data: {self.what}, in rows of {self.settings.data.context} ids"

    @property
    def place(self) -> dict[str, int]:
        """What every batch of this run is drawn with."""
        return {"seed": self.settings.seed, "context": self.settings.data.context}

    def floors(self) -> dict[str, float]:
        return {"uniform": float(np.log(self.num_classes(self.settings.data)))}

    def describe(self, scores: dict[str, float]) -> list[str]:
        classes = self.num_classes(self.settings.data)
        return [
            "## Classes",
            "",
            "| rows | accuracy |",
            "|---|---:|",
            f"| all | {scores['accuracy']:.4f} |",
            f"| by chance, of {classes} classes | {1 / classes:.4f} |",
            "",
            f"{scores['loss']:.4f} nats per row, over {self.validation}. {self.rule}",
        ]

    def sample(self, graphdef: nnx.GraphDef, params: nn.Params) -> tuple[str, str]:
        """Some rows, with the model's class and the right one."""
        batch = self.test_batches()[0]
        apply = jax.jit(lambda batch: self.predict(nn.merge(graphdef, params), batch, None))
        answers = np.asarray(apply(batch).argmax(-1))
        lines = []
        for row in range(min(4, len(answers))):
            answer, target = answers[row], batch["targets"][row]
            right = "" if answer == target else f", not {self.name_of_class(target)}"
            shown = self.show(batch["inputs"][row][1 : SHOWN + 1])
            lines.append(f"{shown} -> {self.name_of_class(answer)}{right}")
        return "\n".join(lines), "The beginnings of rows, with the model's classes."

    def show(self, ids: np.ndarray) -> str:
        """Ids of a row, for a person to read."""
        return " ".join(map(self.label, ids))

    @abc.abstractmethod
    def label(self, token: int) -> str:
        """An id, for a person to read."""

    def name_of_class(self, number: int) -> str:
        return str(number)

    def example(self) -> Example | None:
        batch = self.test_batches()[0]
        tokens = batch["inputs"][0][: batch["lengths"][0]] if "lengths" in batch else None
        if tokens is None or len(tokens) > SHOWN:  # too small to see
            return None
        return Example(tokens, [self.label(token) for token in tokens])

    def stack(self, model: nnx.Module) -> nnx.Module:
        return model.encoder


class ListOps(Classification):
    """Nested operations on lists of digits: `qkv_jax.data.listops`."""

    reads = ("min_length", "max_depth", "max_args")
    what = "ListOps, nested operations on lists of digits"
    rule = "MIN, MAX, MED (the median) and SM (the sum modulo 10) are closed by X: to what digit?"
    vocab_size = len(TOKENS)

    @classmethod
    def num_classes(cls, config: DataConfig) -> int:
        return 10

    def generate(self, step: int, batch_size: int, stream: int) -> Batch:
        sizes = {name: getattr(self.settings.data, name) for name in self.reads}
        return data.listops(step=step, batch_size=batch_size, stream=stream, **self.place, **sizes)

    def label(self, token: int) -> str:
        return TOKENS[token]


class Digits(Classification):
    """Images of digits, pixel by pixel: `qkv_jax.data.digits`."""

    reads = ("validation_fraction",)
    what = "scikit-learn's 8 x 8 handwritten digits, pixel by pixel"
    rule = "Which digit do the pixels show?"
    vocab_size = DIGIT_IDS

    @classmethod
    def num_classes(cls, config: DataConfig) -> int:
        return 10

    def generate(self, step: int, batch_size: int, stream: int) -> Batch:
        fraction = self.settings.data.validation_fraction
        return data.digits(
            step=step, batch_size=batch_size, stream=stream, validation_fraction=fraction,
            **self.place,
        )  # fmt: skip

    def label(self, token: int) -> str:
        return str(token)


class Passages(Classification):
    """Passages of a corpus's documents, byte by byte."""

    reads = ("corpus", "path", "validation_fraction")
    vocab_size = BYTE_IDS

    @functools.cached_property
    def documents(self) -> dict[str, np.ndarray]:
        """Those that passages are drawn from, in bytes, the longest first."""
        config = self.settings.data
        texts = data.documents(config.corpus, config.path)
        found = {name: to_bytes(text) for name, text in texts.items()}
        return dict(sorted(found.items(), key=lambda item: (-len(item[1]), item[0])))

    @abc.abstractmethod
    def texts(self, stream: int) -> Sequence[np.ndarray]:
        """What passages of a stream are drawn from."""

    @functools.cached_property
    def corpus(self) -> data.Corpus:
        return data.load_corpus(self.settings.data.corpus, self.settings.data.path)

    @property
    def what(self) -> str:
        return f"bytes of documents of {self.corpus.source}"

    def keep(self, run: RunDirectory) -> None:
        keep_corpus(run, about(self.corpus), what="text")

    def label(self, token: int) -> str:
        return chr(token) if 32 <= token < 127 else "." if token < 256 else "CLS"

    def show(self, ids: np.ndarray) -> str:
        return "".join(map(self.label, ids))


class WhichDocument(Passages):
    """Which of the longest documents is it from? `qkv_jax.data.which_document`."""

    reads = (*Passages.reads, "num_documents")
    rule = "Which document is the passage from? The last part of each is never trained on."

    @classmethod
    def num_classes(cls, config: DataConfig) -> int:
        return config.num_documents

    @functools.cached_property
    def names(self) -> list[str]:
        """Of the documents that are told apart."""
        number = self.settings.data.num_documents
        if len(self.documents) < number:
            raise ValueError(
                f"config.data.num_documents: wanted at most the {len(self.documents)} that the "
                f"corpus has, got {number}"
            )
        return list(self.documents)[:number]

    def texts(self, stream: int) -> Sequence[np.ndarray]:
        found = []
        for name in self.names:
            text = self.documents[name]
            end = int(len(text) * (1 - self.settings.data.validation_fraction))
            found.append(text[:end] if stream == data.TRAINING else text[end:])
        return found

    def generate(self, step: int, batch_size: int, stream: int) -> Batch:
        return data.which_document(
            self.texts(stream), step=step, batch_size=batch_size, stream=stream, **self.place
        )

    def name_of_class(self, number: int) -> str:
        return self.names[number]


class SameDocument(Passages):
    """Are two passages from one document? `qkv_jax.data.same_document`."""

    rule = "Are both passages from one document? No document of these is trained on."

    @classmethod
    def num_classes(cls, config: DataConfig) -> int:
        return 2

    @functools.cached_property
    def _halves(self) -> tuple[list[np.ndarray], list[np.ndarray]]:
        """Documents to train on, and others, drawn evenly from long and short ones."""
        least = self.settings.data.context - 1
        long = [text for text in self.documents.values() if len(text) >= least]
        every = round(1 / self.settings.data.validation_fraction)
        held = long[every - 1 :: every]
        return [text for i, text in enumerate(long) if (i + 1) % every], held

    def texts(self, stream: int) -> Sequence[np.ndarray]:
        return self._halves[stream != data.TRAINING]

    def generate(self, step: int, batch_size: int, stream: int) -> Batch:
        return data.same_document(
            self.texts(stream), step=step, batch_size=batch_size, stream=stream, **self.place
        )

    def name_of_class(self, number: int) -> str:
        return ("two documents", "the same document")[number]
