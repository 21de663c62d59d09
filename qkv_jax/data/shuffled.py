"""Windows of a text in a shuffled order, each once an epoch, and which document each token is of.

Batches are pure functions of (seed, step), as in `batches`, and the order costs no memory: it is
`draws.permuted`, so a text of any length starts at once. A process that reads a share of the rows
reads them alone.
"""

from collections.abc import Iterator
from operator import index

import numpy as np

from qkv_jax.data.array_file import ArrayFile
from qkv_jax.data.batches import (
    Batch,
    check_positive,
    check_word,
    checked_tokens,
    sequential_windows,
)
from qkv_jax.data.draws import TRAINING, permuted

EVERY_ROW = slice(None)


def shuffled_windows(
    tokens: np.ndarray | ArrayFile,
    *,
    seed: int,
    step: int,
    num_steps: int,
    batch_size: int,
    context: int,
    stream: int = TRAINING,
    documents: np.ndarray | ArrayFile | None = None,
    rows: slice = EVERY_ROW,
) -> Batch:
    """The batches of `num_steps` steps from `step` on, of windows in a shuffled order.

    Windows lie side by side: number `w` has the tokens from `w T` on and, as the last target, the
    one behind them. Row `r` of step `s` is the window at place `n % N` of the order of epoch
    `n // N`, where `n = s B + r` and `N` is how many windows there are. Each epoch has an order of
    its own; the `(length - 1) % T` tokens at the end of the text are in none.

    Args:
        tokens: integers `[length]`, `length > context`; of a file, only the windows are read.
        seed: 0 <= seed < 2**64.
        step: 0 <= step < 2**64, as is the last one.
        num_steps: steps.
        batch_size: windows of a step, `B`, over all processes.
        context: tokens of a window, `T`.
        stream: `TRAINING`, `EVALUATION`, or any other number in [0, 2**64).
        documents: where documents start, int64 `[number]`, rising from 0; None: they do not matter.
        rows: of each batch, what is read: what one of several processes needs.

    Returns:
        `{"inputs": int32 [num_steps, B, T], "targets": int32 [num_steps, B, T]}`, `B` being the
        rows that are read; with `documents`, also what `of_documents` returns.

    Raises:
        ValueError: naming the argument that is out of range.
    """
    tokens = checked_tokens(tokens)
    check_positive(num_steps=num_steps, batch_size=batch_size, context=context)
    seed, step, stream = index(seed), index(step), index(stream)  # a NumPy integer would overflow
    check_word(seed=seed, step=step, stream=stream)
    check_word(step=step + num_steps - 1)
    if len(tokens) <= context:
        raise ValueError(
            f"tokens has {len(tokens)} entries; wanted at least {context + 1} for context {context}"
        )
    num_windows = (len(tokens) - 1) // context
    read = np.arange(batch_size)[rows]
    windows = [
        _order(read, (step + i) * batch_size, num_windows, seed, stream) for i in range(num_steps)
    ]
    starts = np.stack(windows) * context
    found = np.empty((*starts.shape, context + 1), np.int32)
    for window, start in zip(found.reshape(-1, context + 1), starts.flat, strict=True):
        window[:] = tokens[start : start + context + 1]  # 30 times as fast as an array of places
    batch = {
        "inputs": np.ascontiguousarray(found[..., :-1]),
        "targets": np.ascontiguousarray(found[..., 1:]),
    }
    return batch if documents is None else batch | of_documents(documents, starts, context)


def _order(rows: np.ndarray, first: int, num_windows: int, seed: int, stream: int) -> np.ndarray:
    """The windows of rows, int64 [n], of the batch that begins at place `first` of all epochs."""
    epoch, place = divmod(first, num_windows)  # Python's integers: a long run has many places
    places = place + rows
    windows = np.empty_like(places)
    for later in np.unique(places // num_windows):
        of_epoch = places // num_windows == later
        windows[of_epoch] = permuted(
            places[of_epoch] % num_windows, num_windows,
            seed=seed, step=epoch + int(later), stream=stream,
        )  # fmt: skip
    return windows


def of_documents(documents: np.ndarray | ArrayFile, starts: np.ndarray, context: int) -> Batch:
    """Which document each token of some windows is of, so that attention stays within it.

    Args:
        documents: where documents start, int64 `[number]`, rising from 0.
        starts: of the windows, int64 [..., B].
        context: tokens of a window, `T`.

    Returns:
        Of [..., B, T]: `segments`, int32, the number of the document in its window, for
        `ops.masks.Segments`; `positions`, int32, the token's place in what the window has of its
        document; `weights`, float32, 0 where the target is another document's first token.
    """
    starts = np.asarray(starts)
    firsts = np.searchsorted(documents, starts.reshape(-1), side="right") - 1
    lasts = np.searchsorted(documents, starts.reshape(-1) + context, side="right")
    number, place = np.empty((2, starts.size, context + 1), np.int32)
    for row, (start, first, last) in enumerate(zip(starts.flat, firsts, lasts, strict=True)):
        edges = np.maximum(np.append(documents[first:last], start + context + 1) - start, 0)
        lengths = np.diff(edges)
        number[row] = np.repeat(np.arange(last - first), lengths)
        place[row] = np.arange(context + 1) - np.repeat(edges[:-1], lengths)
    shape = (*starts.shape, context)
    return {
        "segments": number[:, :-1].reshape(shape),
        "positions": place[:, :-1].reshape(shape),
        "weights": (number[:, 1:] == number[:, :-1]).astype(np.float32).reshape(shape),
    }


def sequential_documents(
    tokens: np.ndarray | ArrayFile,
    documents: np.ndarray | ArrayFile,
    *,
    batch_size: int,
    context: int,
) -> Iterator[Batch]:
    """The batches of `sequential_windows`, with what `of_documents` says of their tokens.

    A target counts where it counts there and is no document's first token.
    """
    for i, batch in enumerate(sequential_windows(tokens, batch_size=batch_size, context=context)):
        starts = (i * batch_size + np.arange(batch_size)) * context
        more = of_documents(documents, starts, context)
        yield batch | more | {"weights": batch["weights"] * more["weights"]}
