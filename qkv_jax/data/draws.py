"""Random numbers that are a function of (seed, step), the same in every release of NumPy.

They come from the raw bits of the counter-based Philox generator (key: seed and stream; counter:
step), which NumPy promises not to change; `Generator.integers` and the like may change.
"""

import math

import numpy as np

TRAINING = 0  # streams: the same seed draws unrelated numbers in each
EVALUATION = 1
TEST = 2

FEISTEL_ROUNDS = 8  # of `permuted`; another number is another order


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


def permuted(indices: np.ndarray, length: int, *, seed: int, step: int, stream: int) -> np.ndarray:
    """Where a random permutation of `range(length)` takes some indices: no table of it is made.

    A Feistel network permutes the numbers of `2 b` bits, of which there are fewer than
    `4 * length`; what it takes beyond `length` goes through it again until it is below:

        (left, right) <- (right, left xor mix(right + key))      in each of 8 rounds

    Source: Black and Rogaway 2002, "Ciphers with arbitrary finite domains", cycle walking;
    `mix` is SplitMix64's (Steele et al. 2014). It shuffles and hides nothing.

    Args:
        indices: integers in `[0, length)`, of any shape.
        length: how many are permuted, from 1 to 2**62.
        seed, step, stream: what the permutation is a function of.

    Returns:
        int64 of the same shape.
    """
    indices = np.asarray(indices)
    if not 0 < length <= 2**62:
        raise ValueError(f"length is {length}; wanted 1 to 2**62")
    if indices.size and not 0 <= indices.min() <= indices.max() < length:
        raise ValueError(
            f"indices go from {indices.min()} to {indices.max()}; wanted 0 to {length - 1}"
        )
    half = np.uint64(max(1, -(-(length - 1).bit_length() // 2)))
    low = (np.uint64(1) << half) - np.uint64(1)
    keys = raw_bits(FEISTEL_ROUNDS, seed=seed, step=step, stream=stream, series=2)

    def network(values: np.ndarray) -> np.ndarray:
        left, right = values >> half, values & low
        for key in keys:
            left, right = right, left ^ (_mix(right + key) & low)
        return left << half | right

    found = network(indices.astype(np.uint64).reshape(-1))
    while (beyond := found >= length).any():
        found[beyond] = network(found[beyond])
    return found.astype(np.int64).reshape(indices.shape)


def _mix(values: np.ndarray) -> np.ndarray:
    """A bijection of uint64 [n] in which each bit of the input changes half of the output's."""
    values = (values ^ values >> np.uint64(30)) * np.uint64(0xBF58476D1CE4E5B9)
    values = (values ^ values >> np.uint64(27)) * np.uint64(0x94D049BB133111EB)
    return values ^ values >> np.uint64(31)


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
