"""Tokenizers: text to token ids and back, `decode(encode(text)) == text`.

Characters and bytes need NumPy alone; BPE imports the `tokenizers` library when it is asked for.
`unigram` and `mecab` have the others.
"""

import contextlib
import importlib
import json
import os
import re
from abc import ABC, abstractmethod
from collections.abc import Iterator
from pathlib import Path
from types import ModuleType
from typing import Any, ClassVar

import numpy as np

from qkv_jax.data.files import read_text, write_atomically

TOKENIZERS = ("char", "byte", "bpe", "unigram", "mecab")

MAX_JSON_BYTES = 64 * 2**20  # of a saved tokenizer: the largest in public use have about 35 MB
_CHUNK = 2**18  # characters a BPE encodes at once: the library needs about 120 bytes for each


class Tokenizer(ABC):
    """What every tokenizer can do. Ids are int32 in `[0, vocab_size)`."""

    name: str
    kinds: ClassVar[dict[str, type["Tokenizer"]]] = {}  # by name, all that are imported

    def __init_subclass__(cls, **kwargs: Any):
        super().__init_subclass__(**kwargs)
        Tokenizer.kinds[cls.name] = cls

    @classmethod
    @abstractmethod
    def build(cls, text: str, vocab_size: int, path: str | os.PathLike | None) -> "Tokenizer":
        """The tokenizer for a text: see `build_tokenizer`."""

    @property
    @abstractmethod
    def vocab_size(self) -> int:
        """The number of different ids, `V`."""

    @abstractmethod
    def encode(self, text: str) -> np.ndarray:
        """The ids of a text, int32 `[length]`. ValueError if the text cannot be encoded."""

    @abstractmethod
    def decode(self, ids: np.ndarray) -> str:
        """The text of ids, an integer array or sequence `[length]`. ValueError if out of range."""

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
        name = state.get("tokenizer") if isinstance(state, dict) else None
        if name not in TOKENIZERS:
            raise ValueError(
                f"tokenizer JSON has 'tokenizer': {name!r}; wanted one of: {', '.join(TOKENIZERS)}"
            )
        return Tokenizer.kinds[name]._from_state(state)

    def save(self, path: str | os.PathLike) -> None:
        """Writes `to_json` to `path`, whole or not at all."""
        write_atomically(path, self.to_json().encode("utf-8"))

    @staticmethod
    def load(path: str | os.PathLike) -> "Tokenizer":
        """The tokenizer that `save` wrote to `path`. ValueError names the file that is no such."""
        try:
            return Tokenizer.from_json(_read_json(path))
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

    def _state(self) -> dict[str, Any]:
        return {}

    @classmethod
    def _from_state(cls, state: dict[str, Any]) -> "ByteTokenizer":
        return cls()


