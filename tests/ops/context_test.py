"""Context parallelism: attention of many devices is that of one, in every form."""

import contextlib
import functools
import math

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from jax.sharding import AxisType, PartitionSpec

from qkv_jax import ops
from qkv_jax.ops import arguments, masks, plan, scores
from qkv_jax.ops.context import ring_attention_with_stats, zigzag
from qkv_jax.ops.prepared import grid_of
from qkv_jax.ops.ring import Ring
from tests.ops.attention_cases import CASES, B, K, N, h, normal, numpy_attention, positive
from tests.tolerances import assert_close

LENGTH = 16  # of queries and keys once padded: at least two on each of eight devices
FORMS = [ops.RingAttention, ops.UlyssesAttention, ops.AllGatherAttention]
SMALL = ops.Blockwise(block_q=2, block_kv=2)
QUICK = {"xla_backend_optimization_level": 0}


def mesh_of(*sizes, names=("seq",), kind=AxisType.Auto):
    devices = jax.devices("cpu")[: math.prod(sizes)]
    return jax.make_mesh(sizes, names, axis_types=(kind,) * len(sizes), devices=devices)


@functools.cache
def spread(name):
    """A case with tokens and padding in a random order: whatever holds lies on other devices.

    Returns the inputs, the other arguments, and where its queries have come to stand.
    """
    case = CASES[name]
    T, S = case.inputs["q"].shape[1], case.inputs["k"].shape[1]
    random = np.random.RandomState(3)
    of_queries, of_keys = random.permutation(LENGTH), random.permutation(LENGTH)

    def longer(x, axis, order):
        x = np.asarray(x)
        pads = [(0, LENGTH - n if a == axis % x.ndim else 0) for a, n in enumerate(x.shape)]
        return np.take(np.pad(x, pads, mode="edge"), order, axis)

    def operand(x):
        for axis, length, order in ((2, T, of_queries), (3, S, of_keys)):
            if np.ndim(x) == 4 and x.shape[axis] == length > 1:
                x = longer(x, axis, order)
        return x

    inputs, others = dict(case.inputs), dict(case.others)
    inputs["q"] = longer(inputs["q"], 1, of_queries)
    inputs["k"], inputs["v"] = (longer(inputs[x], 1, of_keys) for x in "kv")
    if "score" in inputs:
        inputs["score"] = jax.tree.map(operand, scores.aligned(inputs["score"]))
    for key, length, order in (("q_positions", T, of_queries), ("kv_positions", S, of_keys)):
        others[key] = longer(others.get(key, np.arange(length)), -1, order)
    real = masks.Segments(np.zeros(LENGTH, np.int32), (of_keys >= S).astype(np.int32))
    if "mask" in others:
        real &= jax.tree.map(operand, others["mask"].aligned())
    others["mask"] = real
    return inputs, others, np.argsort(of_queries)[:T]


def values_and_gradients(attend, inputs, others, compiled=True):
    cotangent = jnp.asarray(np.random.RandomState(1).randn(B, LENGTH, N, inputs["v"].shape[-1]))

    def both(inputs, cotangent):
        out, pullback = jax.vjp(lambda inputs: attend(**inputs, **others), inputs)
        return out, *pullback(cotangent.astype(out.dtype))

    inputs = jax.tree.map(lambda x: jnp.asarray(x, jnp.float32), inputs)
    both = jax.jit(both, compiler_options=QUICK) if compiled else both
    return both(inputs, cotangent)


@functools.cache
def of_one_device(name):
    inputs, others, _ = spread(name)
    attend = functools.partial(ops.attention, implementation="reference")
    return values_and_gradients(attend, inputs, others, compiled=False)


def check_case(name, attend, implementation, mesh=None):
    inputs, others, places = spread(name)
    with contextlib.nullcontext() if mesh is None else jax.set_mesh(mesh):
        out, gradients = values_and_gradients(
            functools.partial(attend, implementation=implementation), inputs, others
        )
    case = CASES[name]
    if "dropout_rate" not in case.others:  # a bit of which depends on the places of the tokens
        assert_close(out[:, places], numpy_attention(case, **case.inputs)["out"])
    expected_out, expected = of_one_device(name)
    assert_close(out, expected_out)
    jax.tree.map(functools.partial(assert_close, scale=2), gradients, expected)


# What the quick tests take: operands that travel, stay, and have both axes; tables; dropout.
OFTEN = ("segments", "bias_per_head_and_row", "score_of_ones_own", "dropout")
ON_RINGS = [
    pytest.param(name, devices, marks=() if name in OFTEN and devices == 4 else pytest.mark.slow)
    for name in CASES
    for devices in (2, 4, 8)
]


