"""Batches of windows: pure functions of (seed, step), so that data resumes with no iterator state.

Windows are `context` tokens and the `context` tokens that follow them by one: inputs and targets.
"""

from collections.abc import Iterator
from operator import index

import numpy as np

from qkv_jax.data.array_file import ArrayFile
from qkv_jax.data.draws import TRAINING, integers

Batch = dict[str, np.ndarray]


def check_token_ids(tokens: np.ndarray, vocab_size: int) -> None:
    """Checks that `tokens`, integers `[length]`, are all in `[0, vocab_size)`.

    Worth its time on the host: on a device an id out of range reads some other embedding, silently.

    Raises:
        ValueError: naming the first id out of range and its position.
    """
    tokens = checked_tokens(tokens)
    if tokens.size and (tokens.min() < 0 or tokens.max() >= vocab_size):
        position = int(np.argmax((tokens < 0) | (tokens >= vocab_size)))
        raise ValueError(
            f"tokens[{position}] is {tokens[position]}; wanted ids from 0 to {vocab_size - 1} "
            f"for a vocabulary of {vocab_size}"
        )


def token_dtype(vocab_size: int) -> np.dtype:
    """The smallest of uint8, uint16 and int32 that holds `vocab_size` ids."""
    return np.dtype(
        np.uint8 if vocab_size <= 2**8 else np.uint16 if vocab_size <= 2**16 else np.int32
    )


def pack_tokens(tokens: np.ndarray, vocab_size: int) -> np.ndarray:
    """Checked `tokens` in the smallest of uint8, uint16 and int32 that holds `vocab_size` ids."""
    check_token_ids(tokens, vocab_size)
    return np.asarray(tokens).astype(token_dtype(vocab_size))


def split(
    tokens: np.ndarray | ArrayFile, validation_fraction: float, *, context: int
) -> tuple[np.ndarray | ArrayFile, np.ndarray | ArrayFile]:
    """Training and validation tokens: the first part and the rest, by position (as in nanoGPT).

    Args:
        tokens: integers `[length]`.
        validation_fraction: of the length, between 0 and 1, both excluded.
        context: tokens of a window; each part must hold one, and its last target.

    Returns:
        `(training, validation)`: views of `tokens`, or what a file has of each.

    Raises:
        ValueError: a bad fraction, or a part shorter than `context + 1` tokens.
    """
    tokens = checked_tokens(tokens)
    check_positive(context=context)
    if not 0.0 < validation_fraction < 1.0:
        raise ValueError(f"validation_fraction is {validation_fraction}; wanted 0 < fraction < 1")
    boundary = int(len(tokens) * (1.0 - validation_fraction))
    training, validation = tokens[:boundary], tokens[boundary:]
    if min(len(training), len(validation)) < context + 1:
        raise ValueError(
            f"{len(tokens)} tokens split into {len(training)} for training and {len(validation)} "
            f"for validation; each needs at least {context + 1}, a window of context {context} and "
            "its last target: wanted a longer text, a shorter context or another fraction"
        )
    return training, validation


def random_windows(
    tokens: np.ndarray,
    *,
    seed: int,
    step: int,
    batch_size: int,
    context: int,
    stream: int = TRAINING,
) -> Batch:
    """The batch of one step: windows that start anywhere, drawn with replacement.

    A pure function: any step can be asked for at any time. The draws are the counter-based Philox
    generator's raw bits (key: seed and stream; counter: step), so they are the same in every
    release of NumPy, which `Generator.integers` does not promise.

    Args:
        tokens: integers `[length]`, `length > context`.
        seed: 0 <= seed < 2**64.
        step: 0 <= step < 2**64.
        batch_size: windows, `B`.
        context: tokens of a window, `T`.
        stream: `TRAINING`, `EVALUATION`, or any other number in [0, 2**64).

    Returns:
        `{"inputs": int32 [B, T], "targets": int32 [B, T]}`.
    """
    batch = stacked_windows(
        tokens,
        seed=seed,
        step=step,
        num_steps=1,
        batch_size=batch_size,
        context=context,
        stream=stream,
    )
    return {name: array[0] for name, array in batch.items()}


