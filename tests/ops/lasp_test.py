"""States that travel from device to device: the recurrences of many are those of one."""

import functools

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from jax.sharding import PartitionSpec

from qkv_jax import ops
from tests.ops import mesh_test
from tests.ops.context_test import mesh_of
from tests.tolerances import assert_close

B, T, N, K, H, h = 2, 20, 6, 3, 5, 7
DEVICES = 4
RANDOM = np.random.RandomState(0)
LENGTHS = np.array([T, 13])  # the second row ends within the third of four shards


def normal(*shape):
    return jnp.asarray(RANDOM.randn(*shape), jnp.float32)


def inputs(decay):
    """Tokens and a state; `decay`: the axes of a decay beyond [B, T, K], or None."""
    k = normal(B, T, K, H)
    found = {
        "q": normal(B, T, N, H),
        "k": k / jnp.linalg.norm(k, axis=-1, keepdims=True),
        "v": normal(B, T, K, h),
        "state": normal(B, K, H, h),
    }
    if decay is not None:
        found["log_decay"] = -abs(normal(B, T, K, *decay))
    return found


def called(op):
    return lambda given: op(**given, lengths=LENGTHS, chunk_size=4)


def values_and_gradients(op, given):
    """Values, the last state and all gradients."""

    def both(given):
        values, pullback = jax.vjp(op, given)
        return values, *pullback(jax.tree.map(jnp.cos, values))

    return jax.jit(both)(given)


def assert_all_close(actual, expected):
    jax.tree.map(functools.partial(assert_close, scale=10), actual, expected)


def check(sharded, whole, given):
    along = PartitionSpec(None, "seq")
    specs = {name: PartitionSpec() if name == "state" else along for name in given}
    sharded = jax.shard_map(
        called(functools.partial(sharded, axis_name="seq")), mesh=mesh_of(DEVICES),
        in_specs=(specs,), out_specs=(along, PartitionSpec()),
    )  # fmt: skip
    assert_all_close(
        values_and_gradients(sharded, given), values_and_gradients(called(whole), given)
    )


@pytest.mark.parametrize("decay", [None, (), (H,)], ids=["none", "per_head", "per_channel"])
def test_linear_attention_of_many_devices_is_that_of_one(decay):
    check(ops.lasp_linear_attention, ops.linear_attention, inputs(decay))


def of_delta_rule():
    return inputs((H,)) | {"beta": jnp.asarray(RANDOM.rand(B, T, K), jnp.float32)}


def test_the_delta_rule_of_many_devices_is_that_of_one():
    check(ops.lasp_delta_rule, ops.delta_rule, of_delta_rule())


@pytest.mark.parametrize(
    ("sizes", "op", "given", "passes"),
    [
        ((2, 1, 1, 4), ops.linear_attention, inputs(None), True),
        ((1, 2, 2, 2), ops.linear_attention, inputs(()), True),  # 3 key heads on 2 devices
        ((2, 1, 2, 2), ops.delta_rule, of_delta_rule(), True),
        ((1, 1, 1, 8), ops.linear_attention, inputs(()), False),  # 20 tokens on 8 devices
    ],
)
def test_on_a_mesh_that_is_set_states_travel_and_nothing_changes(sizes, op, given, passes):
    expected = values_and_gradients(called(op), given)
    with jax.set_mesh(mesh_test.mesh_of(*sizes)):
        assert ("all_gather" in str(jax.make_jaxpr(called(op))(given))) == passes
        actual = values_and_gradients(called(op), given)
    assert_all_close(actual, expected)


def test_on_a_mesh_without_a_token_there_is_the_state():
    given = {name: x if name == "state" else x[:, :0] for name, x in inputs(None).items()}
    with jax.set_mesh(mesh_test.mesh_of(1, 1, 1, 4)):
        out, state = jax.jit(lambda given: ops.linear_attention(**given))(given)
    assert out.shape == (B, 0, N, h)
    assert_close(state, given["state"])


def test_outside_of_shard_map_there_is_no_axis_and_the_error_says_so():
    x = jnp.ones((1, 8, 2, 3))
    with pytest.raises(ValueError, match=r"axis_name: wanted an axis .* got 'seq'; call this"):
        ops.lasp_linear_attention(x, x, x, axis_name="seq")


def test_recurrences_also_work_where_shard_map_cuts_batch_rows():
    """From a state of zeros, which do not vary from device to device, as the tokens do."""
    given = inputs(())
    del given["state"]
    rows = PartitionSpec("seq")
    call = lambda given: ops.linear_attention(**given)  # noqa: E731
    sharded = jax.shard_map(call, mesh=mesh_of(2), in_specs=(rows,), out_specs=rows)
    jax.tree.map(assert_close, jax.jit(sharded)(given), call(given))
