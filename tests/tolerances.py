"""How closely two computations of the same numbers must agree: one table, by dtype."""

import jax.numpy as jnp
import numpy as np
from jax.typing import ArrayLike, DTypeLike

TOLERANCE = {"float32": 1e-5, "bfloat16": 2e-2, "float64": 1e-12}


def assert_close(
    actual: ArrayLike, expected: ArrayLike, dtype: DTypeLike | None = None, scale: float = 1
) -> None:
    """Assert equal shapes, and values within `scale` times the tolerance, absolute and relative.

    The tolerance is that of `dtype`; without one, of `actual`'s dtype.
    """
    name = jnp.dtype(jnp.asarray(actual).dtype if dtype is None else dtype).name
    tolerance = scale * TOLERANCE[name]
    actual, expected = np.asarray(actual, np.float64), np.asarray(expected, np.float64)
    assert actual.shape == expected.shape, f"shape {actual.shape}, expected {expected.shape}"
    np.testing.assert_allclose(actual, expected, rtol=tolerance, atol=tolerance)
