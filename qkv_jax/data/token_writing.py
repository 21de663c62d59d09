"""Making a folder of token files: in parallel, and where it was interrupted it goes on.

Each part of the input becomes a file of its own, which is there whole or not at all; when all are
there they are joined, in the order of the input, and the header comes last. What is in the folder
in the end depends neither on the number of processes nor on what was interrupted when.
"""

import dataclasses
import hashlib
import io
import itertools
import json
import multiprocessing
import os
import shutil
import threading
from collections.abc import Callable, Iterable, Iterator, Sequence
from concurrent.futures import ProcessPoolExecutor, as_completed
from concurrent.futures.process import BrokenProcessPool
from pathlib import Path
from typing import Any

import numpy as np

from qkv_jax.data.batches import pack_tokens, token_dtype
from qkv_jax.data.document_files import Part, Piece, parts_of, pieces_of
from qkv_jax.data.files import read_text, write_atomically
from qkv_jax.data.pretrained import pretrained_tokenizer
from qkv_jax.data.token_files import (
    DOCUMENTS,
    FORMAT,
    HEADER,
    TOKENIZER,
    TOKENS,
    TokenFiles,
    file_facts,
)
from qkv_jax.data.tokenizers import (
    TOKENIZERS,
    Tokenizer,
    build_tokenizer,
    read_json,
    refuse_path,
)

WORK = ".unfinished"  # the folder, in that of the token files, of what is not joined yet
PLAN = "plan.json"
Progress = Callable[[int, int, int], None]  # (parts that are done, all parts, tokens so far)


@dataclasses.dataclass(frozen=True)
class Reading:
    """How documents are read, and what is put behind each.

    Attributes:
        field, separator: as for `pieces_of`.
        end_of_document: a text, which is encoded by itself.
        part_bytes: of the input that become one file: what a process holds in memory.
    """

    field: str = "text"
    separator: str | None = None
    end_of_document: str = "\n"
    part_bytes: int = 2**24

    def pieces(self, part: Part) -> Iterator[Piece]:
        """The documents of a part."""
        return pieces_of(part, field=self.field, separator=self.separator)


def write_token_files(
    inputs: Sequence[Path],
    folder: str | os.PathLike,
    make_tokenizer: Callable[[list[Part]], Tokenizer],
    *,
    named: str,
    reading: Reading = Reading(),
    workers: int = 1,
    progress: Progress = lambda done, parts, tokens: None,
) -> TokenFiles:
    """Token files of texts, JSON lines and parquet; of a finished folder, what is there, verified.

    Args:
        inputs: the files, in the order of the tokens.
        folder: where to; what an interrupted call left there is used.
        make_tokenizer: makes the tokenizer from the input's parts, unless it is there already.
        named: what determines the tokenizer, for the comparison with an interrupted call.
        reading: how the files are read.
        workers: processes; 1: this one.
        progress: is called at first, and after each part.

    Raises:
        ValueError: an input is not as it should be, or the folder has been begun or finished with
            other input or other settings.
    """
    folder = Path(folder).expanduser()
    plan = _plan(inputs, named, reading)
    if (folder / HEADER).exists():
        files = TokenFiles.open(folder)
        _check_same(folder, files.header["made_of"], plan)
        files.verify()
        shutil.rmtree(folder / WORK, ignore_errors=True)
        return files
    parts, work = parts_of(inputs, reading.part_bytes), folder / WORK
    if not parts:
        raise ValueError("inputs: wanted some text, got none: there is no row in any of them")
    work.mkdir(parents=True, exist_ok=True)
    if (work / PLAN).exists():
        _check_same(folder, json.loads(read_text(work / PLAN)), plan)
    else:  # in this order: where there is a plan, there is a tokenizer
        make_tokenizer(parts).save(folder / TOKENIZER)
        write_atomically(work / PLAN, json.dumps(plan).encode("utf-8"))
    _write_parts(parts, folder, reading, workers, progress)
    _join(folder, [work / _name(number) for number in range(len(parts))], plan)
    shutil.rmtree(work)
    return TokenFiles.open(folder)


