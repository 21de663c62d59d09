"""Words of Japanese, which has no spaces between them: MeCab's, with its IPA dictionary."""

from collections import Counter
from collections.abc import Iterator, Sequence
from typing import Any

import numpy as np

from qkv_jax.data.tokenizers import Tokenizer, checked_ids, needed, refuse_path

BYTES = 256
DICTIONARIES = ("ipadic", "unidic_lite")  # packages that carry one for MeCab


class MecabTokenizer(Tokenizer):
    """The words that MeCab finds, the frequent ones an id each; the others are their UTF-8 bytes.

    Needs the packages `fugashi` and `ipadic`.
    Source: Kudo et al. 2004, Applying Conditional Random Fields to Japanese Morphological Analysis.

    Args:
        words: those that are one id, without repetition.
    """

    name = "mecab"

    def __init__(self, words: Sequence[str]):
        self._tagger = mecab_tagger("ipadic")
        self.words = tuple(words)
        self._ids = {word: BYTES + i for i, word in enumerate(self.words)}
        if len(self._ids) < len(self.words):
            raise ValueError("mecab: words has one of them twice; wanted each once")
        pieces = [*(bytes([byte]) for byte in range(BYTES)), *(w.encode() for w in self.words)]
        self._bytes = np.array(pieces, object)

    @classmethod
    def build(cls, text, vocab_size, path):
        refuse_path(cls.name, path)
        return cls.train(text, vocab_size)

    @classmethod
    def train(cls, text: str, vocab_size: int) -> "MecabTokenizer":
        """The most frequent words of `text` beside the 256 bytes; fewer where it has no more."""
        if vocab_size <= BYTES:
            raise ValueError(f"mecab: vocab_size is {vocab_size}; wanted > 256, one for each byte")
        counts = Counter(cls(())._split(text))
        ordered = sorted(counts, key=lambda word: (-counts[word], word))
        return cls(ordered[: vocab_size - BYTES])

    @property
    def vocab_size(self) -> int:
        return BYTES + len(self.words)

    def encode(self, text: str) -> np.ndarray:
        ids: list[int] = []
        for word in self._split(text):
            known = self._ids.get(word)
            ids.extend(word.encode() if known is None else [known])
        return np.asarray(ids, np.int32)

    def decode(self, ids: np.ndarray) -> str:
        """The text of ids; bytes that are no UTF-8 decode as U+FFFD."""
        return b"".join(self._pieces(ids)).decode("utf-8", "replace")

    def _pieces(self, ids: np.ndarray) -> list[bytes]:
        return self._bytes[checked_ids(ids, self.vocab_size)].tolist()

    def _split(self, text: str) -> Iterator[str]:
        """The words, and what stands between them, in order: together they are the text."""
        for line in text.splitlines(keepends=True):
            body = line.rstrip()
            words = [
                part
                for word in self._tagger(body)
                for part in (word.white_space, word.surface)
                if part
            ]
            # MeCab ends a text at a null character.
            yield from words if "".join(words) == body else [body]
            if len(body) < len(line):
                yield line[len(body) :]

    def _state(self) -> dict[str, Any]:
        return {"words": list(self.words)}

    @classmethod
    def _from_state(cls, state: dict[str, Any]) -> "MecabTokenizer":
        words = state.get("words")
        if not isinstance(words, list) or not all(isinstance(word, str) for word in words):
            raise ValueError("tokenizer JSON of 'mecab' has no list of strings 'words'")
        return cls(words)


def mecab_tagger(dictionary: str, options: str = "") -> Any:
    """MeCab by fugashi: called with a text it gives words, each with its `surface`.

    Args:
        dictionary: one of `DICTIONARIES`.
        options: more of MeCab's own, as on its command line.

    Raises:
        ValueError: another dictionary.
        ImportError: naming the package to install.
    """
    if dictionary not in DICTIONARIES:
        raise ValueError(
            f"mecab: dictionary is {dictionary!r}; wanted one of: {', '.join(DICTIONARIES)}"
        )
    folder = needed("mecab", dictionary).DICDIR
    arguments = f'-d "{folder}" -r "{folder}/mecabrc" {options}'
    return needed("mecab", "fugashi").GenericTagger(arguments)
