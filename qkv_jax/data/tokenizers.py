"""Tokenizers: text to token ids and back, `decode(encode(text)) == text`.

Characters and bytes need NumPy alone; `bpe`, `unigram` and `mecab` have those that need a library.
What reads the files of pretrained models (`pretrained`) may lose something, as those do.
"""

import contextlib
import importlib
import json
import os
from abc import ABC, abstractmethod
from types import ModuleType
from typing import Any, ClassVar

import numpy as np

from qkv_jax.data.files import read_text, write_atomically
from qkv_jax.data.labels import readable

TOKENIZERS = ("char", "byte", "bpe", "unigram", "mecab")  # that can be made for a text

MAX_JSON_BYTES = 64 * 2**20  # of a saved tokenizer: the largest in public use have about 35 MB


class Tokenizer(ABC):
    """What every tokenizer can do. Ids are int32 in `[0, vocab_size)`."""

    name: str
    kinds: ClassVar[dict[str, type["Tokenizer"]]] = {}  # by name, all that are imported

    def __init_subclass__(cls, **kwargs: Any):
        super().__init_subclass__(**kwargs)
        Tokenizer.kinds[cls.name] = cls

    @classmethod
    def build(cls, text: str, vocab_size: int, path: str | os.PathLike | None) -> "Tokenizer":
        """The tokenizer for a text: see `build_tokenizer`. Those in `TOKENIZERS` have it."""
        raise NotImplementedError(f"tokenizer {cls.name!r} is not made for a text")

    @property
    @abstractmethod
    def vocab_size(self) -> int:
        """The number of different ids, `V`."""

    @abstractmethod
    def encode(self, text: str) -> np.ndarray:
        """The ids of a text, int32 `[length]`. ValueError if the text cannot be encoded."""

    def encode_framed(self, text: str) -> np.ndarray:
        """The ids of a text as its model reads it, with those around it such as [CLS] and [SEP]."""
        return self.encode(text)

    @abstractmethod
    def decode(self, ids: np.ndarray) -> str:
        """The text of ids, an integer array or sequence `[length]`. ValueError if out of range."""

    def labels(self, ids: np.ndarray) -> list[str]:
        """What each token of a text is called in a picture: its own text, and never a \ufffd.

        A character that several tokens share is shown as 猫·1/3, a byte without its others as <E7>.
        """
        return readable(self._pieces(ids))

    def _pieces(self, ids: np.ndarray) -> list[bytes]:
        """The UTF-8 bytes of each token."""
        return [self.decode([id]).encode("utf-8", "surrogatepass") for id in ids]

    @abstractmethod
    def _state(self) -> dict[str, Any]:
        """What `_from_state` rebuilds the tokenizer from, as JSON has it."""

    @classmethod
    @abstractmethod
    def _from_state(cls, state: dict[str, Any]) -> "Tokenizer": ...

    def to_json(self) -> str:
        """All of the tokenizer, as JSON that `Tokenizer.from_json` reads."""
        return json.dumps({"tokenizer": self.name, **self._state()})

    @staticmethod
    def from_json(text: str) -> "Tokenizer":
        """The tokenizer that `to_json` wrote.

        Raises:
            ValueError: `text` is too large, is not JSON, or describes no tokenizer.
        """
        if len(text) > MAX_JSON_BYTES:
            raise ValueError(f"tokenizer JSON has {len(text)} bytes; wanted <= {MAX_JSON_BYTES}")
        try:
            state = json.loads(text)
        except (ValueError, RecursionError) as error:
            raise ValueError(f"tokenizer JSON cannot be parsed: {error}") from error
        return Tokenizer.from_state(state)

    @staticmethod
    def from_state(state: Any) -> "Tokenizer":
        """The tokenizer that JSON of `to_json` describes. ValueError: it describes none."""
        name, kinds = state.get("tokenizer") if isinstance(state, dict) else None, Tokenizer.kinds
        if name not in kinds:
            raise ValueError(
                f"tokenizer JSON has 'tokenizer': {name!r}; wanted one of: {', '.join(kinds)}"
            )
        return kinds[name]._from_state(state)

    def save(self, path: str | os.PathLike) -> None:
        """Writes `to_json` to `path`, whole or not at all."""
        write_atomically(path, self.to_json().encode("utf-8"))

    @staticmethod
    def load(path: str | os.PathLike) -> "Tokenizer":
        """The tokenizer that `save` wrote to `path`. ValueError names the file that is no such."""
        try:
            return Tokenizer.from_json(read_json(path))
        except ValueError as error:
            raise ValueError(f"tokenizer {str(path)!r} cannot be loaded: {error}") from error