def tokenizer_for(
    parts: Sequence[Part],
    reading: Reading,
    name: str,
    *,
    vocab_size: int,
    path: str | None,
    sample_bytes: int,
) -> Tokenizer:
    """The tokenizer called `name`, for some input.

    Args:
        parts: of the input; "char" reads all of it.
        reading: how it is read.
        name: one of `TOKENIZERS`; or a file of `Tokenizer.save`, or a folder as for
            `pretrained_tokenizer`.
        vocab_size, path: as for `build_tokenizer`.
        sample_bytes: of the input, from all over it, that "bpe", "unigram" and "mecab" learn from.

    Raises:
        ValueError: there is none of that name, or it cannot be made.
    """
    if name not in TOKENIZERS:
        if path is not None:
            refuse_path(name, path)
        found = Path(name).expanduser()
        return Tokenizer.load(found) if found.is_file() else pretrained_tokenizer(found)
    text = ""
    if name == "char":
        text = all_characters(parts, reading)
    elif name != "byte" and path is None:
        text = sample_text(parts, reading, sample_bytes)
    return build_tokenizer(name, text, vocab_size=vocab_size, path=path)


def sample_text(parts: Sequence[Part], reading: Reading, most_bytes: int) -> str:
    """A text of about so many bytes, the beginnings of all parts, for a tokenizer to learn from."""
    share = -(-most_bytes // len(parts))

    def beginning(part: Part) -> Iterator[str]:
        length = 0
        for piece in reading.pieces(part):
            text = piece.text + (reading.end_of_document if piece.ends else "")
            yield text[: share - length]
            length += len(text)
            if length >= share:
                return

    return "".join(itertools.chain.from_iterable(map(beginning, parts)))


def all_characters(parts: Iterable[Part], reading: Reading) -> str:
    """Every character of the parts, and of what is put behind documents, once."""
    found = set(reading.end_of_document)
    for part in parts:
        for piece in reading.pieces(part):
            found.update(piece.text)
    return "".join(sorted(found))


def _plan(inputs: Sequence[Path], named: str, reading: Reading) -> dict[str, Any]:
    """All that determines the tokens, as JSON has it."""
    try:
        found = [(str(path), path.stat()) for path in map(Path, inputs)]
    except OSError as error:
        raise ValueError(f"{error.filename!r} cannot be read: {error.strerror}") from error
    return {
        "inputs": [[path, state.st_size, state.st_mtime_ns] for path, state in found],
        "tokenizer": named,
        **dataclasses.asdict(reading),
    }


def _check_same(folder: Path, before: dict[str, Any], plan: dict[str, Any]) -> None:
    if different := [name for name in plan if before.get(name) != plan[name]]:
        name = different[0]
        what = "input, which may have changed" if name == "inputs" else name
        raise ValueError(
            f"folder: {str(folder)!r} holds token files of another {what} "
            f"({_short(before.get(name))}, now {_short(plan[name])}); choose another folder, or "
            "remove that one"
        )


def _short(value: Any) -> str:
    text = json.dumps(value, ensure_ascii=False)
    return text if len(text) <= 200 else f"{text[:200]}..."


def _name(number: int) -> str:
    return f"{number:06}.npz"


# --- One part ------------------------------------------------------------------------------------


def _write_parts(
    parts: list[Part],
    folder: Path,
    reading: Reading,
    workers: int,
    progress: Progress,
) -> None:
    """Writes the parts that are not there yet."""
    paths = [folder / WORK / _name(number) for number in range(len(parts))]
    done = [path for path in paths if path.exists()]
    tokens = sum(int(_counts(path)[0]) for path in done)
    missing = [job for job in zip(parts, paths, strict=True) if not job[1].exists()]
    progress(len(done), len(parts), tokens)
    for number, counted in enumerate(_counted(missing, folder, reading, workers), len(done) + 1):
        tokens += counted
        progress(number, len(parts), tokens)


def _counted(
    jobs: list[tuple[Part, Path]], folder: Path, reading: Reading, workers: int
) -> Iterator[int]:
    """Writes parts; the number of tokens of each, in whatever order they come."""
    if workers == 1 or len(jobs) <= 1:
        _use_tokenizer(folder / TOKENIZER)
        for part, path in jobs:
            yield _write_part(part, path, reading)
        return
    # A forked process would inherit locks that threads of this one hold.
    with ProcessPoolExecutor(
        min(workers, len(jobs)),
        mp_context=multiprocessing.get_context("spawn"),
        initializer=_begin_process,
        initargs=(folder / TOKENIZER,),
    ) as pool:
        futures = [pool.submit(_write_part, part, path, reading) for part, path in jobs]
        try:
            for future in as_completed(futures):
                yield future.result()
        except BrokenProcessPool as error:
            raise ValueError(
                "workers: one of the processes was ended from outside, perhaps for want of memory; "
                "the same call goes on where it stopped, and fewer workers need less"
            ) from error
        except BaseException:
            pool.shutdown(wait=False, cancel_futures=True)
            raise


_tokenizer: Tokenizer  # of this process


def _begin_process(path: Path) -> None:
    """What each process of the pool begins with."""

    def follow() -> None:  # the pool of a process that was killed would wait for ever
        multiprocessing.parent_process().join()
        os._exit(1)

    threading.Thread(target=follow, daemon=True).start()
    _use_tokenizer(path)


def _use_tokenizer(path: Path) -> None:
    global _tokenizer
    _tokenizer = Tokenizer.load(path)


def _write_part(part: Part, path: Path, reading: Reading) -> int:
    """Encodes a part into a file: its tokens, and where documents begin among them."""
    size, encode = _tokenizer.vocab_size, _tokenizer.encode
    end = pack_tokens(encode(reading.end_of_document), size)
    runs, begins = [np.zeros(0, token_dtype(size))], []
    length = characters = 0
    for piece in reading.pieces(part):
        if piece.begins:
            begins.append(length)
        try:
            ids = pack_tokens(encode(piece.text), size)
        except ValueError as error:
            raise ValueError(f"{part.path!r}: {error}") from error
        new = [ids, end] if piece.ends else [ids]
        runs += new
        length += sum(map(len, new))
        characters += len(piece.text) + (len(reading.end_of_document) if piece.ends else 0)
    written = io.BytesIO()
    np.savez(
        written,
        tokens=np.concatenate(runs),
        documents=np.array(begins, np.int64),
        counts=np.array([length, len(begins), characters], np.int64),
    )
    write_atomically(path, written.getvalue())
    return length


def _counts(path: Path) -> np.ndarray:
    """Tokens, documents and characters of a part that is written."""
    with np.load(path) as part:
        return part["counts"]


# --- All of them ---------------------------------------------------------------------------------


def _join(folder: Path, paths: list[Path], plan: dict[str, Any]) -> None:
    """Writes the arrays of all parts into one file each, and the header."""
    counts = np.array([_counts(path) for path in paths])
    length, documents, characters = (int(total) for total in counts.sum(0))
    if length == 0:
        raise ValueError("inputs: wanted some text, got none: every document is empty")
    offsets = np.cumsum(counts[:, 0]) - counts[:, 0]

    def parts(name: str) -> Iterator[np.ndarray]:
        for path, offset in zip(paths, offsets, strict=True):
            with np.load(path) as part:
                yield part[name] + offset if name == "documents" else part[name]

    tokenizer = read_json(folder / TOKENIZER)
    vocab_size = Tokenizer.from_json(tokenizer).vocab_size
    header = {
        "format": FORMAT,
        "vocab_size": vocab_size,
        "characters": characters,
        "tokenizer_sha256": hashlib.sha256(tokenizer.encode("utf-8")).hexdigest(),
        **_write_array(folder / TOKENS, parts("tokens"), token_dtype(vocab_size), length),
        **_write_array(folder / DOCUMENTS, parts("documents"), np.dtype(np.int64), documents),
        "made_of": plan,
    }
    write_atomically(folder / HEADER, json.dumps(header, indent=2).encode("utf-8"))


def _write_array(
    path: Path, parts: Iterable[np.ndarray], dtype: np.dtype, length: int
) -> dict[str, Any]:
    """Writes a file in NumPy's format, part by part; returns what the header tells of it."""
    head = {
        "descr": np.lib.format.dtype_to_descr(dtype), "fortran_order": False, "shape": (length,),
    }  # fmt: skip
    digest, temporary, buffer = hashlib.sha256(), path.with_name(f".{path.name}"), io.BytesIO()
    np.lib.format.write_array_header_1_0(buffer, head)
    with open(temporary, "wb") as file:
        for data in itertools.chain([buffer.getvalue()], parts):
            file.write(data)
            digest.update(data)
        file.flush()
        os.fsync(file.fileno())
    os.replace(temporary, path)
    return file_facts(path, length, digest.hexdigest())
