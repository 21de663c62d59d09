"""Random numbers that are a function of (seed, step), the same in every release of NumPy.

They come from the raw bits of the counter-based Philox generator (key: seed and stream; counter:
step), which NumPy promises not to change; `Generator.integers` and the like may change.
"""

import math

import numpy as np

TRAINING = 0  # streams: the same seed draws unrelated numbers in each
EVALUATION = 1
TEST = 2


def raw_bits(number: int, *, seed: int, step: int, stream: int, series: int = 0) -> np.ndarray:
    """So many uint64 of 64 random bits; another `series` of the same step is unrelated."""
    key = int(seed) | int(stream) << 64  # a NumPy integer would overflow
    counter = int(step) << 64 | series << 128
    return np.random.Philox(key=key, counter=counter).random_raw(number)


def to_unit(bits: np.ndarray) -> np.ndarray:
    """Random bits as numbers in [0, 1), float64, on a grid of 2**-53."""
    return (bits >> np.uint64(11)) * 2.0**-53


def uniform(shape: tuple[int, ...], *, seed: int, step: int, stream: int) -> np.ndarray:
    """Numbers in [0, 1), float64 of `shape`."""
    bits = raw_bits(math.prod(shape), seed=seed, step=step, stream=stream)
    return to_unit(bits).reshape(shape)


def integers(number: int, below: int, *, seed: int, step: int, stream: int) -> np.ndarray:
    """So many draws from `[0, below)`, int64, `below < 2**32`; at most 2**-32 from uniform."""
    high_bits = raw_bits(number, seed=seed, step=step, stream=stream) >> np.uint64(32)
    return (high_bits * np.uint64(below) >> np.uint64(32)).astype(np.int64)


def without_replacement(draws: np.ndarray, number: int, weights: np.ndarray) -> np.ndarray:
    """Draws `number` different indices of each row, one after another, with the given weights.

    By the largest of `log w - log(-log u)` (Gumbel's trick), which has this very distribution.

    Args:
        draws: [..., choices] in [0, 1), from `uniform`.
        number: at most `choices`.
        weights: [choices], positive.

    Returns:
        int64 [..., number], in the order in which they were drawn.
    """
    with np.errstate(divide="ignore"):  # u = 0 is drawn last
        keys = np.log(weights) - np.log(-np.log(draws))
    return np.argsort(-keys, axis=-1, kind="stable")[..., :number]
