"""Tables under a page of attention: what a model expects, and where it is wrong.

A model may have more ids than its tokenizer: those are never shown.
"""

from collections.abc import Sequence

import jax
import jax.numpy as jnp
import numpy as np
import optax

from qkv_jax import models
from qkv_jax.data import Tokenizer
from qkv_jax.models import Decoder, MaskedLanguageModel
from qkv_jax.viz import PageTable, visible

LENS_TOKENS = 200  # rows of the lens's table: a page is no place for more
BEFORE = 24  # characters that stand before a token in the tables of the worst and the hidden
GUESSES = 5  # tokens that may stand behind a mask


def lens(
    tokenizer: Tokenizer, model: Decoder, tokens: np.ndarray, labels: Sequence[str]
) -> PageTable:
    """What the model would say next after each layer."""
    columns = []
    for logits in models.logit_lens(model, tokens[None, :LENS_TOKENS]):
        chances = jax.nn.softmax(logits[0])[:, : tokenizer.vocab_size]
        best = np.asarray(chances.argmax(-1))
        words = [_alone(tokenizer, token) for token in best]
        columns.append([f"{w} {c:.0%}" for w, c in zip(words, chances.max(-1), strict=True)])
    shown = range(min(len(tokens), LENS_TOKENS))
    return PageTable(
        "Logit lens",
        "What would come next, if the model ended after so many of its layers, and how sure it is. "
        "A click opens the row's token.",
        ["after", *(f"layer {layer}" if layer else "embedding" for layer in range(len(columns)))],
        [[f"{i + 1}  {visible(labels[i])}", *(column[i] for column in columns)] for i in shown],
        list(shown),
    )


def worst(
    tokenizer: Tokenizer, model: Decoder, tokens: np.ndarray, labels: Sequence[str], number: int
) -> PageTable:
    """The tokens that the model predicts worst, each with what it expected instead."""
    logits = model(tokens[None])
    nats = np.asarray(costs(logits, tokens))
    chances = np.asarray(jax.nn.softmax(logits[0]))[:, : tokenizer.vocab_size]
    rows, places = [], np.argsort(-nats)[:number]
    for place in places:  # where the model stands when it is to say the token after it
        expected = np.argsort(-chances[place])[:3]
        rows.append([
            str(place + 2),
            visible(tokenizer.decode(tokens[: place + 1]).rstrip("\ufffd")[-BEFORE:]),
            visible(labels[place + 1]),
            f"{nats[place]:.2f}",
            ", ".join(
                f"{_alone(tokenizer, token)} {chances[place, token]:.0%}" for token in expected
            ),
        ])  # fmt: skip
    return PageTable(
        f"The {len(rows)} tokens that were predicted worst",
        "A click opens the attention of the token before, from which each was predicted.",
        ["place", "after", "token", "nats", "expected"],
        rows,
        [int(place) for place in places],
    )


def guesses(
    tokenizer: Tokenizer,
    model: MaskedLanguageModel,
    tokens: np.ndarray,
    labels: Sequence[str],
    places: np.ndarray,
) -> PageTable:
    """What the model says stands at places whose tokens are hidden."""
    chances = jax.nn.softmax(model(tokens[None])[0, places])
    chances = np.asarray(chances)[:, : tokenizer.vocab_size]
    rows = []
    for place, of_place in zip(places, chances, strict=True):
        guesses = np.argsort(-of_place)[:GUESSES]
        around = labels[:place], labels[place : place + 1], labels[place + 1 :]
        before, hidden, after = map("".join, around)
        rows.append([
            str(place + 1),
            *(f"{_alone(tokenizer, id)} {of_place[id]:.0%}" for id in guesses),
            f"{visible(before[-BEFORE:])} {hidden} {visible(after[:BEFORE])}".strip(),
        ])  # fmt: skip
    return PageTable(
        "What is hidden",
        "The likeliest tokens behind each mask, and how sure the model is. A click opens the row's "
        "token.",
        ["place", *(f"guess {i + 1}" for i in range(GUESSES)), "where"],
        rows,
        [int(place) for place in places],
    )


def costs(logits: jax.Array, tokens: np.ndarray) -> jax.Array:
    """Nats [T - 1] that each token but the first costs, by logits [1, T, V]."""
    return optax.softmax_cross_entropy_with_integer_labels(logits[0, :-1], jnp.asarray(tokens[1:]))


def _alone(tokenizer: Tokenizer, token: int) -> str:
    """A token that stands in no text, for a table."""
    return visible(tokenizer.labels([token])[0])
