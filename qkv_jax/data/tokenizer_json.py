"""Tokenizers of Hugging Face's `tokenizers` library, each described by a tokenizer.json."""

import json
import os
import re
from collections.abc import Iterator
from pathlib import Path
from types import ModuleType
from typing import Any

import numpy as np

from qkv_jax.data.tokenizers import Tokenizer, checked_ids, needed, read_json

_CHUNK = 2**18  # characters a BPE encodes at once: the library needs about 120 bytes for each


class JsonTokenizer(Tokenizer):
    """What a tokenizer.json describes: byte-pair encoding, WordPiece, unigrams.

    Whether it decodes to the very same text is up to the file: normalisation loses something. A
    special token that stands in a text is that token, as transformers has it.

    Args:
        tokenizer_json: the content of the file.
    """

    name = "tokenizer_json"

    def __init__(self, tokenizer_json: str):
        try:
            self._tokenizer = library().Tokenizer.from_str(tokenizer_json)
        except ImportError:
            raise
        except Exception as error:  # the library raises plain Exception
            raise ValueError(f"not a tokenizer.json: {error}") from error
        ids = self._tokenizer.get_vocab().values()
        if not ids:
            raise ValueError("the tokenizer.json has an empty vocabulary")
        self._vocab_size = max(ids) + 1
        self._tokenizer.no_truncation()  # a file may ask for both; models say how much they read
        self._tokenizer.no_padding()

    @classmethod
    def from_file(cls, path: str | os.PathLike) -> "JsonTokenizer":
        """The tokenizer of a tokenizer.json. ValueError names the file that is no such."""
        try:
            return cls(read_json(path))
        except ValueError as error:
            raise ValueError(f"tokenizer {str(path)!r} cannot be loaded: {error}") from error

    @property
    def vocab_size(self) -> int:
        return self._vocab_size

    def encode(self, text: str) -> np.ndarray:
        encode = self._tokenizer.encode_batch_fast
        chunks = _chunks(text) if self._splits_at_line_ends() else [text]
        ids = [encode([chunk], add_special_tokens=False)[0].ids for chunk in chunks]
        return np.concatenate([np.asarray(i, np.int32) for i in ids] or [np.empty(0, np.int32)])

    def encode_framed(self, text: str) -> np.ndarray:
        return np.asarray(self._tokenizer.encode(text).ids, np.int32)

    def decode(self, ids: np.ndarray) -> str:
        ids = checked_ids(ids, self.vocab_size).tolist()
        return self._tokenizer.decode(ids, skip_special_tokens=False)

    def _pieces(self, ids: np.ndarray) -> list[bytes]:
        decoder = self._tokenizer.decoder
        byte_level = decoder is not None and b'"ByteLevel"' in decoder.__getstate__()
        added = self._tokenizer.get_added_tokens_decoder()
        pieces = []
        for id in checked_ids(ids, self.vocab_size).tolist():
            token = self._tokenizer.id_to_token(id) or ""  # an id may be none's
            if id not in added and byte_level:
                pieces.append(bytes(_BYTES[character] for character in token))
            elif byte := re.fullmatch("<0x([0-9A-F]{2})>", token):
                pieces.append(bytes.fromhex(byte[1]))
            else:
                pieces.append(token.replace("▁", " ").encode())
        return pieces

    def _splits_at_line_ends(self) -> bool:
        """Whether encoding piece by piece, cut where a line ends, changes nothing."""
        before, normalizer = self._tokenizer.pre_tokenizer, self._tokenizer.normalizer
        byte_level = isinstance(before, library().pre_tokenizers.ByteLevel)
        return byte_level and before.use_regex and not before.add_prefix_space and not normalizer

    def _state(self) -> dict[str, Any]:
        return {"json": json.loads(self._tokenizer.to_str())}

    @classmethod
    def _from_state(cls, state: dict[str, Any]) -> "JsonTokenizer":
        return cls(json.dumps(state.get("json")))


class BpeTokenizer(JsonTokenizer):
    """Byte-pair encoding over bytes, as in GPT-2: frequent strings are one id, any text has ids.

    Made by `BpeTokenizer.train` or `BpeTokenizer.from_file`.
    Source: Sennrich et al. 2016 (https://arxiv.org/abs/1508.07909); over bytes: GPT-2.

    Args:
        tokenizer_json: the content of the `tokenizers` library's tokenizer.json.
    """

    name = "bpe"

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
        trainer = library().trainers.BpeTrainer(
            vocab_size=vocab_size, show_progress=False, initial_alphabet=sorted(_BYTES)
        )
        tokenizer = byte_level(library().models.BPE())
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
                return cls(read_json(path))
            files = (path / "encoder.json", path / "vocab.bpe")
            return cls(byte_level(library().models.BPE.from_file(*map(str, files))).to_str())
        except ImportError:
            raise
        except Exception as error:
            raise ValueError(
                f"bpe: {str(path)!r} cannot be loaded ({error}); wanted a tokenizer.json, or a "
                "folder with encoder.json and vocab.bpe"
            ) from error


def library() -> ModuleType:
    """The `tokenizers` package. ImportError says how to get it."""
    return needed("bpe", "tokenizers")


def byte_level(model: Any, *, prefix_space: bool = False) -> Any:
    """The library's tokenizer that cuts a text as GPT-2 does and encodes its bytes by a model."""
    tokenizer = library().Tokenizer(model)
    tokenizer.pre_tokenizer = library().pre_tokenizers.ByteLevel(add_prefix_space=prefix_space)
    tokenizer.decoder = library().decoders.ByteLevel()
    return tokenizer


def _printable_bytes() -> dict[str, int]:
    """GPT-2's names for bytes: Latin-1 where it can be printed, else the letters from U+0100."""
    own = [*range(ord("!"), ord("~") + 1), *range(ord("¡"), ord("¬") + 1), *range(ord("®"), 256)]
    others = [byte for byte in range(256) if byte not in own]
    return {chr(byte): byte for byte in own} | {chr(256 + i): b for i, b in enumerate(others)}


_BYTES = _printable_bytes()


def _chunks(text: str) -> Iterator[str]:
    """Pieces of `_CHUNK` characters or a little more; each but the last is cut before a newline."""
    boundary = re.compile(r"(?<=\S)(?=\n)")
    start = 0
    while start < len(text):
        cut = boundary.search(text, start + _CHUNK)
        end = cut.start() if cut else len(text)
        yield text[start:end]
        start = end
