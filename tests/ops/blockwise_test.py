"""What is `blockwise`'s own: what it skips, what it costs, and that blocks change nothing."""

import functools
import subprocess
import sys

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from qkv_jax import ops
from qkv_jax.ops import masks, scores
from tests.tolerances import assert_close

RANDOM = np.random.RandomState(0)
QUICK = {"xla_backend_optimization_level": 0}  # to compile
SMALL = ops.Blockwise(block_q=8, block_kv=16)
attend = functools.partial(ops.attention, implementation=SMALL)


def arrays(T, S, B=2, N=4, K=2, H=5, h=3):
    shapes = (B, T, N, H), (B, S, K, H), (B, S, K, h)
    return [jnp.asarray(RANDOM.randn(*shape), jnp.float32) for shape in shapes]


# Blocks that are skipped, and blocks that skip the predicate


@pytest.mark.parametrize("known", [True, False], ids=["known", "traced"])
def test_a_block_in_which_nothing_is_allowed_is_never_computed(known):
    """It holds NaN, which 0 times NaN would spread, and which the rows' own keys do not."""
    q, k, v = arrays(29, 37)
    clean = k, v
    k, v = (x.at[:, 16:32].set(jnp.nan) for x in (k, v))  # the second block of keys

    def values_and_gradients(q, k, v, positions, length):
        def loss(q, k, v):
            mask = masks.Lengths(length) & masks.SlidingWindow(None, None)
            out, stats = ops.attention_with_stats(
                q, k, v, mask=mask, q_positions=positions, implementation=SMALL
            )
            return (out**2).sum() + stats.entropy.sum()

        return jax.value_and_grad(loss, argnums=(0, 1, 2))(q, k, v)

    known_or_not = (np.arange(29), np.array([16, 9]))
    if not known:
        values_and_gradients = jax.jit(values_and_gradients)
    actual = values_and_gradients(q, k, v, *known_or_not)
    jax.tree.map(assert_close, actual, values_and_gradients(q, *clean, *known_or_not))


class Liar(masks.Mask):
    """Forbids every key, and says of every block that it allows all of them."""

    def mask(self, q_pos, kv_pos, head):
        return (q_pos != q_pos) & (kv_pos != kv_pos)

    def cover(self, q_interval, kv_interval, bounds):
        return (q_interval[0] == q_interval[0]) * np.int8(masks.ALL) + 0 * kv_interval[0]


@pytest.mark.parametrize("traced", [False, True])
def test_a_block_in_which_all_is_allowed_never_tests_the_predicate(traced):
    q, k, v = arrays(16, 32)

    def values_and_gradients(q, k, v, positions, mask):
        def loss(q, k, v):
            out = attend(q, k, v, mask=mask, q_positions=positions)
            return (out**2).sum()

        return jax.value_and_grad(loss, argnums=(0, 1, 2))(q, k, v)

    expected = values_and_gradients(q, k, v, np.arange(16), None)
    call = jax.jit(values_and_gradients) if traced else values_and_gradients
    jax.tree.map(assert_close, call(q, k, v, np.arange(16), Liar()), expected)


def test_an_exact_cover_skips_what_its_function_forbids():
    same_tile = masks.from_function(
        lambda q, kv, head, size: q // size == kv // size, 16, exact=True
    )
    explanation = ops.explain(*arrays(64, 64), mask=same_tile, implementation=SMALL)
    assert (explanation.skipped, explanation.partial, explanation.full) == (8 * 24, 0, 8 * 8)


# Nothing depends on the blocks


@pytest.mark.parametrize("blocks", [(1, 1), (3, 50), (29, 7), (64, 64)])
def test_dropout_and_everything_else_is_the_same_for_every_block_size(blocks):
    q, k, v = arrays(29, 37)

    def values_and_gradients(implementation):
        def loss(q, k, v):
            out, stats = ops.attention_with_stats(
                q, k, v, mask=masks.Causal(), q_positions=np.arange(8, 37), dropout_rate=0.4,
                dropout_rng=jax.random.key(3), implementation=implementation,
            )  # fmt: skip
            return (out**2).sum() + stats.entropy.sum(), out

        return jax.jit(jax.value_and_grad(loss, argnums=(0, 1, 2), has_aux=True))(q, k, v)

    actual, expected = values_and_gradients(ops.Blockwise(*blocks)), values_and_gradients(None)
    jax.tree.map(functools.partial(assert_close, scale=20), actual, expected)