@pytest.mark.parametrize(("name", "devices"), ON_RINGS)
def test_a_ring_gives_the_values_and_gradients_of_one_device(name, devices):
    check_case(name, ops.Sharded(ops.RingAttention("seq"), mesh_of(devices)), SMALL)


ON_A_MESH = [
    pytest.param(name, marks=() if name == "segments" else pytest.mark.slow) for name in CASES
]


@pytest.mark.parametrize("name", ON_A_MESH)
def test_attention_on_a_mesh_with_context_is_such_a_ring(name):
    check_case(name, ops.attention, SMALL, mesh_of(4, names=("context",)))


IN_ONE_STEP = [
    pytest.param(name, form, devices, marks=() if name in OFTEN else pytest.mark.slow)
    for name in CASES
    for form, devices in ((ops.UlyssesAttention, 2), (ops.AllGatherAttention, 4))
]


@pytest.mark.parametrize(("name", "form", "devices"), IN_ONE_STEP)
def test_the_other_forms_give_the_values_and_gradients_of_one_device(name, form, devices):
    check_case(name, ops.Sharded(form("seq"), mesh_of(devices)), "reference")


def test_a_ring_gives_the_statistics_of_one_device():
    inputs, others, places = spread("empty_rows_and_sinks")
    ids, along, of_rows = (
        others["mask"],
        PartitionSpec(None, "seq"),
        PartitionSpec(None, None, "seq"),
    )
    cut = jax.tree.map(
        lambda x: PartitionSpec(*("seq" if n == LENGTH else None for n in x.shape)), ids
    )

    def call(q, k, v, sinks, mask, q_positions, kv_positions):
        out, stats = ring_attention_with_stats(
            q, k, v, sinks=sinks, mask=mask, q_positions=q_positions, kv_positions=kv_positions,
            axis_name="seq", implementation=SMALL,
        )  # fmt: skip
        return out, dict(stats)

    sharded = jax.shard_map(
        call, mesh=mesh_of(4),
        in_specs=(along, along, along, PartitionSpec(), cut, *[PartitionSpec("seq")] * 2),
        out_specs=(along, dict.fromkeys(("lse", "max_logit", "entropy"), of_rows)),
    )  # fmt: skip
    arrays = [jnp.asarray(inputs[x], jnp.float32) for x in ("q", "k", "v", "sinks")]
    out, stats = jax.jit(sharded)(*arrays, ids, others["q_positions"], others["kv_positions"])
    case = CASES["empty_rows_and_sinks"]
    expected = numpy_attention(case, **case.inputs)
    assert np.isneginf(expected["max_logit"]).any()
    assert_close(out[:, places], expected["out"])
    for key, values in stats.items():
        assert_close(values[:, :, places], expected[key])


@pytest.mark.slow
def test_derivatives_of_every_kind_are_those_of_one_device():
    """Forward mode, and Hessian-vector products forward over reverse and reverse over reverse."""
    inputs, others, _ = spread("everything_at_once")
    with jax.enable_x64(True):
        inputs = jax.tree.map(lambda x: jnp.asarray(x, jnp.float64), inputs)
        random = np.random.RandomState(4)
        tangents = jax.tree.map(lambda x: jnp.asarray(random.randn(*x.shape)), inputs)

        def derivatives(attend):
            def loss(inputs):
                return (attend(**inputs, **others) ** 3).sum()

            def along(inputs):
                gradient = jax.grad(loss)(inputs)
                return sum(map(jnp.vdot, jax.tree.leaves(gradient), jax.tree.leaves(tangents)))

            return jax.jit(
                lambda x: (
                    jax.jvp(loss, (x,), (tangents,)),
                    jax.jvp(jax.grad(loss), (x,), (tangents,))[1],
                    jax.grad(along)(x),
                )
            )(inputs)

        sharded = ops.Sharded(ops.RingAttention("seq"), mesh_of(2))
        actual = derivatives(functools.partial(sharded, implementation=SMALL))
        expected = derivatives(functools.partial(ops.attention, implementation="reference"))
        jax.tree.map(functools.partial(assert_close, scale=1000), actual, expected)


# Meshes


