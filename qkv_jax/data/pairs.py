"""Pairs of a sentence and its translation: from files, or generated.

Generated pairs need no data: see `qkv_jax.data.generated_pairs`.
"""

import hashlib
import os
from collections.abc import Sequence
from dataclasses import dataclass

from qkv_jax.data import generated_pairs
from qkv_jax.data.files import read_text

PAIRS = ("file", *generated_pairs.GENERATED)


@dataclass(frozen=True)
class Pairs:
    """Sentences and their translations.

    Attributes:
        name: how a config calls them.
        sources, targets: P sentences each, in the same order.
        origin: a line for a person: what they are, and of which version.
    """

    name: str
    sources: tuple[str, ...]
    targets: tuple[str, ...]
    origin: str

    def __len__(self) -> int:
        return len(self.sources)

    @property
    def text(self) -> str:
        """All sentences, a line each, sources first."""
        return "\n".join((*self.sources, *self.targets))

    @property
    def sha256(self) -> str:
        """Of the text's UTF-8 bytes, in hexadecimal."""
        return hashlib.sha256(self.text.encode("utf-8")).hexdigest()

    def split(self, validation_fraction: float) -> "tuple[Pairs, Pairs]":
        """The first part, to train on, and the rest.

        Raises:
            ValueError: a bad fraction, or a part without a pair.
        """
        if not 0.0 < validation_fraction < 1.0:
            raise ValueError(
                f"validation_fraction is {validation_fraction}; wanted 0 < fraction < 1"
            )
        first = int(len(self) * (1.0 - validation_fraction))
        if not 0 < first < len(self):
            raise ValueError(
                f"{len(self)} pairs split into {first} for training and {len(self) - first} for "
                "validation; each needs one: wanted more pairs, or another validation_fraction"
            )
        return self[:first], self[first:]

    def __getitem__(self, which: slice) -> "Pairs":
        return Pairs(self.name, self.sources[which], self.targets[which], self.origin)


def load_pairs(
    name: str,
    path: str | os.PathLike | None = None,
    target_path: str | os.PathLike | None = None,
    *,
    number: int = 10_000,
    seed: int = 0,
) -> Pairs:
    """The pairs called `name`, one of `PAIRS`.

    Args:
        name: "file", or what is to be generated.
        path, target_path: what "file" reads, see `read_pairs`; the others take none.
        number, seed: of generated pairs.

    Raises:
        ValueError: an unknown name, a missing path, a path that would be ignored, or bad files.
    """
    if name not in PAIRS:
        raise ValueError(f"pairs {name!r} are unknown; wanted one of: {', '.join(PAIRS)}")
    if name == "file":
        if path is None:
            raise ValueError("pairs 'file' need a path: a TSV, or a file of sources")
        return read_pairs(path, target_path)
    for which, given in (("path", path), ("target_path", target_path)):
        if given is not None:
            raise ValueError(f"pairs {name!r} take no {which}, got {str(given)!r}; wanted 'file'?")
    generated = generated_pairs.GENERATED[name]
    sources, targets = zip(*generated.pairs(number, seed), strict=True)
    return Pairs(name, sources, targets, f"{generated.origin}, seed {seed}")


def read_pairs(path: str | os.PathLike, target_path: str | os.PathLike | None = None) -> Pairs:
    """The pairs of two files, a sentence a line, or of one with tabs between the columns.

    Lines end with `\\n` or `\\r\\n` and nothing else. Of a TSV the first two columns are read, as
    in collections that name an author in the third.

    Args:
        path: of the sources, UTF-8; without a `target_path`, of both.
        target_path: of the targets, UTF-8, as many lines.

    Raises:
        ValueError: a file that cannot be read, is empty or is not UTF-8; a number of lines that
            differs; a line without a sentence, by its number.
    """
    if target_path is None:
        rows = [line.split("\t") for line in _lines(path)]
        for number, row in enumerate(rows, start=1):
            if len(row) < 2:
                raise ValueError(
                    f"pairs: line {number} of {str(path)!r} has no tab; wanted a source, a tab and "
                    "a target (or a second file, of targets)"
                )
        sources, targets = [row[0] for row in rows], [row[1] for row in rows]
        origin = os.fspath(path)
    else:
        sources, targets = _lines(path), _lines(target_path)
        origin = f"{os.fspath(path)} and {os.fspath(target_path)}"
        if len(sources) != len(targets):
            raise ValueError(
                f"pairs: {str(path)!r} has {len(sources)} lines and {str(target_path)!r} has "
                f"{len(targets)}; wanted as many"
            )
    _check_sentences(path, sources)
    _check_sentences(path if target_path is None else target_path, targets)
    return Pairs("file", _stripped(sources), _stripped(targets), origin)


def _lines(path: str | os.PathLike) -> list[str]:
    text = read_text(path, what="pairs:")
    if not text.strip():
        raise ValueError(f"pairs: {str(path)!r} is empty; wanted a sentence a line")
    return text.removesuffix("\n").split("\n")  # splitlines would also split inside sentences


def _check_sentences(path: str | os.PathLike, sentences: Sequence[str]) -> None:
    for number, sentence in enumerate(sentences, start=1):
        if not sentence.strip():
            raise ValueError(f"pairs: line {number} of {str(path)!r} lacks a sentence")


def _stripped(sentences: Sequence[str]) -> tuple[str, ...]:
    return tuple(sentence.strip() for sentence in sentences)