def stacked_windows(
    tokens: np.ndarray,
    *,
    seed: int,
    step: int,
    num_steps: int,
    batch_size: int,
    context: int,
    stream: int = TRAINING,
) -> Batch:
    """The batches of `num_steps` steps from `step` on: `random_windows` of each, stacked.

    Returns:
        `{"inputs": int32 [num_steps, B, T], "targets": int32 [num_steps, B, T]}`.
    """
    tokens = checked_tokens(tokens)
    check_positive(num_steps=num_steps, batch_size=batch_size, context=context)
    seed, step, stream = index(seed), index(step), index(stream)  # a NumPy integer would overflow
    check_word(seed=seed, step=step, stream=stream)
    check_word(step=step + num_steps - 1)
    num_starts = len(tokens) - context
    if not 0 < num_starts < 2**32:
        raise ValueError(
            f"tokens has {len(tokens)} entries; wanted at least {context + 1} for context {context}"
            ", and less than 2**32"
        )
    starts = [
        integers(batch_size, num_starts, seed=seed, step=step + i, stream=stream)
        for i in range(num_steps)
    ]
    positions = np.stack(starts)[:, :, None] + np.arange(context + 1)
    windows = tokens[positions].astype(np.int32)
    return {
        "inputs": np.ascontiguousarray(windows[..., :-1]),
        "targets": np.ascontiguousarray(windows[..., 1:]),
    }


def sequential_windows(
    tokens: np.ndarray | ArrayFile, *, batch_size: int, context: int, stride: int | None = None
) -> Iterator[Batch]:
    """Batches that go through a text once: for the loss over all of it.

    Windows start every `stride` tokens. Each token but the first, which nothing precedes, is the
    target of weight 1 exactly once; where windows overlap, the later occurrence has weight 0, so
    every counted target but the first window's has at least `context - stride` tokens before it.
    The loss is `sum(weights * loss) / sum(weights)` over all batches; padding has weight 0.

    Args:
        tokens: integers `[length]`, at least 2.
        batch_size: windows a batch, `B`; the last batch is padded to it.
        context: tokens of a window, `T`.
        stride: 1 <= stride <= context; None: `context`, no overlap.

    Yields:
        `{"inputs": int32 [B, T], "targets": int32 [B, T], "weights": float32 [B, T]}`.
    """
    tokens = checked_tokens(tokens)
    stride = context if stride is None else stride
    check_positive(batch_size=batch_size, context=context, stride=stride)
    if stride > context:
        raise ValueError(f"stride is {stride}; wanted <= context, {context}, to skip no token")
    if len(tokens) < 2:
        raise ValueError(f"tokens has {len(tokens)} entries; wanted at least 2: an input, a target")
    return _sequential_windows(tokens, batch_size, context, stride)


def _sequential_windows(
    tokens: np.ndarray, batch_size: int, context: int, stride: int
) -> Iterator[Batch]:
    num_targets = len(tokens) - 1
    num_windows = 1 + -(-max(num_targets - context, 0) // stride)
    for first in range(0, num_windows, batch_size):
        window = np.arange(first, first + batch_size)[:, None]
        offset = np.arange(context)
        position = window * stride + offset  # of inputs; their targets follow by one
        exists = position < num_targets
        is_new = (window == 0) | (offset >= context - stride)
        position = np.minimum(position, num_targets - 1)
        yield {
            "inputs": np.where(exists, tokens[position], 0).astype(np.int32),
            "targets": np.where(exists, tokens[position + 1], 0).astype(np.int32),
            "weights": (exists & is_new).astype(np.float32),
        }


def checked_tokens(tokens: np.ndarray | ArrayFile) -> np.ndarray | ArrayFile:
    """`tokens` as an array, or in their file. ValueError unless they are integers [length]."""
    tokens = tokens if isinstance(tokens, ArrayFile) else np.asarray(tokens)
    if tokens.ndim != 1 or not np.issubdtype(tokens.dtype, np.integer):
        raise ValueError(
            f"tokens are {tokens.dtype}{list(tokens.shape)}; wanted integers of shape [length]"
        )
    return tokens


def check_positive(**sizes: int) -> None:
    """ValueError naming the first that is less than 1."""
    for name, size in sizes.items():
        if size < 1:
            raise ValueError(f"{name} is {size}; wanted at least 1")


def check_word(**words: int) -> None:
    """ValueError naming the first that is not in `[0, 2**64)`."""
    for name, word in words.items():
        if not 0 <= word < 2**64:
            raise ValueError(f"{name} is {word}; wanted 0 <= {name} < 2**64")