@pytest.mark.parametrize(
    ("form", "kind"),
    [*((form, AxisType.Auto) for form in FORMS), (ops.AllGatherAttention, AxisType.Explicit)],
)
def test_rows_and_heads_may_be_cut_too(form, kind):
    """Dropout and what a mask knows of heads count rows and heads from the first of all."""
    heads, length = 4, 12
    random = np.random.RandomState(5)
    q, k, v = (jnp.asarray(random.randn(B, length, heads, 3), jnp.float32) for _ in range(3))

    def near(q_pos, kv_pos, head, widths):
        return q_pos - kv_pos < widths[head]

    given = {
        "mask": masks.Blocks(random.rand(heads, 4, 4) < 0.7, 3)
        & masks.from_function(near, np.arange(heads) + 3),
        "score": scores.Alibi(positive(heads).astype("float32")),
        "sinks": jnp.asarray(normal(heads), jnp.float32),
        "dropout_rate": 0.3,
        "dropout_rng": jax.random.key(2),
        "scale": jnp.float32(0.4),
        "kv_positions": np.arange(length)[None],
    }  # fmt: skip
    mesh = mesh_of(2, 2, 2, names=("rows", "seq", "heads"), kind=kind)
    attend = ops.Sharded(form("seq", "rows", "heads"), mesh)
    expected = ops.attention(q, k, v, **given, implementation="reference")
    assert_close(attend(q, k, v, **given), expected)


@pytest.mark.parametrize(("key_heads", "devices"), [(1, 4), (2, 4), (4, 8), (8, 8)])
def test_ulysses_sends_a_key_head_to_all_that_ask_for_it(key_heads, devices):
    random = np.random.RandomState(6)
    q, k, v = (
        jnp.asarray(random.randn(1, LENGTH, n, 3), jnp.float32) for n in (8, key_heads, key_heads)
    )
    attend = ops.Sharded(ops.UlyssesAttention("seq"), mesh_of(devices))
    loss = lambda attend: lambda k, v: (attend(q, k, v) ** 2).sum()  # noqa: E731
    actual = jax.jit(jax.value_and_grad(loss(attend), argnums=(0, 1)))(k, v)
    expected = jax.value_and_grad(loss(ops.attention), argnums=(0, 1))(k, v)
    jax.tree.map(functools.partial(assert_close, scale=10), actual, expected)


def test_queries_and_keys_of_different_lengths_cross():
    random = np.random.RandomState(7)
    q, k, v = (
        jnp.asarray(random.randn(B, length, n, h), jnp.float32)
        for length, n in ((8, N), (20, K), (20, K))
    )
    attend = ops.Sharded(ops.RingAttention("seq"), mesh_of(4))
    mask = masks.Lengths(jnp.array([13, 20]))
    assert_close(attend(q, k, v, mask=mask), ops.attention(q, k, v, mask=mask))


# Zigzag


def test_a_zigzag_of_a_causal_sequence_and_back_changes_nothing():
    random = np.random.RandomState(8)
    q, k, v = (jnp.asarray(random.randn(1, 24, 2, 5), jnp.float32) for _ in range(3))
    order = zigzag(24, 4)
    attend = ops.Sharded(ops.RingAttention("seq"), mesh_of(4))
    out = attend(
        q[:, order], k[:, order], v[:, order], mask=masks.Causal(), q_positions=order,
        kv_positions=order,
    )  # fmt: skip
    assert_close(out[:, np.argsort(order)], ops.attention(q, k, v, mask=masks.Causal()))


def test_a_zigzag_gives_each_shard_a_piece_of_the_beginning_and_one_of_the_end():
    assert zigzag(12, 3).reshape(3, 4).tolist() == [[0, 1, 10, 11], [2, 3, 8, 9], [4, 5, 6, 7]]
    with pytest.raises(ValueError, match=r"length: wanted a multiple of 2 x 4 pieces.*got 12"):
        zigzag(12, 4)


def blocks_of_each_device(order, devices):
    """How many blocks each device computes under a causal mask, in blocks of the default sizes."""
    length = len(order) // devices
    x = np.zeros((1, length, 1, 1), np.float32)
    args = arguments.check(
        x, x, x, mask=masks.Causal(), score=None, scale=None, sinks=None, dropout_rate=0.0,
        dropout_rng=None, q_positions=None, kv_positions=None,
    )  # fmt: skip
    grid = grid_of(args, (None, None), Ring("seq", devices))
    shards = order.reshape(devices, length)
    covers = [
        [
            plan.coverage(args.mask, q[None, None, :, None], kv[None, None, None], args.head, grid)
            for kv in shards
        ]
        for q in shards
    ]
    return (np.array(covers) != masks.NONE).reshape(devices, -1).sum(1)


