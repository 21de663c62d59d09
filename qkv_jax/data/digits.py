"""Handwritten digits, one pixel after another: scikit-learn's own copy, which needs no download."""

import functools

import numpy as np

from qkv_jax.data import draws
from qkv_jax.data.batches import Batch

CLS = 17  # the ids before it are intensities
NUM_IDS = 18
CONTEXT = 65  # CLS and 8 x 8 pixels


def digits(
    *,
    seed: int,
    step: int,
    batch_size: int,
    context: int,
    validation_fraction: float,
    stream: int = draws.TRAINING,
) -> Batch:
    """Images of 8 x 8 pixels, row by row: which digit?

        CLS  p p p p p ... p      wanted: 0 ... 9

    Alpaydin and Kaynak 1998, Optical Recognition of Handwritten Digits, as
    `sklearn.datasets.load_digits` has it: 1,797 images. Drawn with replacement; other streams than
    `TRAINING` draw from the last part, which other people wrote. A pure function of the seed and
    the step.

    Args:
        seed, step, batch_size, stream: as for `recall`.
        context: ids of a row, `T`: 65.
        validation_fraction: the share of the images that is never trained on, in (0, 1).

    Returns:
        `inputs`, int32 [B, 65], intensities 0 ... 16 behind the id `CLS`; `targets`, int32 [B].

    Raises:
        ValueError: another context, or a fraction that leaves no image on one side.
    """
    if context != CONTEXT:
        raise ValueError(f"context is {context}; wanted {CONTEXT}: CLS and 8 x 8 pixels")
    inputs, targets = _images()
    first = int(len(targets) * (1 - validation_fraction))
    if not 0 < first < len(targets):
        raise ValueError(
            f"validation_fraction is {validation_fraction}; wanted some of {len(targets)} images "
            "to train on, and some to validate"
        )
    low, high = (0, first) if stream == draws.TRAINING else (first, len(targets))
    uniform = draws.uniform((batch_size,), seed=seed, step=step, stream=stream)
    chosen = low + (uniform * (high - low)).astype(int)
    return {"inputs": inputs[chosen], "targets": targets[chosen]}


@functools.cache
def _images() -> tuple[np.ndarray, np.ndarray]:
    from sklearn.datasets import load_digits

    pixels, classes = load_digits(return_X_y=True)
    cls = np.full((len(pixels), 1), CLS)
    return np.concatenate([cls, pixels], axis=1).astype(np.int32), classes.astype(np.int32)