MASKS = [
    masks.Causal(), masks.SlidingWindow(5, 2), masks.Chunked(7), masks.Prefix(11),
    masks.Lengths(np.array([19, 4])), masks.Global((0, 13)), masks.Dilated(3),
    masks.SlidingWindow(np.array([1, 4, 9, 30])),
]  # fmt: skip
SCORES = [
    scores.Softcap(2.0),
    scores.Alibi(RANDOM.rand(4).astype(np.float32)),
    scores.RelativeBias(RANDOM.randn(8, 4).astype(np.float32), max_distance=12),
    scores.Temperature(np.float32([0.5, 1, 2, 1.5])),
]
some_mask = st.recursive(
    st.sampled_from(MASKS),
    lambda inner: st.one_of(
        st.tuples(inner, inner).map(lambda pair: pair[0] & pair[1]),
        st.tuples(inner, inner).map(lambda pair: pair[0] | pair[1]),
        inner.map(lambda mask: ~mask),
    ),
    max_leaves=3,
)


@settings(max_examples=8, deadline=None, derandomize=True)
@given(
    T=st.integers(1, 43),
    S=st.integers(1, 53),
    block_q=st.integers(1, 20),
    block_kv=st.integers(1, 20),
    K=st.sampled_from([1, 2, 4]),
    mask=some_mask,
    score=st.lists(st.sampled_from(SCORES), max_size=2).map(tuple),
    sinks=st.booleans(),
    positions=st.randoms(use_true_random=False),
)
def test_any_shape_mask_and_score_gives_what_the_reference_gives(
    T, S, block_q, block_kv, K, mask, score, sinks, positions
):
    q, k, v = arrays(T, S, K=K)
    others = {
        "mask": mask,
        "q_positions": np.array([positions.randrange(60) for _ in range(T)]),
        "kv_positions": np.array([positions.randrange(60) for _ in range(S)]),
    }
    sinks = jnp.ones(4) if sinks else None

    def values_and_gradients(implementation):
        def call(q, k, v, score):
            out, stats = ops.attention_with_stats(
                q, k, v, score=score, sinks=sinks, implementation=implementation, **others
            )
            return out, stats.entropy, jnp.where(stats.lse > -jnp.inf, stats.lse, 0)

        out, pullback = jax.vjp(call, q, k, v, score)
        return out, pullback(jax.tree.map(jnp.ones_like, out))

    implementations = ops.Blockwise(block_q, block_kv), "reference"
    actual, expected = (
        jax.jit(functools.partial(values_and_gradients, x), compiler_options=QUICK)()
        for x in implementations
    )
    # A table's or a slope's gradient sums thousands of terms.
    jax.tree.map(lambda a, b: assert_close(a, b, scale=30), actual, expected)


# Memory


def temporary_bytes(T, of):
    """What the compiled program needs besides arguments and results."""
    q, k, v = (jax.ShapeDtypeStruct((1, T, 2, 16), jnp.float32) for _ in range(3))
    slopes = jax.ShapeDtypeStruct((2,), jnp.float32)

    def loss(q, k, v, slopes):
        score = (scores.Alibi(slopes), scores.Softcap(5.0))
        out, stats = ops.attention_with_stats(
            q, k, v, mask=masks.Causal(), score=score, implementation=ops.Blockwise(128, 128)
        )
        return (out**2).sum() + stats.entropy.sum()

    functions = {
        "values": loss,
        "gradients": jax.grad(loss, argnums=(0, 1, 2, 3)),
        "forward over reverse": lambda *x: jax.jvp(jax.grad(loss), x, x)[1],
        "reverse over forward": jax.grad(lambda *x: jax.jvp(loss, x, x)[1]),
    }
    return (
        jax.jit(functions[of]).lower(q, k, v, slopes).compile().memory_analysis().temp_size_in_bytes
    )


@pytest.mark.parametrize(
    "of", ["values", "gradients", "forward over reverse", "reverse over forward"]
)
def test_memory_grows_linearly(of):
    """Eight times the length; T x S would be 64 times, and is 134 MB an array at the end."""
    short, long = temporary_bytes(512, of), temporary_bytes(4096, of)
    assert long < 9 * short
    assert long < 40 * 4096 * 2 * 16 * 4  # forty arrays of the size of q


def test_the_gradient_of_a_bias_is_as_large_as_the_bias_and_no_larger():
    q, k, v = arrays(512, 512, B=1, N=4, K=4, H=16, h=16)
    bias = jnp.zeros((1, 4, 512, 512))

    def loss(bias):
        score = scores.Bias(bias)
        return (ops.attention(q, k, v, score=score, implementation=SMALL) ** 2).sum()

    memory = jax.jit(jax.grad(loss)).lower(bias).compile().memory_analysis()
    assert memory.output_size_in_bytes < 1.01 * bias.nbytes
    assert memory.temp_size_in_bytes < 1.3 * bias.nbytes


# JAX's transformations


def test_arguments_may_be_donated():
    q, k, v = arrays(29, 29, h=5)
    expected = attend(q, k, v)
    donated = q + 0
    assert_close(jax.jit(attend, donate_argnums=0)(donated, k, v), expected)
    assert donated.is_deleted()


