"""The sentences of the walkthrough: their embeddings, and weights for each mechanism."""

import re
from typing import Any, NamedTuple

import numpy as np

from qkv_jax import data

MOST_WORDS = 12  # whose matrices fit a line of the terminal, and a picture with numbers in it
JAPANESE = re.compile(r"[\u3040-\u30ff\u3400-\u9fff\uff66-\uff9f]")  # kana and kanji

Weights = tuple[np.ndarray, ...]


class Sentence(NamedTuple):
    """A sentence with its embeddings, and weights for each mechanism that has some."""

    text: str
    name: str  # of its files
    note: str
    x: np.ndarray  # [T, D]
    w_trained: Weights  # w_query [D, H], w_key [D, H], w_value [D, h]
    w_causal: Weights  # the same
    w_heads: Weights  # w_query, w_key, w_value [D, 2 * H], w_out [2 * H, D_out], b_out [D_out]

    @property
    def tokens(self) -> list[str]:
        return words(self.text)


def words(text: str) -> list[str]:
    """What stands between spaces, and of Japanese the words that MeCab finds.

    Without the packages fugashi and ipadic, Japanese falls into characters.

    >>> words("The cat sat")
    ['The', 'cat', 'sat']
    """
    found = []
    for piece in text.split():
        found += _words_of_japanese(piece) if JAPANESE.search(piece) else [piece]
    return found


def _words_of_japanese(text: str) -> list[str]:
    try:
        tokenizer = data.MecabTokenizer.train(text, vocab_size=256 + len(text))  # has all its words
    except ImportError:
        return list(text)
    return [tokenizer.decode(token[None]) for token in tokenizer.encode(text)]


def journey() -> Sentence:
    """The book's sentence, embeddings and weights (torch.manual_seed(123), printed in full)."""
    x = [
        [0.43, 0.15, 0.89],
        [0.55, 0.87, 0.66],
        [0.57, 0.85, 0.64],
        [0.22, 0.58, 0.33],
        [0.77, 0.25, 0.10],
        [0.05, 0.80, 0.55],
    ]
    w_trained = (
        [[0.29611194, 0.51656228], [0.25167072, 0.68855679], [0.07397246, 0.86652195]],
        [[0.13657987, 0.10247904], [0.18405646, 0.72644675], [0.31525391, 0.68710667]],
        [[0.07563531, 0.19663817], [0.31641197, 0.40174013], [0.11856830, 0.82739538]],
    )
    w_causal = (
        [[-0.23542965, 0.21772663], [0.01912448, -0.49193424], [-0.28674596, 0.42322310]],
        [[-0.41964142, 0.26147818], [-0.45901767, -0.21332641], [-0.36482017, 0.21605217]],
        [[-0.49001413, -0.11346072], [-0.35029207, -0.44043939], [-0.21198919, 0.37804362]],
    )
    w_out, b_out = [[-0.16675780, 0.50002600], [0.22697258, 0.13173824]], [0.19335887, 0.68254098]
    return Sentence(
        text="Your journey starts with one step",
        name="journey",
        note="Embeddings and weights are those of the book's chapter 3: compare the numbers.",
        x=np.array(x, np.float32),
        w_trained=_arrays(*w_trained),
        w_causal=_arrays(*w_causal),
        w_heads=_arrays(*w_causal, w_out, b_out),  # the same projections, cut into two heads
    )


def cat() -> Sentence:
    """A sentence with a word in it twice; random embeddings and weights of width 4."""
    return Sentence(
        text="The cat sat on the mat",
        name="cat",
        note='Embeddings and weights are random. "The" and "the" share one embedding: attention '
        "alone gives them the same output, because it does not know where a token stands. The "
        "causal mask tells them apart.",
        **_random("The cat sat on the mat".lower().split()),
    )


def own(text: str) -> Sentence:
    """A sentence of the reader's; random embeddings and weights, as the cat's.

    Raises:
        ValueError: it has no word, or more than `MOST_WORDS`.
    """
    tokens = words(text)
    if not 1 <= len(tokens) <= MOST_WORDS:
        raise ValueError(
            f"text: wanted 1 to {MOST_WORDS} words, whose matrices fit a line; got {len(tokens)}"
        )
    return Sentence(
        text=" ".join(text.split()),
        name="own",
        note="Embeddings and weights are random; a word that comes again has the same embedding.",
        **_random([word.lower() for word in tokens]),
    )


def _random(words: list[str]) -> dict[str, Any]:
    """Embeddings of width 4, one for each different word, and weights."""
    random = np.random.RandomState(0)  # NumPy has promised never to change this stream
    embedding = {word: random.randn(4) for word in sorted(set(words))}
    w_qkv = tuple(random.randn(4, 4) / 2 for _ in range(3))
    w_out, b_out = random.randn(4, 4) / 2, np.zeros(4)
    return {
        "x": np.array([embedding[word] for word in words], np.float32),
        "w_trained": _arrays(*w_qkv),
        "w_causal": _arrays(*w_qkv),
        "w_heads": _arrays(*w_qkv, w_out, b_out),
    }


def _arrays(*nested) -> Weights:
    return tuple(np.array(numbers, np.float32) for numbers in nested)
