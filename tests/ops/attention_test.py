"""Every implementation of attention, on every case, in every dtype: values, gradients, statistics.

A new implementation joins by its name in IMPLEMENTATIONS, a new mask or score by a line in CASES.
"""

import functools

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from qkv_jax import ops
from qkv_jax.ops import masks, scores
from tests.ops.attention_cases import (
    CASES,
    allowed,
    coordinates,
    numpy_attention,
    rounded,
)
from tests.tolerances import assert_close

IMPLEMENTATIONS = ["reference", ops.Blockwise(block_q=2, block_kv=3)]
QUICK = {"xla_backend_optimization_level": 0}  # to compile
DTYPES = ["float32", "bfloat16", "float64"]
every_case = pytest.mark.parametrize("name", CASES)
every_implementation = pytest.mark.parametrize("implementation", IMPLEMENTATIONS)
# What `make test` takes in every dtype; of the others, float32 alone.
IN_EVERY_DTYPE = (
    "full",
    "causal_last_queries",
    "segments",
    "scores_in_order",
    "everything_at_once",
)


def each_way(test):
    """Each case, on every implementation, in every dtype."""
    slow = pytest.mark.slow
    ways = [
        pytest.param(
            name, implementation, dtype,
            marks=() if dtype == "float32" or name in IN_EVERY_DTYPE else slow,
        )
        for name in CASES for implementation in IMPLEMENTATIONS for dtype in DTYPES
    ]  # fmt: skip
    return pytest.mark.parametrize(("name", "implementation", "dtype"), ways)(test)


@functools.cache
def both_passes(name, implementation, dtype):
    """The function of inputs and cotangents that `results` calls, compiled where that pays."""
    case = CASES[name]

    def values_and_gradients(inputs, cotangent):
        def call(inputs):
            return ops.attention_with_stats(**inputs, **case.others, implementation=implementation)

        values, pullback = jax.vjp(call, inputs)
        return values, *pullback(cotangent)

    if implementation == "reference" and case.inputs["q"].shape == CASES["full"].inputs["q"].shape:
        # One operation after another is quicker, but only where many cases share their shapes.
        return values_and_gradients
    return jax.jit(values_and_gradients, compiler_options=QUICK)


@functools.cache
def results(name, implementation, dtype, stats_too=True):
    """The output, the statistics, and the gradients of all inputs, as NumPy arrays.

    Without `stats_too`, the gradients are those of the output alone.
    """
    with jax.enable_x64(dtype == "float64"), jax.numpy_rank_promotion("raise"):
        inputs = jax.tree.map(lambda x: jnp.asarray(x, dtype), CASES[name].inputs)
        out_ct, stats_ct = cotangents(name)
        wide = jnp.promote_types(dtype, jnp.float32)
        stats_ct = jax.tree.map(lambda x: jnp.asarray(x * stats_too, wide), stats_ct)
        (out, stats), gradients = both_passes(name, implementation, dtype)(
            inputs, (jnp.asarray(out_ct, dtype), stats_ct)
        )
        return jax.tree.map(np.asarray, (out, dict(stats), gradients))


def cotangents(name):
    """Random cotangents of the output and of the statistics, max_logit among them."""
    B, T, N, _ = CASES[name].inputs["q"].shape
    h = CASES[name].inputs["v"].shape[-1]
    random = np.random.RandomState(1)
    out, stats = rounded(random.randn(B, T, N, h)), rounded(random.randn(3, B, N, T))
    return out, ops.Stats(lse=stats[0], max_logit=stats[1], entropy=stats[2])


@each_way
def test_output_and_statistics_are_those_of_numpy(name, implementation, dtype):
    out, stats, _ = results(name, implementation, dtype)
    expected = numpy_attention(CASES[name], **CASES[name].inputs)
    assert out.dtype == dtype
    assert_close(out, expected["out"])
    for key, values in stats.items():
        # Logits, softmax and sums are float32 for bfloat16 input too.
        assert values.dtype == ("float64" if dtype == "float64" else "float32")
        assert_close(values, expected[key])


@each_way
def test_gradients_are_those_of_the_reference_in_float64(name, implementation, dtype):
    *_, gradients = results(name, implementation, dtype)
    *_, expected = results(name, "reference", "float64")
    assert jax.tree.structure(gradients) == jax.tree.structure(expected)
    for gradient, wanted in zip(jax.tree.leaves(gradients), jax.tree.leaves(expected), strict=True):
        assert gradient.dtype == dtype
        assert_close(gradient, wanted, scale=2)


@every_case
def test_gradients_of_the_reference_are_those_of_numpy(name):
    """Along a random direction of each input: the complex step, exact to the last digit."""
    case = CASES[name]
    *_, gradients = results(name, "reference", "float64")
    out_ct, stats_ct = cotangents(name)
    leaves, treedef = jax.tree.flatten(case.inputs)
    random = np.random.RandomState(2)
    for i, gradient in enumerate(jax.tree.leaves(gradients)):
        direction = random.randn(*np.shape(leaves[i]))
        moved = [x + 1e-30j * direction if j == i else x for j, x in enumerate(leaves)]
        with np.errstate(invalid="ignore"):
            end = numpy_attention(case, **jax.tree.unflatten(treedef, moved))
        derivative = sum(
            np.sum(ct * np.imag(end[key]) / 1e-30)
            for key, ct in (("out", out_ct), *stats_ct.items())
        )
        assert_close(np.sum(gradient * direction), derivative, scale=30)