def test_repeated_calls_compile_once():
    q, k, v = arrays(29, 29)

    def gradient():
        mask, score = masks.Causal(), scores.Alibi(jnp.ones(4))
        return jax.grad(lambda q: attend(q, k, v, mask=mask, score=score).sum())(q)

    gradient()
    with jax.log_compiles(True), pytest.MonkeyPatch.context() as patch:
        compiled = []
        patch.setattr("logging.Logger.warning", lambda self, text, *args: compiled.append(text))
        gradient()
    assert not [text for text in compiled if "Compiling" in text]


def test_a_third_derivative_is_that_of_the_reference():
    with jax.enable_x64(True):
        q, k, v = (jnp.asarray(RANDOM.randn(1, 19, 2, 3)) for _ in range(3))

        def third(implementation):
            def along(x):
                out = ops.attention(
                    q + x * k, k, v, mask=masks.Causal(), implementation=implementation
                )
                return (out**2).sum()

            return jax.jit(jax.grad(jax.grad(jax.grad(along))))(0.1)

        assert_close(third(SMALL), third("reference"), scale=100)


SHARDED = """
import functools, jax
jax.config.update("jax_num_cpu_devices", 4)
import jax.numpy as jnp, numpy as np
from jax.sharding import AxisType, PartitionSpec as P
from qkv_jax import ops
from qkv_jax.ops import masks, scores

mesh = jax.make_mesh((2, 2), ("data", "heads"), axis_types=(AxisType.Auto,) * 2)
random = np.random.RandomState(0)
q, k, v = (jnp.asarray(random.randn(4, 37, n, 8), "float32") for n in (4, 2, 2))
slopes = jnp.asarray(random.rand(4), "float32")
ids = jnp.asarray(np.sort(random.randint(0, 3, (4, 37)), 1))

def attend(q, k, v, slopes, ids):
    out, stats = ops.attention_with_stats(
        q, k, v, mask=masks.Causal() & masks.Segments(ids),
        score=(scores.Alibi(slopes), scores.Softcap(3.0)), implementation=ops.Blockwise(8, 16),
    )
    return out, stats.entropy

heads = P("data", None, "heads")
specs = heads, heads, heads, P("heads"), P("data")
sharded = jax.shard_map(attend, mesh=mesh, in_specs=specs, out_specs=(heads, P("data", "heads")))

def results(f):
    def loss(inputs):
        out, entropy = f(*inputs, ids)
        return (out**3).sum() + (entropy**2).sum()
    inputs = (q, k, v, slopes)
    dot = lambda a, b: sum(map(jnp.vdot, a, b))
    return jax.jit(lambda x: (
        jax.value_and_grad(loss)(x),
        jax.jvp(jax.grad(loss), (x,), (x,))[1],
        jax.grad(lambda y: dot(jax.grad(loss)(y), x))(x),
    ))(inputs)

for actual, expected in zip(jax.tree.leaves(results(sharded)), jax.tree.leaves(results(attend))):
    np.testing.assert_allclose(actual, expected, rtol=1e-4, atol=1e-4 * abs(expected).max())
print("equal")
"""


def test_shard_map_over_batch_and_heads_changes_nothing():
    """Values, gradients and Hessian-vector products both ways, on four devices."""
    run = subprocess.run(
        [sys.executable, "-W", "error", "-c", SHARDED], capture_output=True, text=True, timeout=300
    )
    assert run.stdout.strip() == "equal", run.stderr[-2000:]


# Bad input


def test_a_function_that_closes_over_a_traced_array_is_an_error_that_says_what_to_do():
    q, k, v = arrays(29, 29)

    def loss(slopes):
        score = scores.from_function(lambda logits, q_pos, kv_pos, head: logits * slopes[head])
        return attend(q, k, v, score=score).sum()

    with pytest.raises(ValueError, match=r"closes over a traced array, float32\[4\]; pass it as"):
        jax.grad(loss)(jnp.ones(4))


def test_a_score_of_another_shape_or_dtype_is_an_error_before_anything_compiles():
    q, k, v = arrays(29, 29)
    for f in (lambda x, *_: x[..., :1], lambda x, *_: x.astype(jnp.bfloat16)):
        with pytest.raises(ValueError, match="f must return float32"):
            attend(q, k, v, score=scores.from_function(f))


@pytest.mark.parametrize("sizes", [{"block_q": 0}, {"block_kv": -1}, {"block_q": 2.5}])
def test_block_sizes_are_positive_integers(sizes):
    with pytest.raises(ValueError, match=f"{next(iter(sizes))} must be a positive integer"):
        ops.Blockwise(**sizes)


def test_an_unknown_implementation_is_an_error():
    with pytest.raises(ValueError, match=r"implementation: wanted one of .*'blockwise'.*'flash'"):
        ops.attention(*arrays(5, 5), implementation="flash")
