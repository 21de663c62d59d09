"""Multi-query associative recall: which value went with this key?"""

import numpy as np

from qkv_jax.data import draws
from qkv_jax.data.batches import Batch

POWER = 0.01  # Zoology's `power_a`: queries come soon after the pairs rather than late


def recall(
    *,
    seed: int,
    step: int,
    batch_size: int,
    context: int,
    num_pairs: int,
    vocab_size: int,
    min_pairs: int | None = None,
    ramp_steps: int = 0,
    stream: int = draws.TRAINING,
) -> Batch:
    """Pairs of a key and a value, then each key again: the model answers with its value.

        k1 v1 k2 v2 ... kP vP  .  .  k2  .  k1  .  ...     wanted at the second k2: v2

    Keys are the ids 1 ... V/2 - 1, values V/2 ... V - 1, each at most once a row. The second
    occurrences stand at even distances `2 g` from the pairs' end, the `g` different, with
    probability proportional to `(g + 1)^(a - 1)`, a = 0.01; everywhere else is id 0.

    Arora et al. 2023, arxiv.org/abs/2312.04927, with the settings of its figure 2
    (`random_non_queries=False`). A pure function of the seed and the step.

    Args:
        seed: 0 <= seed < 2**64.
        step: 0 <= step < 2**64.
        batch_size: rows, `B`.
        context: tokens of a row, `T`, an even number, at least `4 * num_pairs`.
        num_pairs: pairs in a row, `P`.
        vocab_size: ids, `V`.
        min_pairs: rows have this many pairs to `num_pairs`, each number as often, and id 0 where
            the others would stand; by default all have `num_pairs`.
        ramp_steps: over so many steps the largest number of pairs grows to `num_pairs`, evenly,
            from `min_pairs`; 0: it is `num_pairs` from the first on.
        stream: `TRAINING`, `EVALUATION`, or any other number in [0, 2**64).

    Returns:
        `inputs` and `targets`, int32 [B, T], and `weights`, float32 [B, T]: 1 at the places, one
        for each pair, where a value is wanted.

    Raises:
        ValueError: naming the argument that does not fit.
    """
    if num_pairs < 1:
        raise ValueError(f"num_pairs is {num_pairs}; wanted at least 1")
    if context % 2 or context < 4 * num_pairs:
        raise ValueError(
            f"context is {context}; wanted an even number, at least 4 * num_pairs = {4 * num_pairs}"
        )
    if min_pairs is not None and not 1 <= min_pairs <= num_pairs:
        raise ValueError(f"min_pairs is {min_pairs}; wanted 1 to num_pairs = {num_pairs}")
    if ramp_steps < 0:
        raise ValueError(f"ramp_steps is {ramp_steps}; wanted at least 0")
    half = vocab_size // 2
    if half - 1 < num_pairs:
        raise ValueError(
            f"vocab_size is {vocab_size}; wanted at least {2 * num_pairs + 2}, keys and values for "
            f"{num_pairs} pairs and the id 0"
        )
    slots = (context - 2 * num_pairs) // 2
    choices = (half - 1, vocab_size - half, slots, 1)  # keys, values, places of queries, pairs
    uniform = draws.uniform((batch_size, sum(choices)), seed=seed, step=step, stream=stream)
    key_draws, value_draws, slot_draws, pair_draws = np.split(
        uniform, np.cumsum(choices)[:-1], axis=-1
    )
    late = np.arange(1, slots + 1) ** (POWER - 1.0)
    keys = 1 + draws.without_replacement(key_draws, num_pairs, np.ones(choices[0]))
    values = half + draws.without_replacement(value_draws, num_pairs, np.ones(choices[1]))
    queries = 2 * num_pairs + 2 * draws.without_replacement(slot_draws, num_pairs, late)
    fewest = num_pairs if min_pairs is None else min_pairs
    grown = min(1.0, (step + 1) / ramp_steps) if ramp_steps else 1.0
    more = int(grown * (num_pairs - fewest))
    present = np.arange(num_pairs) < fewest + np.floor(pair_draws * (more + 1))
    keys, values = keys * present, values * present

    inputs = np.zeros((batch_size, context), np.int32)
    targets, weights = np.zeros_like(inputs), np.zeros(inputs.shape, np.float32)
    inputs[:, 0 : 2 * num_pairs : 2] = keys
    inputs[:, 1 : 2 * num_pairs : 2] = values
    np.put_along_axis(inputs, queries, keys.astype(np.int32), axis=-1)
    np.put_along_axis(targets, queries, values.astype(np.int32), axis=-1)
    np.put_along_axis(weights, queries, present.astype(np.float32), axis=-1)
    return {"inputs": inputs, "targets": targets, "weights": weights}
