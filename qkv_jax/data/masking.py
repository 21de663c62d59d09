"""Masked tokens: windows in which some tokens are hidden, to be guessed from both sides.

BERT's recipe (Devlin et al. 2018, https://arxiv.org/abs/1810.04805): of the chosen tokens 80 %
become the mask token, 10 % any token, 10 % stay, so that no input tells what need not be guessed.
Like all batches, these are pure functions of (seed, step).
"""

import math
from collections.abc import Iterator

import numpy as np

from qkv_jax.data.batches import Batch, checked_tokens, stacked_windows
from qkv_jax.data.draws import EVALUATION, TRAINING, raw_bits, to_unit

MASKED, REPLACED = 0.8, 0.1  # shares of the chosen tokens; the others stay


def masked_windows(
    tokens: np.ndarray,
    *,
    seed: int,
    step: int,
    batch_size: int,
    context: int,
    mask_id: int,
    mask_rate: float = 0.15,
    stream: int = TRAINING,
) -> Batch:
    """The batch of one step: the windows of `random_windows`, some of their tokens hidden.

    In each window `max(1, round(mask_rate * T))` tokens are chosen, as BERT does, so that every
    batch has the same number of targets.

    Args:
        tokens, seed, step, batch_size, context, stream: as for `random_windows`.
        mask_id: of the mask token, more than any token; tokens are replaced by ids below it.
        mask_rate: share of the tokens that are chosen, in (0, 1).

    Returns:
        `{"inputs": int32 [B, T], "targets": int32 [B, T], "weights": float32 [B, T]}`: targets are
        the tokens as they were, weights 1 where they were chosen and 0 elsewhere.

    Raises:
        ValueError: as `random_windows`, or for a bad `mask_id` or `mask_rate`.
    """
    batch = stacked_masked_windows(
        tokens,
        seed=seed,
        step=step,
        num_steps=1,
        batch_size=batch_size,
        context=context,
        mask_id=mask_id,
        mask_rate=mask_rate,
        stream=stream,
    )
    return {name: array[0] for name, array in batch.items()}


def stacked_masked_windows(
    tokens: np.ndarray,
    *,
    seed: int,
    step: int,
    num_steps: int,
    batch_size: int,
    context: int,
    mask_id: int,
    mask_rate: float = 0.15,
    stream: int = TRAINING,
) -> Batch:
    """The batches of `num_steps` steps from `step` on: `masked_windows` of each, stacked.

    Returns:
        The arrays of `masked_windows`, each [num_steps, B, T].
    """
    windows = stacked_windows(
        tokens,
        seed=seed,
        step=step,
        num_steps=num_steps,
        batch_size=batch_size,
        context=context,
        stream=stream,
    )["inputs"]
    return mask_windows(
        windows, seed=seed, step=step, mask_id=mask_id, mask_rate=mask_rate, stream=stream
    )


def mask_windows(
    windows: np.ndarray,
    *,
    seed: int,
    step: int,
    mask_id: int,
    mask_rate: float = 0.15,
    stream: int = TRAINING,
) -> Batch:
    """Hides some tokens of the windows of some steps, from `step` on.

    Args:
        windows: integers [steps, B, T].
        seed, step, mask_id, mask_rate, stream: as for `masked_windows`.

    Returns:
        The arrays of `masked_windows`, each [steps, B, T].
    """
    draws = [_draws(seed, step + i, stream, windows[0].shape) for i in range(len(windows))]
    eligible = np.ones(windows.shape, bool)
    return _hide(windows, eligible, np.stack(draws, axis=1), mask_id, mask_rate)