@functools.cache
def jax_nn_attention():
    """jax.nn's attention and its gradients; mask and bias are arguments, so it compiles rarely."""

    def call(q, k, v, bias, mask):
        # jax.nn wants values as wide as keys.
        width = max(q.shape[-1], v.shape[-1])
        pad = lambda x: jnp.pad(x, ((0, 0), (0, 0), (0, 0), (0, width - x.shape[-1])))  # noqa: E731
        out = jax.nn.dot_product_attention(pad(q), pad(k), pad(v), bias, mask, scale=1.0)
        return out[..., : v.shape[-1]]

    def values_and_gradients(q, k, v, bias, mask, cotangent):
        out, pullback = jax.vjp(lambda q, k, v: call(q, k, v, bias, mask), q, k, v)
        return out, pullback(cotangent)

    return jax.jit(values_and_gradients)


def jax_nn_can(case):
    return (
        case.additive
        and "dropout_rate" not in case.others
        and "sinks" not in case.inputs
        and allowed(case).any(-1).all()  # without a key, jax.nn takes the mean of the values
    )


@every_implementation
@pytest.mark.parametrize("name", [name for name, case in CASES.items() if jax_nn_can(case)])
def test_what_jax_nn_can_express_is_what_jax_nn_computes(name, implementation):
    case = CASES[name]
    q, k, v = (jnp.asarray(case.inputs[x], jnp.float32) for x in "qkv")
    scale = case.others.get("scale", q.shape[-1] ** -0.5)
    bias = np.zeros((1, 1, 1, 1))
    if "score" in case.inputs:
        q_pos, kv_pos, _ = coordinates(case)
        bias = case.numpy_score(case.inputs["score"], bias, q_pos, kv_pos)
    bias = jnp.asarray(np.broadcast_to(bias, allowed(case).shape), jnp.float32)
    cotangent = jnp.asarray(cotangents(name)[0], jnp.float32)
    expected = jax_nn_attention()(q * scale, k, v, bias, allowed(case), cotangent)
    out, _, gradients = results(name, implementation, "float32", stats_too=False)
    assert_close(out, expected[0])
    assert_close(gradients["q"], expected[1][0] * scale, scale=2)
    assert_close(gradients["k"], expected[1][1], scale=2)
    assert_close(gradients["v"], expected[1][2], scale=2)


@pytest.mark.parametrize("traced", ["all arrays", "the queries alone"])
@every_implementation
@every_case
def test_any_array_may_be_an_argument_of_jit_or_a_constant(name, implementation, traced):
    case = CASES[name]
    numbers = {"implementation": implementation}
    numbers |= {key: case.others[key] for key in ("scale", "dropout_rate") if key in case.others}
    arrays = {key: x for key, x in case.others.items() if key not in numbers}
    if traced == "all arrays":
        call = lambda inputs, arrays: ops.attention(**inputs, **arrays, **numbers)  # noqa: E731
        out = jax.eval_shape(call, case.inputs, arrays)
    else:
        given = case.inputs | arrays | numbers
        out = jax.eval_shape(lambda q: ops.attention(**(given | {"q": q})), case.inputs["q"])
    assert out.shape == case.inputs["q"].shape[:3] + case.inputs["v"].shape[3:]
    assert out.dtype == "float32"


@every_implementation
@pytest.mark.parametrize("name", ["empty_rows", "everything_forbidden", "everything_at_once"])
def test_empty_rows_give_nothing_and_no_nan(name, implementation):
    case = CASES[name]
    empty = ~allowed(case).any(-1)
    assert empty.any()
    with jax.debug_nans(True):
        out, stats, gradients = results.__wrapped__(name, implementation, "float32")
    q_empty = np.swapaxes(empty, 1, 2)
    assert (out[q_empty] == 0).all()
    assert (gradients["q"][q_empty] == 0).all() or "sinks" in case.inputs
    assert all(np.isfinite(x).all() for x in jax.tree.leaves(gradients))
    assert (stats["max_logit"][empty] == -np.inf).all()
    assert (stats["entropy"][empty] == 0).all()
    sinks = case.inputs.get("sinks", np.full(empty.shape[1], -np.inf))
    assert_close(stats["lse"][empty], np.broadcast_to(sinks[None, :, None], empty.shape)[empty])


