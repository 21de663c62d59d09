"""Corpora: the text a language model learns from.

`python_docs` is what every Python carries, so that a fresh machine needs no download; `text_file`
is one's own, and `aozora` one of Aozora Bunko's.
"""

import ast
import contextlib
import gc
import hashlib
import json
import os
import platform
import re
import sys
import sysconfig
import unicodedata
import warnings
from collections.abc import Iterable, Iterator
from dataclasses import dataclass
from pathlib import Path

from qkv_jax.data.aozora import aozora_text
from qkv_jax.data.files import matching_files, read_text, write_atomically

CORPORA = ("python_docs", "text_file", "aozora")

PYTHON_DOCS_FORMAT = 2  # raise it when what is cached changes: the cache's key has it
PIECE_LENGTH = 4096  # characters; documents longer than this are cut between paragraphs
MIN_LETTERS = 0.65  # of a paragraph's visible characters: less is a table, a doctest, a picture

_SKIPPED_FOLDERS = {"test", "tests", "idle_test", "site-packages", "dist-packages", "__pycache__"}
_BLOCKS = ("body", "handlers", "orelse", "finalbody", "cases")
_DOCUMENTED = (ast.Module, ast.ClassDef, ast.FunctionDef, ast.AsyncFunctionDef)
_DRAWING = re.compile(r"\s*[^\w\s]{3,}")  # an underline, a rule, a frame
_NOT_WORDS = re.compile(r"'[^'\n]*'|\w*[0-9_]\w*|[^A-Za-z]")  # quoted or compound names; signs
_TYPOGRAPHY = str.maketrans(
    {"‘": "'", "’": "'", "´": "'", "“": '"', "”": '"', "–": "-", "—": "--", "…": "...", "ß": "ss"}
)


@dataclass(frozen=True)
class Corpus:
    """A text and where it comes from.

    Attributes:
        name: how a config calls it.
        text: the whole text.
        sha256: of the text's UTF-8 bytes, in hexadecimal.
        source: a line for a person: what the text is, and of which version.
    """

    name: str
    text: str
    sha256: str
    source: str

    @property
    def characters(self) -> int:
        """How long the text is."""
        return len(self.text)


def load_corpus(name: str, path: str | os.PathLike | None = None) -> Corpus:
    """The corpus called `name`, one of `CORPORA`.

    Args:
        name: "python_docs", "text_file" or "aozora", which reads as "text_file" does and takes from
            each text what `aozora_text` takes.
        path: what the last two read; "python_docs" takes none.

    Raises:
        ValueError: an unknown name, a missing path, a path that would be ignored, or bad files.
    """
    _check(name, path)
    return python_docs() if name == "python_docs" else _of_files(name, path)


def text_file(path: str | os.PathLike) -> Corpus:
    """The text of one file, of the files a glob matches, or of a directory's files.

    A glob may hold `**`. A directory stands for every regular file below it, hidden ones and those
    in hidden folders aside; a file there that is not text is an error, so where text files are not
    alone, name them with a glob. Several files are read in the order of their sorted paths and
    joined by a newline. UTF-8, with or without a byte-order mark; `\\r\\n` becomes `\\n`.

    Args:
        path: of the file or directory, or a glob.

    Raises:
        ValueError: nothing at `path`, or a file that is empty, binary, not UTF-8 or unreadable.
    """
    return _of_files("text_file", path)


def python_docs() -> Corpus:
    """The Python language reference and the standard library's docstrings, about 2 MB of English.

    The reference is `pydoc_data.topics`; the docstrings are those of the modules, classes and
    functions in the standard library's sources, tests left out, parsed and never imported or run.

    What is done to the text, so that a small model can learn it and a split by position is fair:

    - Characters: typographic quotes and dashes become ASCII, other letters lose their accents
      (Unicode's NFKD form), and what is still neither printable ASCII nor a newline becomes "?".
      At most 96 different characters remain.
    - Paragraphs: those that are not mostly letters (tables, doctests) are dropped, underlines too,
      and each that repeats the words of an earlier one (signs, case and names that are quoted or
      compound aside).
    - Order: documents are cut into pieces of about `PIECE_LENGTH` characters, ordered by a hash of
      their names. So the last 10 % is of the same kind as the rest and repeats nothing of it.

    The text is a function of the Python version and of what its distribution ships: results should
    give `sha256`. Parsing takes about two seconds, so the text is kept in `$XDG_CACHE_HOME/qkv_jax`
    (else `~/.cache/qkv_jax`).

    Raises:
        ValueError: this Python has no sources of its standard library.
    """
    text = _joined(_cached_pieces())
    version = f"Python {platform.python_version()}"
    source = f"{version}: language reference and standard-library docstrings"
    return Corpus("python_docs", text, _sha256(text), source)


