"""Two tasks that ask for what stands far back: one cue among noise, and a copy of all.

Like all batches, these are pure functions of (seed, step). A batch also says how far back each
answer stands: `distances`, int32 [B, T].
"""

import numpy as np

from qkv_jax.data import draws
from qkv_jax.data.batches import Batch


def cue(
    *,
    seed: int,
    step: int,
    batch_size: int,
    context: int,
    vocab_size: int,
    stream: int = draws.TRAINING,
) -> Batch:
    """One symbol somewhere in noise; the last token asks which it was.

        .  .  c  .  .  .  .  ?      wanted at the "?": c

    Id 0 is the question, 1 ... V/2 - 1 are symbols, V/2 ... V - 1 are noise. The symbol's place is
    uniform. Hochreiter and Schmidhuber 1997 call it a problem of long time lags.

    Args:
        seed, step, batch_size, stream: as for `recall`.
        context: tokens of a row, `T`, at least 2.
        vocab_size: ids, `V`, at least 6: two symbols.

    Returns:
        `inputs`, `targets` and `distances`, int32 [B, T], and `weights`, float32 [B, T]: 1 at the
        question.

    Raises:
        ValueError: naming the argument that does not fit.
    """
    _check(context, vocab_size, at_least=6)
    uniform = draws.uniform((batch_size, context + 1), seed=seed, step=step, stream=stream)
    half = vocab_size // 2
    inputs = half + (uniform[:, :context] * (vocab_size - half)).astype(np.int32)
    place = (uniform[:, context] * (context - 1)).astype(np.int32)[:, None]
    symbol = 1 + (np.take_along_axis(uniform, place, -1) * (half - 1)).astype(np.int32)
    np.put_along_axis(inputs, place, symbol, axis=-1)
    inputs[:, -1] = 0
    batch = _empty(inputs)
    batch["targets"][:, -1:] = symbol
    batch["weights"][:, -1] = 1
    batch["distances"][:, -1:] = context - 1 - place
    return batch


def copying(
    *,
    seed: int,
    step: int,
    batch_size: int,
    context: int,
    vocab_size: int,
    stream: int = draws.TRAINING,
) -> Batch:
    """Symbols, a mark, and the same symbols again.

        a  b  c  |  a  b  .  .      wanted from the "|" on: a  b  c

    Id 0 is the mark and the padding, the others are symbols. The number of symbols, uniform in
    1 ... T/2, is how far back every answer of a row stands. Jelassi et al. 2024,
    arxiv.org/abs/2402.01032: a state of fixed size cannot copy more than it holds.

    Args:
        seed, step, batch_size, stream: as for `recall`.
        context: tokens of a row, `T`, at least 2.
        vocab_size: ids, `V`, at least 3: two symbols.

    Returns:
        As `cue`; the weights are 1 wherever a symbol of the copy is wanted.

    Raises:
        ValueError: naming the argument that does not fit.
    """
    _check(context, vocab_size, at_least=3)
    longest = context // 2
    uniform = draws.uniform((batch_size, longest + 1), seed=seed, step=step, stream=stream)
    symbols = 1 + (uniform[:, :longest] * (vocab_size - 1)).astype(np.int32)
    length = 1 + (uniform[:, longest:] * longest).astype(np.int32)  # [B, 1]
    place = np.arange(context)
    first = np.take_along_axis(symbols, np.minimum(place, longest - 1)[None], -1)
    again = np.take_along_axis(symbols, np.clip(place - length - 1, 0, longest - 1), -1)
    copied = np.take_along_axis(symbols, np.clip(place - length, 0, longest - 1), -1)
    is_again = (place > length) & (place < 2 * length)
    batch = _empty(np.where(place < length, first, np.where(is_again, again, 0)).astype(np.int32))
    wanted = (place >= length) & (place < 2 * length)
    batch["targets"][:] = np.where(wanted, copied, 0)
    batch["weights"][:] = wanted
    batch["distances"][:] = np.where(wanted, length, 0)
    return batch


def _empty(inputs: np.ndarray) -> Batch:
    return {
        "inputs": inputs,
        "targets": np.zeros_like(inputs),
        "weights": np.zeros(inputs.shape, np.float32),
        "distances": np.zeros_like(inputs),
    }


def _check(context: int, vocab_size: int, at_least: int) -> None:
    if context < 2:
        raise ValueError(f"context is {context}; wanted at least 2")
    if vocab_size < at_least:
        raise ValueError(f"vocab_size is {vocab_size}; wanted at least {at_least}")