@every_implementation
def test_a_key_that_nobody_may_attend_to_has_no_gradient_even_if_it_is_huge(implementation):
    q, k, v = (jnp.asarray(CASES["full"].inputs[x], jnp.float32) for x in "qkv")
    k = k.at[:, -1].set(1e30)

    def loss(q, k, v):
        out, stats = ops.attention_with_stats(
            q, k, v, mask=masks.Lengths(6), implementation=implementation
        )
        return (out**2).sum() + stats.lse.sum() + stats.entropy.sum()

    gradients = jax.jit(jax.grad(loss, argnums=(0, 1, 2)))(q, k, v)
    assert all(np.isfinite(gradient).all() for gradient in gradients)
    assert (gradients[1][:, -1] == 0).all()
    assert (gradients[2][:, -1] == 0).all()


@every_implementation
def test_large_logits_do_not_overflow(implementation):
    q, k, v = (jnp.asarray(CASES["full"].inputs[x], jnp.float32) for x in "qkv")
    out, stats = ops.attention_with_stats(q, k, v, scale=1e4, implementation=implementation)
    largest = ops.attention_weights(q, k, scale=1e4).argmax(-1)
    B, T, N, _ = q.shape
    for b, t, n in np.ndindex(B, T, N):
        assert_close(out[b, t, n], v[b, largest[b, n, t], n // 2])
    assert_close(stats.lse, stats.max_logit, scale=10)
    shifted = ops.attention_weights(q, k, score=scores.Bias(np.full((5, 7), 1e3, np.float32)))
    assert_close(shifted, ops.attention_weights(q, k), scale=30)


@every_implementation
def test_the_output_has_the_dtype_of_the_values(implementation):
    q, k, v = (jnp.asarray(CASES["full"].inputs[x], jnp.float32) for x in "qkv")
    out = ops.attention(q, k, v.astype("bfloat16"), implementation=implementation)
    assert out.dtype == "bfloat16"
    # The softmax is float32 all the same: only the values and the result are rounded.
    wide = ops.attention(q, k, v.astype("bfloat16").astype("float32"))
    assert_close(out, wide.astype("bfloat16"), scale=0.5)


@every_implementation
@pytest.mark.parametrize("name", ["causal_last_queries", "everything_at_once"])
def test_float64_is_computed_in_float64(name, implementation):
    """With inputs that no narrower dtype holds, and the softmax too: that of jax.nn is float32."""
    case = CASES[name]
    inputs = jax.tree.map(lambda x: x * np.pi / 3, case.inputs)
    expected = numpy_attention(case, **inputs)
    with jax.enable_x64(True):
        out, stats = ops.attention_with_stats(
            **inputs, **case.others, implementation=implementation
        )
        assert np.abs(np.asarray(out) - expected["out"]).max() < 1e-14
        assert_close(stats.lse, expected["lse"])
        assert_close(stats.entropy, expected["entropy"])
        if name == "causal_last_queries":
            q, k, v = (jnp.asarray(inputs[x]) for x in "qkv")
            no_bias, cotangent = jnp.zeros((1, 1, 1, 1)), jnp.zeros(out.shape)
            theirs, _ = jax_nn_attention()(
                q * q.shape[-1] ** -0.5, k, v, no_bias, allowed(case), cotangent
            )
            assert np.abs(np.asarray(theirs) - expected["out"]).max() > 1e-10


# Weights


@every_case
def test_weights_sum_to_one_and_give_the_output(name):
    case = CASES[name]
    inputs = jax.tree.map(lambda x: jnp.asarray(x, jnp.float32), case.inputs)
    v = inputs.pop("v")
    weights = np.asarray(ops.attention_weights(**inputs, **case.others))
    assert_close(weights, numpy_attention(case, **case.inputs)["weights"])
    assert (weights[~allowed(case)] == 0).all()
    if "dropout_rate" not in case.others and "sinks" not in case.inputs:
        assert_close(weights.sum(-1), allowed(case).any(-1).astype(np.float32))
    G = weights.shape[1] // v.shape[2]
    out = np.einsum("bnts,bsnh->btnh", weights, np.repeat(v, G, axis=2))
    assert_close(out, results(name, "reference", "float32")[0])


@every_implementation
def test_no_output_depends_on_a_future_key_or_value(implementation):
    """Causality proved by a gradient: out[t] has derivative 0 in k[s] and v[s] for all s > t."""
    case = CASES["causal"]
    q, k, v = (jnp.asarray(case.inputs[x], jnp.float32) for x in "qkv")

    def out_by_token(k, v):
        out = ops.attention(q, k, v, mask=masks.Causal(), implementation=implementation)
        return jnp.swapaxes(out, 0, 1).reshape(q.shape[1], -1).sum(-1)  # [T]

    for jacobian in jax.jit(jax.jacrev(out_by_token, argnums=(0, 1)))(k, v):
        by_pair = np.abs(np.moveaxis(jacobian, 2, 1)).sum((-3, -2, -1))  # [T, S]
        assert (np.triu(by_pair, 1) == 0).all()
        assert (np.diag(by_pair)[1:] > 0).all()


def test_none_picks_an_implementation_that_honours_all_arguments():
    case = CASES["everything_at_once"]
    inputs = jax.tree.map(lambda x: jnp.asarray(x, jnp.float32), case.inputs)
    out = ops.attention(**inputs, **case.others)
    assert_close(out, results("everything_at_once", "reference", "float32")[0])