class CharTokenizer(Tokenizer):
    """One id for each different character, in the order of the code points (as in nanoGPT).

    Args:
        characters: a text that holds every character there will be.
    """

    name = "char"

    def __init__(self, characters: str):
        if not characters:
            raise ValueError("CharTokenizer: characters is empty; wanted at least one character")
        self.characters = "".join(sorted(set(characters)))
        self._code_points = _code_points(self.characters)
        self._ids = np.full(int(self._code_points[-1]) + 2, -1, np.int32)  # the last: all beyond
        self._ids[self._code_points] = np.arange(len(self.characters), dtype=np.int32)

    @classmethod
    def build(cls, text, vocab_size, path):
        refuse_path(cls.name, path)
        return cls(text)

    @property
    def vocab_size(self) -> int:
        return len(self.characters)

    def encode(self, text: str) -> np.ndarray:
        ids = self._ids[np.minimum(_code_points(text), len(self._ids) - 1)]
        if ids.size and ids.min() < 0:
            position = int(np.argmin(ids))
            character = text[position]
            line = text.count("\n", 0, position) + 1
            raise ValueError(
                f"text has the character {character!r} (U+{ord(character):04X}) at position "
                f"{position} (line {line}), which is not among this tokenizer's "
                f"{self.vocab_size} characters"
            )
        return ids

    def decode(self, ids: np.ndarray) -> str:
        code_points = self._code_points[checked_ids(ids, self.vocab_size)]
        return code_points.tobytes().decode("utf-32-le", "surrogatepass")

    def _state(self) -> dict[str, Any]:
        return {"characters": self.characters}

    @classmethod
    def _from_state(cls, state: dict[str, Any]) -> "CharTokenizer":
        characters = state.get("characters")
        if not isinstance(characters, str):
            raise ValueError("tokenizer JSON of 'char' has no string 'characters'")
        return cls(characters)


class ByteTokenizer(Tokenizer):
    """The UTF-8 bytes of the text: 256 ids, any text. Bytes that are no UTF-8 decode as U+FFFD."""

    name = "byte"
    vocab_size = 256

    @classmethod
    def build(cls, text, vocab_size, path):
        refuse_path(cls.name, path)
        return cls()

    def encode(self, text: str) -> np.ndarray:
        return np.frombuffer(text.encode("utf-8"), np.uint8).astype(np.int32)

    def decode(self, ids: np.ndarray) -> str:
        return checked_ids(ids, 256).astype(np.uint8).tobytes().decode("utf-8", "replace")

    def _pieces(self, ids: np.ndarray) -> list[bytes]:
        return [bytes([id]) for id in checked_ids(ids, 256)]

    def _state(self) -> dict[str, Any]:
        return {}

    @classmethod
    def _from_state(cls, state: dict[str, Any]) -> "ByteTokenizer":
        return cls()


def build_tokenizer(
    name: str, text: str, *, vocab_size: int = 4096, path: str | os.PathLike | None = None
) -> Tokenizer:
    """The tokenizer called `name`, one of `TOKENIZERS`, for a text.

    Args:
        name: of the tokenizer.
        text: where "char" finds its characters, "bpe" its merges, "unigram" its pieces and "mecab"
            its words.
        vocab_size: ids that "bpe", "unigram" and "mecab" train; the others know their own.
        path: "bpe" and "unigram" load this file instead of training (see their `from_file`).

    Raises:
        ValueError: an unknown name, a path that would be ignored, or what the tokenizer refuses.
        ImportError: naming the package that the tokenizer needs.
    """
    if name not in TOKENIZERS:
        raise ValueError(f"tokenizer {name!r} is unknown; wanted one of: {', '.join(TOKENIZERS)}")
    return Tokenizer.kinds[name].build(text, vocab_size, path)


def refuse_path(name: str, path: str | os.PathLike | None) -> None:
    """ValueError if there is a path, which a tokenizer that always learns from a text ignores."""
    if path:
        raise ValueError(
            f"tokenizer {name!r} takes no path, got {str(path)!r}; only 'bpe' and 'unigram' do"
        )


def _code_points(text: str) -> np.ndarray:
    return np.frombuffer(text.encode("utf-32-le", "surrogatepass"), np.uint32)


def checked_ids(ids: np.ndarray, vocab_size: int) -> np.ndarray:
    """`ids` as an integer array [length]. ValueError for another shape, type or range."""
    ids = np.asarray(ids)
    if ids.size == 0:
        return np.empty(0, np.int32)
    if ids.ndim != 1 or not np.issubdtype(ids.dtype, np.integer):
        raise ValueError(f"ids are {ids.dtype}{list(ids.shape)}; wanted integers of shape [length]")
    if ids.min() < 0 or ids.max() >= vocab_size:
        raise ValueError(f"ids go from {ids.min()} to {ids.max()}; wanted 0 to {vocab_size - 1}")
    return ids


def read_json(path: str | os.PathLike) -> str:
    """The text of a JSON file. ValueError: it cannot be read, or is larger than any tokenizer."""
    with contextlib.suppress(OSError):  # read_text says it better
        if (size := os.path.getsize(path)) > MAX_JSON_BYTES:
            raise ValueError(f"{str(path)!r} has {size} bytes; wanted <= {MAX_JSON_BYTES}")
    return read_text(path)


def needed(name: str, package: str) -> ModuleType:
    """The package that a tokenizer needs, imported. ImportError says how to get it."""
    try:
        return importlib.import_module(package)
    except ImportError as error:
        raise ImportError(f"tokenizer {name!r} needs a package: pip install {package}") from error