class BpeTokenizer(Tokenizer):
    """Byte-pair encoding over bytes, as in GPT-2: frequent strings are one id, any text has ids.

    Made by `BpeTokenizer.train` or `BpeTokenizer.from_file`.
    Source: Sennrich et al. 2016 (https://arxiv.org/abs/1508.07909); over bytes: GPT-2.

    Args:
        tokenizer_json: the content of the `tokenizers` library's tokenizer.json.
    """

    name = "bpe"

    def __init__(self, tokenizer_json: str):
        try:
            self._tokenizer = _library().Tokenizer.from_str(tokenizer_json)
        except ImportError:
            raise
        except Exception as error:  # the library raises plain Exception
            raise ValueError(f"not a tokenizer.json: {error}") from error
        self._tokenizer.no_truncation()  # many a file keeps what its training cut and padded
        self._tokenizer.no_padding()
        ids = self._tokenizer.get_vocab().values()
        if not ids:
            raise ValueError("the tokenizer.json has an empty vocabulary")
        self._vocab_size = max(ids) + 1

    @classmethod
    def build(cls, text, vocab_size, path):
        return cls.from_file(path) if path else cls.train(text, vocab_size)

    @classmethod
    def train(cls, text: str, vocab_size: int) -> "BpeTokenizer":
        """The merges of the most frequent pairs in `text`, until there are `vocab_size` ids.

        A short text may run out of pairs first: the vocabulary is then smaller.
        """
        if vocab_size < 256:
            raise ValueError(f"bpe: vocab_size is {vocab_size}; wanted >= 256, one for each byte")
        library = _library()
        alphabet = sorted(library.pre_tokenizers.ByteLevel.alphabet())
        trainer = library.trainers.BpeTrainer(
            vocab_size=vocab_size, show_progress=False, initial_alphabet=alphabet
        )
        tokenizer = _byte_level(library, library.models.BPE())
        chunks = (text[i : i + _CHUNK] for i in range(0, len(text), _CHUNK))
        tokenizer.train_from_iterator(chunks, trainer)
        return cls(tokenizer.to_str())

    @classmethod
    def from_file(cls, path: str | os.PathLike) -> "BpeTokenizer":
        """The tokenizer of a tokenizer.json, or of a folder with GPT-2's encoder.json, vocab.bpe.

        Whether it decodes to the very same text is up to the file: normalisation loses something.
        """
        path = Path(path).expanduser()
        try:
            if not path.is_dir():
                return cls(_read_json(path))
            library = _library()
            model = library.models.BPE.from_file(
                str(path / "encoder.json"), str(path / "vocab.bpe")
            )
            return cls(_byte_level(library, model).to_str())
        except ImportError:
            raise
        except Exception as error:
            raise ValueError(
                f"bpe: {str(path)!r} cannot be loaded ({error}); wanted a tokenizer.json, or a "
                "folder with encoder.json and vocab.bpe"
            ) from error

    @property
    def vocab_size(self) -> int:
        return self._vocab_size

    def encode(self, text: str) -> np.ndarray:
        encode = self._tokenizer.encode_batch_fast
        chunks = _chunks(text) if self._splits_at_line_ends() else [text]
        ids = [encode([chunk], add_special_tokens=False)[0].ids for chunk in chunks]
        return np.concatenate([np.asarray(i, np.int32) for i in ids] or [np.empty(0, np.int32)])

    def encode_framed(self, text: str) -> np.ndarray:
        """The ids of a text with those that the file puts around it, such as [CLS] and [SEP]."""
        return np.asarray(self._tokenizer.encode(text).ids, np.int32)

    def decode(self, ids: np.ndarray) -> str:
        ids = checked_ids(ids, self.vocab_size).tolist()
        return self._tokenizer.decode(ids, skip_special_tokens=False)

    def _splits_at_line_ends(self) -> bool:
        """Whether encoding piece by piece, cut where a line ends, changes nothing."""
        before, normalizer = self._tokenizer.pre_tokenizer, self._tokenizer.normalizer
        byte_level = isinstance(before, _library().pre_tokenizers.ByteLevel)
        return byte_level and before.use_regex and not before.add_prefix_space and not normalizer

    def _state(self) -> dict[str, Any]:
        return {"json": json.loads(self._tokenizer.to_str())}

    @classmethod
    def _from_state(cls, state: dict[str, Any]) -> "BpeTokenizer":
        return cls(json.dumps(state.get("json")))


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


def _read_json(path: str | os.PathLike) -> str:
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


def _library() -> ModuleType:
    return needed("bpe", "tokenizers")


def _byte_level(library: ModuleType, model: Any) -> Any:
    tokenizer = library.Tokenizer(model)
    tokenizer.pre_tokenizer = library.pre_tokenizers.ByteLevel(add_prefix_space=False)
    tokenizer.decoder = library.decoders.ByteLevel()
    return tokenizer


def _chunks(text: str) -> Iterator[str]:
    """Pieces of `_CHUNK` characters or a little more; each but the last is cut before a newline."""
    boundary = re.compile(r"(?<=\S)(?=\n)")
    start = 0
    while start < len(text):
        cut = boundary.search(text, start + _CHUNK)
        end = cut.start() if cut else len(text)
        yield text[start:end]
        start = end
