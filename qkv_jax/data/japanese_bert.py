"""The tokens of Japanese BERT: words, by MeCab, and pieces or characters of them."""

import itertools
import string
import unicodedata
from collections.abc import Callable, Collection, Iterator, Sequence
from typing import Any

import numpy as np

from qkv_jax.data.mecab import mecab_tagger
from qkv_jax.data.tokenizers import Tokenizer, checked_ids, needed

WORDS = ("mecab", "basic", "none")
PIECES = ("wordpiece", "character", "none")
CONTINUES = "##"  # before a piece that does not begin its word


class JapaneseBertTokenizer(Tokenizer):
    """Words of Japanese, cut into the pieces of a vocabulary; what it lacks is one unknown token.

    Gives the ids of transformers' `BertJapaneseTokenizer` for text between special tokens;
    `FramedTokenizer` adds those. Lossy: spaces, line ends and what is unknown do not come back, so
    that `decode` gives the pieces, joined.
    Source: github.com/cl-tohoku/bert-japanese; WordPiece: Schuster and Nakajima 2012.

    Args:
        vocabulary: the pieces, in the order of their ids.
        words: "mecab": MeCab's words of a text in Unicode's form NFKC; "basic": what stands between
            spaces and punctuation; "none": the text is one word.
        dictionary: of MeCab: "ipadic" or "unidic_lite".
        options: more for MeCab, as on its command line.
        normalize: whether MeCab reads the text in NFKC.
        lowercase: whether the words are lowercased ("basic": without accents).
        never_split: words that are neither lowercased nor split at punctuation.
        pieces: "wordpiece": the longest pieces that fit, from the left, of words with at most 100
            characters; "character"; or "none": whole words.
        unknown: the token for what the vocabulary lacks.

    Raises:
        ValueError: an argument that is none of these, or a vocabulary without `unknown`.
        ImportError: naming the package that MeCab or WordPiece needs.
    """

    name = "japanese_bert"

    def __init__(
        self,
        vocabulary: Sequence[str],
        *,
        words: str = "mecab",
        dictionary: str = "unidic_lite",
        options: str = "",
        normalize: bool = True,
        lowercase: bool = False,
        never_split: Collection[str] = (),
        pieces: str = "wordpiece",
        unknown: str = "[UNK]",
    ):
        self._arguments = {
            "vocabulary": list(vocabulary), "words": words, "dictionary": dictionary,
            "options": options, "normalize": normalize, "lowercase": lowercase,
            "never_split": list(never_split), "pieces": pieces, "unknown": unknown,
        }  # fmt: skip
        self.vocabulary = tuple(vocabulary)
        self._ids = {piece: id for id, piece in enumerate(self.vocabulary)}
        if unknown not in self._ids:
            raise ValueError(f"vocabulary: has no {unknown!r} for what is unknown")
        self._words = self._words_by(words, dictionary, options)
        self._pieces_of = self._pieces_by(pieces)

    @property
    def vocab_size(self) -> int:
        return len(self.vocabulary)

    def encode(self, text: str) -> np.ndarray:
        return np.asarray(self._pieces_of(self._words(text)), np.int32)

    def decode(self, ids: np.ndarray) -> str:
        """The pieces of ids, joined: see above for what is lost."""
        return "".join(piece.removeprefix(CONTINUES) for piece in self.labels(ids))

    def labels(self, ids: np.ndarray) -> list[str]:
        """The pieces as the vocabulary has them: ## says that the word goes on."""
        return [self.vocabulary[id] for id in checked_ids(ids, self.vocab_size)]

    def _words_by(self, kind: str, dictionary: str, options: str) -> Callable[[str], list[str]]:
        normalize, lowercase, kept = (
            self._arguments[name] for name in ("normalize", "lowercase", "never_split")
        )
        if kind == "mecab":
            tagger = mecab_tagger(dictionary, options)

            def words(text: str) -> list[str]:
                found = tagger(unicodedata.normalize("NFKC", text) if normalize else text)
                return [_lowered(word.surface, lowercase, kept) for word in found]

            return words
        if kind == "basic":
            return lambda text: list(basic_words(text, lowercase=lowercase, never_split=kept))
        if kind == "none":
            return lambda text: [text]
        raise ValueError(f"words: is {kind!r}; wanted one of: {', '.join(WORDS)}")

    def _pieces_by(self, kind: str) -> Callable[[list[str]], list[int]]:
        ids, unknown = self._ids, self._arguments["unknown"]
        if kind == "wordpiece":
            library = needed(self.name, "tokenizers")
            pieces = library.Tokenizer(
                library.models.WordPiece(ids, unk_token=unknown, max_input_chars_per_word=100)
            )

            def wordpieces(words: list[str]) -> list[int]:
                parts = [part for word in words for part in word.split()]
                return pieces.encode(parts, is_pretokenized=True, add_special_tokens=False).ids

            return wordpieces
        if kind == "character":
            return lambda words: [
                ids.get(character, ids[unknown])
                for word in words
                for character in unicodedata.normalize("NFKC", word)
            ]
        if kind == "none":
            return lambda words: [ids.get(word, ids[unknown]) for word in words]
        raise ValueError(f"pieces: is {kind!r}; wanted one of: {', '.join(PIECES)}")

    def _state(self) -> dict[str, Any]:
        return self._arguments

    @classmethod
    def _from_state(cls, state: dict[str, Any]) -> "JapaneseBertTokenizer":
        arguments = {name: value for name, value in state.items() if name != "tokenizer"}
        try:
            return cls(**arguments)
        except TypeError as error:
            raise ValueError(f"tokenizer JSON of 'japanese_bert' is wrong: {error}") from error


def basic_words(text: str, *, lowercase: bool, never_split: Collection[str]) -> Iterator[str]:
    """What stands between spaces and punctuation, and each mark, as BERT's basic tokenizer cuts.

    Chinese characters are not cut from one another. Lowercasing removes accents too.
    Source: `BasicTokenizer` of github.com/google-research/bert.
    """
    cleaned = "".join(
        " " if character in "\t\n\r" or unicodedata.category(character) == "Zs" else character
        for character in text
        if character in "\t\n\r" or not _is_control(character)
    )
    for word in unicodedata.normalize("NFC", cleaned).split():
        if lowercase and word not in never_split:
            decomposed = unicodedata.normalize("NFD", word.lower())
            word = "".join(c for c in decomposed if unicodedata.category(c) != "Mn")
        if word in never_split:
            yield word
            continue
        for are_marks, run in itertools.groupby(word, _is_punctuation):
            characters = "".join(run)
            yield from characters if are_marks else [characters]


def _lowered(word: str, lowercase: bool, kept: Collection[str]) -> str:
    return word.lower() if lowercase and word not in kept else word


def _is_control(character: str) -> bool:
    return character == "\ufffd" or unicodedata.category(character).startswith("C")


def _is_punctuation(character: str) -> bool:
    return character in string.punctuation or unicodedata.category(character).startswith("P")