def documents(name: str, path: str | os.PathLike | None = None) -> dict[str, str]:
    """The texts that a corpus is made of, by name.

    Those of "python_docs" are the topics of the language reference, such as "topic assert", and the
    docstrings of each source file, such as "json/decoder.py", after all that `python_docs` does to
    them but cutting; those of the others are their files.

    Args:
        name: one of `CORPORA`.
        path: as for `load_corpus`.

    Raises:
        ValueError: as for `load_corpus`.
    """
    _check(name, path)
    if name != "python_docs":
        return dict(_read_files(name, path))
    texts: dict[str, list[str]] = {}
    for piece, text in _cached_pieces().items():
        texts.setdefault(piece.rpartition(":")[0], []).append(text)
    return {name: "\n\n".join(of_one) for name, of_one in texts.items()}


def _check(name: str, path: str | os.PathLike | None) -> None:
    if name not in CORPORA:
        raise ValueError(f"corpus {name!r} is unknown; wanted one of: {', '.join(CORPORA)}")
    if name != "python_docs":
        if path is None or not str(path):
            raise ValueError(
                f"corpus {name!r} needs a path: one file, a glob, or a directory of text files"
            )
        return
    if path is not None:
        raise ValueError(
            f"corpus {name!r} takes no path, got {str(path)!r}; wanted corpus 'text_file'?"
        )


# --- text_file, aozora ---------------------------------------------------------------------------


def _of_files(name: str, path: str | os.PathLike) -> Corpus:
    texts = [text for _, text in _read_files(name, path)]
    text = "\n".join(texts)
    count = "1 file" if len(texts) == 1 else f"{len(texts)} files"
    return Corpus(name, text, _sha256(text), f"{os.fspath(path)} ({count})")


def _read_files(name: str, path: str | os.PathLike) -> Iterator[tuple[str, str]]:
    """(path, text) of each file."""
    for file in matching_files(name, path):
        text = read_text(file, what=f"{name}:")
        text = aozora_text(text) if name == "aozora" else text
        if not text.strip():
            raise ValueError(f"{name}: {str(file)!r} is empty; wanted a file with text in it")
        yield str(file), text


# --- python_docs ---------------------------------------------------------------------------------


def _cached_pieces() -> dict[str, str]:
    """The pieces of this Python's documentation, from the cache or else from its sources."""
    folder = Path(sysconfig.get_path("stdlib"))
    cache = _cache_path(folder)
    kept = _read_cache(cache)
    if kept is not None:
        return json.loads(kept)
    pieces = _python_docs_pieces(folder)
    if len(_joined(pieces)) < 100_000:
        raise ValueError(
            f"corpus 'python_docs' found no sources of the standard library in {str(folder)!r}"
            "; use corpus 'text_file' with a path to a text of your own"
        )
    _write_cache(cache, json.dumps(pieces))
    return pieces


def _joined(pieces: dict[str, str]) -> str:
    """The text of `python_docs`: the pieces in the order of a hash of their names."""
    return "\n\n".join(pieces[name] for name in sorted(pieces, key=_sha256)) + "\n"


def _python_docs_pieces(folder: Path) -> dict[str, str]:
    """The text of the standard library's sources in `folder`: "name:number" -> piece."""
    seen = {""}  # a paragraph without words is no news
    pieces = {}
    with _without_garbage_collection(), warnings.catch_warnings():
        warnings.simplefilter("ignore")  # invalid escapes in old sources are not ours to report
        for name, paragraphs in _documents(folder):
            kept = [p for p in map(_cleaned, paragraphs) if _is_prose(p) and _is_new(p, seen)]
            for index, piece in enumerate(_pieces(kept)):
                pieces[f"{name}:{index}"] = piece
    return pieces


def _documents(folder: Path) -> Iterator[tuple[str, list[str]]]:
    """(name, paragraphs) of the language reference's topics, then of each source file, by name."""
    for name, text in sorted(_topics(folder / "pydoc_data" / "topics.py").items()):
        yield f"topic {name}", _paragraphs([text])
    for path in _source_files(folder):
        if tree := _parse(path):
            name = path.relative_to(folder).as_posix()
            yield name, _paragraphs(_docstrings(tree))