def sequential_masked_windows(
    tokens: np.ndarray,
    *,
    batch_size: int,
    context: int,
    mask_id: int,
    mask_rate: float = 0.15,
    seed: int = 0,
) -> Iterator[Batch]:
    """Batches that go through a text once, the same tokens hidden each time.

    Windows lie side by side, and in each `max(1, round(mask_rate * T))` tokens are chosen. The last
    one ends with the text: where it overlaps the one before, only its new tokens may be chosen. The
    loss is `sum(weights * loss) / sum(weights)` over all batches.

    Args:
        tokens: integers `[length]`, at least 1.
        batch_size: windows a batch, `B`; the last batch is filled up with windows of weight 0.
        context: tokens of a window, `T`; a shorter text is one shorter window.
        mask_id, mask_rate: as for `masked_windows`.
        seed: of the choice, which is the same for every `batch_size`.

    Yields:
        The arrays of `masked_windows`.
    """
    tokens = checked_tokens(tokens)
    for name, size in (("batch_size", batch_size), ("context", context), ("tokens", tokens.size)):
        if size < 1:
            raise ValueError(f"{name}: wanted at least 1, got {size}")
    _check(tokens, mask_id, mask_rate)
    return _sequential(tokens, batch_size, min(context, len(tokens)), mask_id, mask_rate, seed)


def _sequential(
    tokens: np.ndarray, batch_size: int, context: int, mask_id: int, mask_rate: float, seed: int
) -> Iterator[Batch]:
    num_windows = -(-len(tokens) // context)
    for first in range(0, num_windows, batch_size):
        window = np.arange(first, first + batch_size)
        begin = np.minimum(window * context, len(tokens) - context)[:, None]
        position = begin + np.arange(context)
        is_new = position >= window[:, None] * context  # nowhere in windows past the last
        draws = [_draws(seed, i, EVALUATION, (context,)) for i in window]
        yield _hide(tokens[position], is_new, np.stack(draws, axis=1), mask_id, mask_rate)


def _hide(
    windows: np.ndarray, eligible: np.ndarray, draws: np.ndarray, mask_id: int, mask_rate: float
) -> Batch:
    """Windows [..., T] and which of their tokens may be chosen; random bits, uint64 [3, ..., T]."""
    _check(windows, mask_id, mask_rate)
    order, fate, other = draws
    chosen = choose(order, eligible, mask_rate)
    share = to_unit(fate)
    masked = chosen & (share < MASKED)
    replaced = chosen & (share >= MASKED) & (share < MASKED + REPLACED)
    other = (other >> np.uint64(32)) * np.uint64(mask_id) >> np.uint64(32)
    inputs = np.where(masked, mask_id, np.where(replaced, other.astype(np.int64), windows))
    return {
        "inputs": inputs.astype(np.int32),
        "targets": windows.astype(np.int32),
        "weights": chosen.astype(np.float32),
    }


def choose(order: np.ndarray, eligible: np.ndarray, mask_rate: float) -> np.ndarray:
    """The eligible tokens that come first: `max(1, round(mask_rate * number))` of each row.

    Args:
        order: random bits, uint64 [..., T].
        eligible: bool [..., T].
        mask_rate: in (0, 1).

    Returns:
        bool [..., T].
    """
    number = eligible.sum(-1, keepdims=True)
    number = np.minimum(number, np.maximum(1, np.rint(mask_rate * number)))
    order = np.where(eligible, order >> np.uint64(1), order | np.uint64(1 << 63))  # those come last
    rank = np.argsort(np.argsort(order, axis=-1, kind="stable"), axis=-1, kind="stable")
    return rank < number


def _draws(seed: int, step: int, stream: int, shape: tuple[int, ...]) -> np.ndarray:
    """Random bits, uint64 [3, *shape]: unrelated to those of `batches`."""
    bits = raw_bits(3 * math.prod(shape), seed=seed, step=step, stream=stream, series=1)
    return bits.reshape(3, *shape)


def _check(tokens: np.ndarray, mask_id: int, mask_rate: float) -> None:
    if not 0 < mask_rate < 1:
        raise ValueError(f"mask_rate: wanted a number in (0, 1), got {mask_rate}")
    if not tokens.max() < mask_id < 2**31:
        raise ValueError(
            f"mask_id: wanted an id above that of every token, the largest of which is "
            f"{tokens.max()}, got {mask_id}"
        )