def test_a_zigzag_balances_the_work_of_a_causal_mask():
    contiguous = blocks_of_each_device(np.arange(4096), 8)
    balanced = blocks_of_each_device(zigzag(4096, 8), 8)
    assert contiguous.tolist() == [3 + 4 * i for i in range(8)]
    assert balanced.tolist() == [17] * 8  # as many in all


def test_nothing_is_computed_of_keys_that_no_query_of_a_device_may_see():
    """A value that is no number stays so even with weight 0, wherever it takes part."""
    ones = jnp.ones((1, 16, 1, 3))
    v = ones.at[:, 8:].set(jnp.nan)
    attend = ops.Sharded(ops.RingAttention("seq"), mesh_of(4))
    out = attend(ones, ones, v, mask=masks.Causal())
    assert_close(out[:, :8], ones[:, :8])
    assert np.isnan(out[:, 8:]).all()


# Memory


def compiled_gradient(devices, length_here):
    mesh = mesh_of(devices)
    cut = jax.sharding.NamedSharding(mesh, PartitionSpec(None, "seq"))
    x = jax.ShapeDtypeStruct((1, length_here * devices, 2, 32), jnp.float32, sharding=cut)
    attend = ops.Sharded(ops.RingAttention("seq"), mesh)
    loss = lambda *x: (attend(*x, mask=masks.Causal()) ** 2).sum()  # noqa: E731
    return jax.jit(jax.grad(loss, argnums=(0, 1, 2))).lower(x, x, x).compile().memory_analysis()


def test_a_device_of_a_ring_needs_no_more_memory_where_others_have_more_tokens():
    """Forward and backward."""
    two, eight = (compiled_gradient(n, 512).temp_size_in_bytes for n in (2, 8))
    assert eight < 1.02 * two


# Bad input


def call(form=ops.RingAttention, devices=4, T=8, S=8, heads=6, key_heads=6, mesh=None, **kwargs):
    q, k, v = (jnp.ones((1, n, m, 3)) for n, m in ((T, heads), (S, key_heads), (S, key_heads)))
    mesh = mesh_of(devices) if mesh is None else mesh
    return ops.Sharded(form("seq", **kwargs), mesh)(q, k, v)


@pytest.mark.parametrize(
    ("given", "message"),
    [
        ({"T": 10}, "axis_name: the 4 devices along 'seq' do not divide T = 10"),
        ({"S": 9}, "axis_name: the 4 devices along 'seq' do not divide S = 9"),
        ({"T": 4}, "q: 1 tokens on each of 4 devices along 'seq', wanted at least 2"),
        ({"S": 4}, "k: 1 tokens on each of 4 devices along 'seq', wanted at least 2"),
        ({"form": ops.UlyssesAttention}, "q: 6 heads cannot be shared by the 4 devices"),
        (
            {"head_axis": "heads", "key_heads": 3, "mesh": ("seq", "heads")},
            "head_axis: the 2 devices along 'heads' do not divide K = 3",
        ),
        (
            {"batch_axis": "rows", "mesh": ("seq", "rows")},
            "batch_axis: the 2 devices along 'rows' do not divide B = 1",
        ),
        (
            {"head_axis": "tensor"},
            r"head_axis: the mesh has no axis \['tensor'\], it has \['seq'\]",
        ),
    ],
)
def test_a_mesh_that_does_not_divide_is_an_error_that_names_what(given, message):
    if "mesh" in given:
        given = given | {"mesh": mesh_of(2, 2, names=given["mesh"])}
    with pytest.raises(ValueError, match=message):
        call(**given)


def test_outside_of_shard_map_there_is_no_axis_and_the_error_says_so():
    x = jnp.ones((1, 8, 2, 3))
    for form in FORMS:
        with pytest.raises(ValueError, match=r"axis_name: wanted an axis .* got 'seq'; call this"):
            form("seq")(x, x, x)


def test_a_ring_refuses_the_reference_and_an_operand_of_another_length():
    x = jnp.ones((1, 8, 2, 3))
    attend = ops.Sharded(ops.RingAttention("seq"), mesh_of(2))
    with pytest.raises(NotImplementedError, match=r"implementation: .* got 'reference'"):
        attend(x, x, x, implementation="reference")
    with pytest.raises(ValueError, match=r"score: Bias.array has shape \[1, 1, 8, 7\]"):
        attend(x, x, x, score=scores.Bias(jnp.ones((8, 7))))
