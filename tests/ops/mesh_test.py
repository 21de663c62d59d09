"""Attention under a mesh that is set: where it is computed, and that it is that of one device."""

import functools
import math

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from jax.sharding import AxisType, PartitionSpec

from qkv_jax import ops
from qkv_jax.ops import masks, scores
from qkv_jax.ops.mesh import AXES, operand_cut
from tests.tolerances import assert_close

B, N, K, H = 8, 8, 2, 4
BLOCKS = ops.Blockwise(block_q=8, block_kv=16)


def mesh_of(*sizes):
    devices = jax.devices("cpu")[: math.prod(sizes)]
    return jax.make_mesh(sizes, AXES, axis_types=(AxisType.Auto,) * len(AXES), devices=devices)


def given(T=16, S=16, rows=B, width=H):
    random = np.random.RandomState(0)
    shapes = (rows, T, N, H), (rows, S, K, H), (rows, S, K, width)
    return [jnp.asarray(random.randn(*shape), jnp.float32) for shape in shapes]


# What is computed where, and all that knows a row, a head, a query or a key


def cubed(q, k, v, table, slopes, sinks, *, implementation):
    B, T = q.shape[:2]
    ids = np.sort(np.random.RandomState(0).randint(0, 3, (B, T)), axis=1)
    out, stats = ops.attention_with_stats(
        q, k, v, mask=masks.Causal() & masks.Segments(ids), sinks=sinks,
        score=(scores.RelativeBias(table, max_distance=8), scores.Alibi(slopes)),
        dropout_rate=0.3, dropout_rng=jax.random.key(1), implementation=implementation,
    )  # fmt: skip
    return (out**3).sum() + (stats.lse**2).sum() + (stats.entropy**2).sum()


@functools.cache
def of_one_device():
    return values_and_gradients("reference")


def values_and_gradients(implementation):
    random = np.random.RandomState(1)
    others = [jnp.asarray(random.rand(*shape), jnp.float32) for shape in ((6, N), (N,), (N,))]
    loss = functools.partial(cubed, implementation=implementation)
    return jax.jit(jax.value_and_grad(loss, range(6)))(*given(), *others)


@pytest.mark.parametrize("implementation", ["reference", BLOCKS])
@pytest.mark.parametrize("sizes", [(2, 1, 2, 2), (1, 1, 1, 8), (1, 2, 4, 1)])
def test_rows_heads_and_tokens_that_are_cut_change_no_value_and_no_gradient(sizes, implementation):
    with jax.set_mesh(mesh_of(*sizes)):
        actual = values_and_gradients(implementation)
    jax.tree.map(functools.partial(assert_close, scale=100), actual, of_one_device())


@pytest.mark.parametrize(
    ("sizes", "implementation", "is_ring"),
    [
        ({}, BLOCKS, True),
        ({"S": 24}, BLOCKS, True),
        ({"T": 256, "S": 256, "rows": 1}, None, True),
        ({}, None, False),  # so few that all weights at once are faster
        ({}, "reference", False),
        ({"T": 18}, BLOCKS, False),
        ({"S": 18}, BLOCKS, False),
        ({"S": 4}, BLOCKS, False),
        ({"width": 0}, BLOCKS, False),
    ],
)
def test_keys_travel_where_they_can_and_else_are_gathered(sizes, implementation, is_ring):
    q, k, v = given(**sizes)

    def attend(q, k, v):
        out, stats = ops.attention_with_stats(
            q, k, v, mask=masks.Causal(), q_positions=np.arange(q.shape[1]) + 3,
            implementation=implementation,
        )  # fmt: skip
        return out, dict(stats)

    expected = attend(q, k, v)
    with jax.set_mesh(mesh_of(1, 1, 1, 4)):
        assert ("ppermute" in str(jax.make_jaxpr(attend)(q, k, v))) == is_ring
        actual = jax.jit(attend)(q, k, v)
    jax.tree.map(functools.partial(assert_close, scale=10), actual, expected)


@pytest.mark.parametrize(
    ("shape", "cut"),
    [
        ((2, 3, 5, 1), ("rows", "heads", "seq", None)),
        ((1, 3, 1, 7), (None, "heads", None, "seq")),
        ((2, 1, 5, 7), ("rows", None, "seq", None)),  # the keys of all tokens
        ((2, 3, 5), ()),
        ((), ()),
    ],
)
def test_an_operand_is_cut_along_the_axes_that_it_has(shape, cut):
    axes = "rows", "heads", "seq", "seq"
    assert operand_cut(np.zeros(shape), axes) == PartitionSpec(*cut)
