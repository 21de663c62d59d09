"""A folder of tokens on disk, read where needed: a text of any size costs a run next to nothing.

    tokens.npy      uint8, uint16 or int32 [tokens], by the size of the vocabulary
    documents.npy   int64 [documents]: where each begins
    tokenizer.json  what `Tokenizer.save` wrote
    tokens.json     how long the others are, their checksums, and what they were made of

`token_writing` makes such folders.
"""

import dataclasses
import functools
import hashlib
import json
import os
from pathlib import Path
from typing import Any

import numpy as np

from qkv_jax.data.array_file import ArrayFile
from qkv_jax.data.batches import Batch, token_dtype
from qkv_jax.data.files import read_text
from qkv_jax.data.tokenizers import Tokenizer, read_json

HEADER, TOKENS, DOCUMENTS, TOKENIZER = (
    "tokens.json", "tokens.npy", "documents.npy", "tokenizer.json",
)  # fmt: skip
FORMAT = 1  # raise it when older folders can no longer be read
SAMPLES, SAMPLE_BYTES = 64, 4096  # of a file that are compared when it is opened


@dataclasses.dataclass(frozen=True)
class TokenFiles:
    """The tokens of a text, in a folder. Made by `open`.

    Attributes:
        folder: where they are.
        header: what tokens.json says.
        tokens: uint8, uint16 or int32 [tokens]; what is looked at is read.
        documents: where each document begins, int64 [documents], rising from 0; likewise.
    """

    folder: Path
    header: dict[str, Any]
    tokens: ArrayFile
    documents: ArrayFile
    _states: dict[str, tuple[int, ...]]  # of the files, as they were opened

    name = "token_files"

    @classmethod
    def open(cls, folder: str | os.PathLike) -> "TokenFiles":
        """The token files in a folder, checked in a few milliseconds, whatever their size.

        The lengths, the dtype, the tokenizer and a sample of each file's content must be those that
        the header tells; `verify` looks at all of the content.

        Raises:
            ValueError: there are none, or one of them is not as it was made.
        """
        folder = Path(folder).expanduser()
        header = _read_header(folder)
        states = {name: _state(folder / name) for name in (HEADER, TOKENS, DOCUMENTS, TOKENIZER)}
        if missing := [name for name, state in states.items() if not state]:
            raise _damaged(folder, missing[0], "a file that is missing")
        tokenizer = _sha256(read_json(folder / TOKENIZER).encode("utf-8"))
        if tokenizer != header["tokenizer_sha256"]:
            raise _damaged(folder, TOKENIZER, "another tokenizer than the tokens were made with")
        dtype = token_dtype(header["vocab_size"])
        tokens = _opened(folder, TOKENS, header, dtype)
        documents = _opened(folder, DOCUMENTS, header, np.dtype(np.int64))
        return cls(folder, header, tokens, documents, states)

    @property
    def sha256(self) -> str:
        """Of the content of all files but the header, in hexadecimal: what identifies the text."""
        names = ("tokenizer_sha256", "tokens_sha256", "documents_sha256")
        return _sha256("".join(self.header[name] for name in names).encode("ascii"))

    @property
    def source(self) -> str:
        """A line for a person."""
        return f"{self.folder} ({len(self.documents):,} documents, {len(self.tokens):,} tokens)"

    @property
    def characters(self) -> int:
        """How long the text is, with what stands between documents."""
        return self.header["characters"]

    @functools.cached_property
    def tokenizer(self) -> Tokenizer:
        """The tokenizer that the tokens were made with."""
        return Tokenizer.load(self.folder / TOKENIZER)

    def documents_within(self, begin: int, end: int) -> np.ndarray | ArrayFile:
        """Where documents begin in `tokens[begin:end]`, int64, the first of them at 0."""
        first, last = np.searchsorted(self.documents, [begin + 1, end])
        if begin == 0:
            return self.documents[first - 1 : last]  # still in the file
        return np.maximum(np.asarray(self.documents[first - 1 : last]) - begin, 0)

    def check_unchanged(self) -> None:
        """Compares the files' sizes and times with those of when they were opened: microseconds.

        Raises:
            ValueError: one was changed, replaced or removed.
        """
        for name, before in self._states.items():
            if _state(self.folder / name) != before:
                raise _damaged(self.folder, name, "a file that was changed since it was opened")

    def checked(self, batch: Batch) -> Batch:
        """A batch that was read from here, of files that are still as they were opened.

        To be called with each batch, after it is read: so none is used of which a part is another
        file's. Only what changes a file's content and neither its size, time nor inode is left to
        `verify`.

        Raises:
            ValueError: a file was changed, replaced or removed, or an id is beyond the vocabulary.
        """
        self.check_unchanged()
        most, size = int(batch["targets"].max()), self.header["vocab_size"]
        if most >= size or batch["targets"].min() < 0:
            raise _damaged(self.folder, TOKENS, f"the id {most} for a vocabulary of {size}")
        return batch

    def verify(self) -> None:
        """Reads all of it, at the speed of the disk, and compares the checksums.

        Raises:
            ValueError: a file is not as it was made.
        """
        for name in (TOKENS, DOCUMENTS):
            with open(self.folder / name, "rb") as file:
                found = hashlib.file_digest(file, "sha256").hexdigest()
            if found != self.header[f"{Path(name).stem}_sha256"]:
                raise _damaged(self.folder, name, f"a file of another checksum, {found[:12]}")


