"""ListOps: nested operations on lists of digits, by the rule of the Long Range Arena."""

import dataclasses
from collections.abc import Callable

import numpy as np

from qkv_jax.data import draws
from qkv_jax.data.batches import Batch

OPERATORS = ("MIN", "MAX", "MED", "SM")  # MED: the median, rounded down; SM: the sum modulo 10
TOKENS = (*map(str, range(10)), *OPERATORS, "X", "CLS", "PAD")  # X closes; CLS stands first
X, CLS, PAD = (TOKENS.index(name) for name in ("X", "CLS", "PAD"))
VALUE_P = 0.25  # the arena's name: how often an argument is a list of its own
TRIES = 32  # expressions drawn at once for each row: a few per cent have a wanted length


def listops(
    *,
    seed: int,
    step: int,
    batch_size: int,
    context: int,
    min_length: int,
    max_depth: int,
    max_args: int,
    stream: int = draws.TRAINING,
) -> Batch:
    """Expressions such as the maximum of 4, 3, the minimum of 2 and 3, and 1: a digit is wanted.

        CLS  MAX 4 3 MIN 2 3 X 1 X  PAD PAD      wanted: 4

    An expression is a digit, or with probability 1/4 an operation on 2 ... max_args expressions; at
    the greatest depth there are digits alone. Those of another length than wanted are drawn again.
    Nangia and Bowman 2018, arxiv.org/abs/1804.06028, as Tay et al. 2020, arxiv.org/abs/2011.04006,
    draw and write it: "X" for the closing bracket, and no parentheses. A pure function of the seed
    and the step.

    Args:
        seed, step, batch_size, stream: as for `recall`.
        context: tokens of a row, `T`: CLS, at most T - 1 of an expression, padding.
        min_length: tokens of the shortest expression, at least 4.
        max_depth: the arena's 10; below max_depth - 1 operations within one another are digits.
        max_args: of an operation, at least 2.

    Returns:
        `inputs`, int32 [B, T], ids of `TOKENS`; `targets`, the answers, and `lengths`, of rows
        without their padding, both int32 [B].

    Raises:
        ValueError: naming the argument that does not fit.
    """
    _check(context, min_length, max_depth, max_args)
    inputs = np.full((batch_size, context), PAD, np.int32)
    inputs[:, 0] = CLS
    targets, lengths = np.zeros((2, batch_size), np.int32)
    filled = series = 0

    def random(number: int) -> np.ndarray:
        """Numbers in [0, 1), [3, number], others each time."""
        nonlocal series
        series += 1
        place = {"seed": seed, "step": step, "stream": stream, "series": series}
        return draws.to_unit(draws.raw_bits(3 * number, **place)).reshape(3, number)

    while filled < batch_size:
        levels = _draw(random, TRIES * batch_size, context - 1, max_depth, max_args)
        length = levels[0].length
        fits = np.flatnonzero((length >= min_length) & (length < context))[: batch_size - filled]
        rows = np.full(len(length), -1)
        rows[fits] = filled + np.arange(len(fits))
        _write(levels, rows, inputs)
        targets[rows[fits]] = _values(levels, rows >= 0, max_args)[fits]
        lengths[rows[fits]] = 1 + length[fits]
        filled += len(fits)
    return {"inputs": inputs, "targets": targets, "lengths": lengths}


@dataclasses.dataclass
class _Level:
    """The expressions of one depth, of many trees: each array has an entry for each."""

    tree: np.ndarray  # to which it belongs
    parent: np.ndarray  # its index in the level above
    token: np.ndarray  # a digit, or an operator
    arguments: np.ndarray  # their number; 0: a digit
    length: np.ndarray  # in tokens

    @property
    def first(self) -> np.ndarray:
        """Where in the level below the arguments begin."""
        return np.cumsum(self.arguments) - self.arguments


def _draw(
    random: Callable[[int], np.ndarray], number: int, longest: int, max_depth: int, max_args: int
) -> list[_Level]:
    """So many trees, level by level; what is longer than `longest` grows no further."""
    tree = parent = np.arange(number)
    size = np.zeros(number, np.int64)
    levels = []
    for depth in range(max_depth):
        kind, which, many = random(len(tree))
        is_list = (kind < VALUE_P) & (depth < max_depth - 1)
        size += np.bincount(tree, 1 + is_list, number).astype(np.int64)  # X is counted with it
        token = np.where(is_list, 10 + which * len(OPERATORS), which * 10).astype(np.int64)
        arguments = np.where(is_list, 2 + many * (max_args - 1), 0).astype(np.int64)
        arguments[size[tree] > longest] = 0
        levels.append(_Level(tree, parent, token, arguments, 1 + is_list))
        parent = np.repeat(np.arange(len(tree)), arguments)
        tree = tree[parent]
        if not len(tree):
            break
    for above, below in zip(levels[-2::-1], levels[:0:-1], strict=True):
        sums = np.bincount(below.parent, below.length, len(above.tree))
        above.length = above.length + sums.astype(np.int64)
    levels[0].length[size > longest] = longest + 1  # cut, so of no known length
    return levels


def _values(levels: list[_Level], wanted: np.ndarray, max_args: int) -> np.ndarray:
    """The value of each tree that is wanted, `wanted[tree]`; of others, anything."""
    value = levels[-1].token
    for level in levels[-2::-1]:
        lists = np.flatnonzero((level.arguments > 0) & wanted[level.tree])
        count = level.arguments[lists]
        present = np.arange(max_args) < count[:, None]
        index = np.where(present, level.first[lists][:, None] + np.arange(max_args), 0)
        arguments = value[index]
        total = np.where(present, arguments, 0).sum(-1) % 10
        ordered = np.sort(np.where(present, arguments, 10), axis=-1)  # 10: after all digits
        row = np.arange(len(lists))
        median = (ordered[row, (count - 1) // 2] + ordered[row, count // 2]) // 2
        results = np.stack([ordered[:, 0], ordered[row, count - 1], median, total])
        value = level.token.copy()
        value[lists] = results[level.token[lists] - 10, row]
    return value


def _write(levels: list[_Level], rows: np.ndarray, inputs: np.ndarray) -> None:
    """Writes each tree that has a row, `rows[tree] >= 0`, into it, from its second token on."""
    position = np.ones(len(rows), np.int64)
    for above, level in zip([None, *levels], levels, strict=False):
        if above is not None:
            before = np.cumsum(level.length) - level.length  # of all on this level
            siblings = before - before[above.first[level.parent]]
            position = position[level.parent] + 1 + siblings
        row = rows[level.tree]
        shown, closed = row >= 0, (row >= 0) & (level.arguments > 0)
        inputs[row[shown], position[shown]] = level.token[shown]
        inputs[row[closed], (position + level.length - 1)[closed]] = X


def _check(context: int, min_length: int, max_depth: int, max_args: int) -> None:
    if max_depth < 2 or max_args < 2:
        raise ValueError(
            f"max_depth and max_args are {max_depth} and {max_args}; wanted at least 2 and 2"
        )
    longest = 1
    for _ in range(max_depth - 1):
        longest = min(2 + max_args * longest, context - 1)  # the most that the tree or row holds
    if not 4 <= min_length <= longest:
        raise ValueError(
            f"min_length is {min_length}; wanted 4 ... {longest}: the longest expression that "
            f"context = {context}, max_depth = {max_depth} and max_args = {max_args} allow"
        )
