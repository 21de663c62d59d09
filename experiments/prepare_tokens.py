r"""Texts, JSON lines or parquet as a folder of tokens, from which a run reads what it needs.

python -m experiments.prepare_tokens --input="texts/*.txt" --tokenizer=bpe --out=tokens/texts
python -m experiments.prepare_tokens --input=web.jsonl --field=text --tokenizer=my/gpt2 \
    --end_of_document="<|endoftext|>" --out=tokens/web
python -m experiments.train --config.data.corpus=token_files --config.data.path=tokens/web

An input is a file, a folder or a glob; its name says what it is: .jsonl and .ndjson have an object
a line, .parquet a row a document, and all else is text, in UTF-8. What was interrupted goes on with
the same flags, and on a finished folder they verify its checksums. The tokens do not depend on the
number of workers.
"""

import os
import sys
import time
from pathlib import Path

from absl import flags

from experiments import cli
from qkv_jax import data, interop
from qkv_jax.data.document_files import Part
from qkv_jax.data.files import matching_files
from qkv_jax.data.token_writing import tokenizer_for

INPUT = flags.DEFINE_multi_string("input", [], "a file, folder or glob; may be given several times")
OUT = flags.DEFINE_string("out", None, "the folder to write")
TOKENIZER = flags.DEFINE_string(
    "tokenizer", "bpe", f"{' | '.join(data.TOKENIZERS)}, made for the input; the tokenizer.json of "
    "a run; or a folder of Hugging Face's, or owner/name on its hub",
)  # fmt: skip
VOCAB_SIZE = flags.DEFINE_integer("vocab_size", 4096, "bpe, unigram, mecab: entries to train", 1)
TOKENIZER_PATH = flags.DEFINE_string("tokenizer_path", None, "bpe, unigram: load this file instead")
TOKENIZER_MB = flags.DEFINE_integer(
    "tokenizer_mb", 100, "of the input, from all over it, that bpe, unigram and mecab learn from", 1
)
FIELD = flags.DEFINE_string(
    "field", "text", "JSON lines, parquet: the field with a document's text"
)
SEPARATOR = flags.DEFINE_string(
    "separator", None, "texts: the line between two documents; default: a file is one document"
)
END_OF_DOCUMENT = flags.DEFINE_string(
    "end_of_document", "\n", "the text that follows each document, such as <|endoftext|>"
)
WORKERS = flags.DEFINE_integer("workers", os.cpu_count(), "processes", 1)
PART_MB = flags.DEFINE_integer("part_mb", 16, "of the input that a process reads at once", 1)
SECONDS = 5.0  # between two lines of progress in a file


def main(_) -> None:
    started = time.perf_counter()
    with cli.one_sentence():
        if not INPUT.value:
            raise ValueError("input: wanted a file, folder or glob, got none")
        if not OUT.value:
            raise ValueError("out: wanted a folder to write, got none")
        paths = [path for given in INPUT.value for path in matching_files("input", given)]
        reading = data.Reading(
            field=FIELD.value, separator=SEPARATOR.value, end_of_document=END_OF_DOCUMENT.value,
            part_bytes=PART_MB.value * 2**20,
        )  # fmt: skip
        show = Shown(sum(path.stat().st_size for path in paths))
        files = data.write_token_files(
            paths, OUT.value, lambda parts: make_tokenizer(parts, reading),
            named=f"{TOKENIZER.value}, {VOCAB_SIZE.value}, {TOKENIZER_PATH.value}, "
            f"{TOKENIZER_MB.value} MB",
            reading=reading, workers=WORKERS.value, progress=show,
        )  # fmt: skip
    tokenizer, seconds = files.tokenizer, time.perf_counter() - started
    end = len(tokenizer.encode(END_OF_DOCUMENT.value))
    print(f"{files.source}, {files.characters:,} characters, {files.tokens.dtype}")
    print(f"tokenizer: {tokenizer.name}, {tokenizer.vocab_size:,} ids; {end} end a document")
    how = "written" if show.begun else "finished before; verified"
    print(f"{how} in {seconds:.1f} s; sha256 {files.sha256[:12]}")


def make_tokenizer(parts: list[Part], reading: data.Reading) -> data.Tokenizer:
    """The tokenizer that the flags name.

    Raises:
        ValueError: there is none of that name, or it cannot be made.
    """
    name = TOKENIZER.value
    if name not in data.TOKENIZERS and not Path(name).expanduser().is_file():
        name = str(interop.folder_of(name))
    return tokenizer_for(
        parts, reading, name, vocab_size=VOCAB_SIZE.value, path=TOKENIZER_PATH.value,
        sample_bytes=TOKENIZER_MB.value * 2**20,
    )  # fmt: skip


class Shown:
    """A line about how far it is: one that changes on a terminal, another at times in a file."""

    def __init__(self, size: int):
        self.begun = False
        self._megabytes = size / 1e6
        self._done_before = 0
        self._started = self._last = time.perf_counter()

    def __call__(self, done: int, parts: int, tokens: int) -> None:
        now, terminal = time.perf_counter(), sys.stdout.isatty()
        if not self.begun:  # what was done before took no time
            self.begun, self._done_before, self._started = True, done, now
        if not (terminal or done in (0, parts) or now - self._last > SECONDS):
            return
        self._last = now
        share, seconds = (done - self._done_before) / parts, max(now - self._started, 1e-3)
        line = (
            f"part {done}/{parts}  {tokens:,} tokens  {share * self._megabytes / seconds:.1f} MB/s"
        )
        end = "" if terminal and done < parts else "\n"
        print(f"\r{line}\033[K" if terminal else line, end=end, flush=True)


if __name__ == "__main__":
    sys.exit(cli.run(main))
