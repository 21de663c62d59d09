"""Position embeddings."""

import jax
import numpy as np
from flax import nnx

from qkv_jax import nn
from tests.tolerances import assert_close

POSITIONS = np.array([[0, 2, 4], [3, 3, 1]])


def test_learned_positions_are_rows_of_the_table():
    module = nn.LearnedPositions(5, 7, rngs=nnx.Rngs(0))
    table = np.asarray(module.table[...])
    assert 0.01 < table.std() < 0.03
    np.testing.assert_array_equal(module(POSITIONS), table[POSITIONS])


def test_a_learned_position_past_the_table_is_nan_and_not_its_last_row():
    module = nn.LearnedPositions(5, 7, rngs=nnx.Rngs(0))
    out = np.asarray(jax.jit(lambda positions: module(positions))(np.array([4, 5])))
    assert np.isfinite(out[0]).all()
    assert np.isnan(out[1]).all()


def test_sinusoidal_positions_are_the_formula_and_have_no_parameters():
    module = nn.SinusoidalPositions(6)
    angles = POSITIONS[..., None] / 10_000 ** (np.arange(0, 6, 2) / 6)
    out = np.asarray(module(POSITIONS))
    assert_close(out[..., 0::2], np.sin(angles), dtype="float32")
    assert_close(out[..., 1::2], np.cos(angles), dtype="float32")
    assert nn.count(nn.split(module)[1]) == 0