def file_facts(path: Path, length: int, sha256: str) -> dict[str, Any]:
    """What a header tells of a file: its length in items and bytes, and its checksums."""
    stem = path.stem
    return {
        stem: length,
        f"{stem}_bytes": path.stat().st_size,
        f"{stem}_sample": _sample(path),
        f"{stem}_sha256": sha256,
    }


def _read_header(folder: Path) -> dict[str, Any]:
    path = folder / HEADER
    if not path.exists():
        raise ValueError(
            f"token files: {str(folder)!r} holds none (no {HEADER}); wanted a folder that "
            "experiments.prepare_tokens has finished"
        )
    try:
        header = json.loads(read_text(path))
        fields = {"vocab_size": int, "characters": int, "tokenizer_sha256": str} | {
            name + suffix: kind
            for name in ("tokens", "documents")
            for suffix, kind in {"": int, "_bytes": int, "_sample": str, "_sha256": str}.items()
        }
        if wrong := [name for name, kind in fields.items() if type(header[name]) is not kind]:
            raise ValueError(f"{wrong[0]} is {header[wrong[0]]!r}")
    except (ValueError, KeyError, TypeError) as error:
        raise _damaged(folder, HEADER, f"a header that cannot be read ({error})") from error
    if header.get("format") != FORMAT:
        raise _damaged(folder, HEADER, f"format {header.get('format')!r}, wanted {FORMAT}")
    return header


def _opened(folder: Path, name: str, header: dict[str, Any], dtype: np.dtype) -> ArrayFile:
    """The array in a file; ValueError unless it is what the header says."""
    path, stem = folder / name, Path(name).stem
    size, length = path.stat().st_size, header[stem]
    if size != header[f"{stem}_bytes"]:
        raise _damaged(folder, name, f"{size} bytes, wanted {header[f'{stem}_bytes']}: truncated?")
    try:
        array = ArrayFile.open(path)
    except ValueError as error:
        raise _damaged(folder, name, f"a file that NumPy cannot read ({error})") from error
    if array.dtype != dtype or array.shape != (length,):
        what = f"{array.dtype}{list(array.shape)}, wanted {dtype}[{length}]"
        raise _damaged(folder, name, what)
    if _sample(path) != header[f"{stem}_sample"]:
        raise _damaged(folder, name, "other content than when it was made")
    return array


def _sample(path: Path) -> str:
    """A checksum of blocks spread evenly over a file, the first and the last among them."""
    digest = hashlib.sha256()
    with open(path, "rb") as file:
        last = max(os.fstat(file.fileno()).st_size - SAMPLE_BYTES, 0)
        for block in range(SAMPLES):
            file.seek(last * block // (SAMPLES - 1))
            digest.update(file.read(SAMPLE_BYTES))
    return digest.hexdigest()


def _state(path: Path) -> tuple[int, ...]:
    """What changes where a file does; empty where there is none."""
    try:
        found = path.stat()
    except OSError:
        return ()
    return found.st_size, found.st_mtime_ns, found.st_ino


def _damaged(folder: Path, name: str, found: str) -> ValueError:
    return ValueError(
        f"token files: {name} in {str(folder)!r} is not as it was made: {found}. Make the folder "
        "again with experiments.prepare_tokens, or take a good copy"
    )


def _sha256(data: bytes) -> str:
    return hashlib.sha256(data).hexdigest()