@contextlib.contextmanager
def _without_garbage_collection() -> Iterator[None]:
    """Syntax trees have no cycles; with JAX loaded, searching for some takes 1.4 of 3.5 seconds."""
    was_enabled = gc.isenabled()
    gc.disable()
    try:
        yield
    finally:
        if was_enabled:
            gc.enable()


def _topics(path: Path) -> dict[str, str]:
    """The literal dict `topics` of pydoc's data; empty where a distribution left it out."""
    tree = _parse(path)
    for statement in tree.body if tree else ():
        if isinstance(statement, ast.Assign) and ast.unparse(statement.targets[0]) == "topics":
            return ast.literal_eval(statement.value)
    return {}


def _source_files(folder: Path) -> list[Path]:
    files = []
    for parent, folders, names in os.walk(folder):
        folders[:] = [name for name in folders if name not in _SKIPPED_FOLDERS]
        files += [Path(parent, name) for name in names if name.endswith(".py")]
    return sorted(files, key=lambda path: path.relative_to(folder).as_posix())


def _parse(path: Path) -> ast.Module | None:
    try:
        return ast.parse(path.read_bytes())
    except (OSError, SyntaxError, ValueError):  # absent, Python 2 by design, or not decodable
        return None


def _docstrings(node: ast.AST) -> Iterator[str]:
    """Docstrings of a module and all that it defines, in the order of the source."""
    if isinstance(node, _DOCUMENTED) and (text := ast.get_docstring(node)):
        yield text
    for block in _BLOCKS:  # definitions hide in no expression
        for child in getattr(node, block, ()):
            yield from _docstrings(child)


def _paragraphs(texts: Iterable[str]) -> list[str]:
    return [p for text in texts for p in re.split(r"\n\s*\n", _ascii(text).strip("\n"))]


def _ascii(text: str) -> str:
    if not text.isascii():
        text = unicodedata.normalize("NFKD", text.translate(_TYPOGRAPHY))
        text = "".join(c for c in text if not unicodedata.combining(c))
    return re.sub(r"[^ -~\n]", "?", text.expandtabs())


def _cleaned(paragraph: str) -> str:
    """Without spaces at the ends of lines, and without lines that only draw."""
    lines = (line.rstrip() for line in paragraph.split("\n"))
    return "\n".join(line for line in lines if line and not _DRAWING.fullmatch(line))


def _is_prose(paragraph: str) -> bool:
    visible = "".join(paragraph.split())
    letters = len(re.sub(r"[^A-Za-z]", "", visible))
    return letters > MIN_LETTERS * len(visible)


def _is_new(paragraph: str, seen: set[str]) -> bool:
    """Whether no paragraph had these words before; remembers them."""
    words = " ".join(_NOT_WORDS.sub(" ", paragraph).lower().split())
    if words in seen:
        return False
    seen.add(words)
    return True


def _pieces(paragraphs: list[str]) -> Iterator[str]:
    """Consecutive paragraphs joined by blank lines, each piece ending once it is long enough."""
    piece: list[str] = []
    for paragraph in paragraphs:
        piece.append(paragraph)
        if sum(map(len, piece)) >= PIECE_LENGTH:
            yield "\n\n".join(piece)
            piece = []
    if piece:
        yield "\n\n".join(piece)


# --- the cache of python_docs: a help, never a reason to fail ------------------------------------


def _cache_path(folder: Path) -> Path | None:
    root = os.environ.get("XDG_CACHE_HOME", "")
    try:
        root = Path(root) if os.path.isabs(root) else Path.home() / ".cache"
    except RuntimeError:  # a user without a home
        return None
    key = _sha256(f"{sys.version}\n{folder}\n{PYTHON_DOCS_FORMAT}")[:16]
    return root / "qkv_jax" / f"python_docs-{key}.json"


def _read_cache(path: Path | None) -> str | None:
    """The text under the sha256 on the file's first line, or None where the two do not agree."""
    try:
        digest, text = path.read_bytes().decode("ascii").split("\n", 1)
    except (AttributeError, OSError, ValueError):
        return None
    return text if digest == _sha256(text) else None


def _write_cache(path: Path | None, text: str) -> None:
    if path is None:
        return
    with contextlib.suppress(OSError):
        path.parent.mkdir(parents=True, exist_ok=True)
        write_atomically(path, f"{_sha256(text)}\n{text}".encode("ascii"))


def _sha256(text: str) -> str:
    return hashlib.sha256(text.encode("utf-8")).hexdigest()
