"""What splash attention is told of a call, and what it is not asked.

The kernel itself is computed on any device in JAX's own operations (`interpret`), and its programs
are made for a TPU on any machine. On a TPU the calls run through it.
"""

import dataclasses
import functools

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from qkv_jax import ops
from qkv_jax.ops import arguments, kernels, masks, scores, splash
from tests.ops.attention_cases import CASES, allowed
from tests.tolerances import assert_close

INTERPRETED = dataclasses.replace(
    splash.SPLASH, platform="cpu", attend=functools.partial(splash.attend, interpret=True)
)
on_a_tpu = pytest.mark.skipif(
    kernels.platform() != "tpu", reason=f"needs a TPU, JAX has {kernels.platform()!r}"
)
B, T, N, K, H = 2, 128, 2, 1, 64
RANDOM = np.random.RandomState(0)


def normal(*shape, dtype=jnp.bfloat16):
    return jnp.asarray(RANDOM.randn(*shape), dtype)


def call(T=T, S=None, *, H=H, h=H, sinks=None, dtype=jnp.bfloat16, **others):
    """Inputs with gradients, and the other arguments."""
    S = S or T
    shapes = {"q": (B, T, N, H), "k": (B, S, K, H), "v": (B, S, K, h)}
    inputs = {name: normal(*shape, dtype=dtype) for name, shape in shapes.items()}
    return inputs | ({} if sinks is None else {"sinks": sinks}), others


IDS = np.sort(RANDOM.randint(0, 4, (B, T)), axis=1)
CALLS = {
    "full": call(128, 256, h=128),
    "causal": call(256, mask=masks.Causal()),
    "window": call(mask=masks.SlidingWindow(40, 7)),
    "lengths": call(128, 256, mask=masks.Lengths(np.array([0, 77]))),
    "causal_and_lengths": call(mask=masks.Causal() & masks.Lengths(jnp.array([0, 77]))),
    "window_and_lengths": call(
        mask=masks.Causal() & masks.SlidingWindow(20) & masks.Lengths(np.array([0, 77]))
    ),
    "documents": call(mask=masks.Causal() & masks.Segments(jnp.asarray(IDS))),
    "other_documents": call(
        mask=masks.Causal() & masks.Segments(jnp.asarray(IDS), jnp.asarray(3 - IDS))
    ),
    "last_queries": call(128, 256, mask=masks.Causal(), q_positions=np.arange(128, 256)),
    "a_known_mask_with_empty_rows": call(mask=masks.Causal() & ~masks.Prefix(50)),
    "a_window_per_head": call(mask=masks.SlidingWindow(np.array([3, 90]))),
    "softcap": call(mask=masks.Causal(), score=scores.Softcap(2.0), scale=0.3),
    "sinks": call(mask=masks.Causal() & ~masks.Prefix(50), sinks=normal(N)),
}
QUICK = ("window_and_lengths", "sinks")  # the others take as long


def checked(inputs, others):
    settings = dict.fromkeys(("mask", "score", "scale", "sinks", "dropout_rng"))
    settings |= dict.fromkeys(("q_positions", "kv_positions")) | {"dropout_rate": 0.0}
    return arguments.check(**settings | inputs | others)


def both_passes(implementation, others):
    def both(inputs):
        def attend(inputs):
            return ops.attention(**inputs, **others, implementation=implementation)

        out, pullback = jax.vjp(attend, inputs)
        cotangent = np.random.RandomState(3).randn(*out.shape)
        return out, *pullback(jnp.asarray(cotangent, jnp.bfloat16).astype(out.dtype))

    return both


def check_values_and_gradients(implementation, inputs, others):
    found = jax.jit(both_passes(implementation, others))(inputs)
    wide = jax.tree.map(lambda x: x.astype(jnp.float32), inputs)
    expected = jax.jit(both_passes("reference", others))(wide)
    for x, wanted in zip(*map(jax.tree.leaves, (found, expected)), strict=True):
        assert x.dtype == jnp.bfloat16
        assert_close(x, wanted, scale=2)
    empty = ~jnp.any(expected[0] != 0, axis=(2, 3))
    assert (found[0][empty] == 0).all() and (found[1]["q"][empty] == 0).all()


@pytest.mark.parametrize(
    "name", [n if n in QUICK else pytest.param(n, marks=pytest.mark.slow) for n in CALLS]
)
def test_what_is_honoured_equals_the_reference(name):
    check_values_and_gradients(INTERPRETED, *CALLS[name])


@on_a_tpu
@pytest.mark.parametrize("name", CALLS)
def test_on_a_tpu_splash_equals_the_reference(name):
    check_values_and_gradients("splash", *CALLS[name])


@pytest.mark.parametrize("name", ["causal", "other_documents", "a_window_per_head", "sinks"])
def test_a_program_for_a_tpu_holds_three_kernels(name):
    """Forward, and backward for the queries and for the keys; made here, run nowhere."""
    inputs, others = CALLS[name]
    traced = jax.jit(both_passes(splash.SPLASH, others)).trace(inputs)
    program = traced.lower(lowering_platforms=("tpu",)).as_text()
    for phase in ("fwd", "dkv", "dq"):
        assert program.count(f'kernel_name = "splash_mha_{phase}') == 1


@pytest.mark.parametrize("name", CALLS)
def test_each_query_has_a_key_in_what_the_kernel_sees(name):
    args = checked(*CALLS[name])
    T, S = args.q.shape[1], args.k.shape[1]
    heads, ids, empty = splash.translated(args)
    seen = np.stack([head[:, :] for head in heads])[None]
    if ids is not None:
        seen = seen & np.asarray(ids.q[:, :, None] == ids.kv[:, None])[:, None]
    assert seen.any(-1).all()
    where = args.q_pos, args.kv_pos, args.head
    wanted = np.ones((B, N, T, S), bool)
    if args.mask is not None:
        wanted = np.broadcast_to(args.mask.mask(*where), wanted.shape)
    gone = np.zeros((B, T, N, 1), bool) if empty is None else np.asarray(empty)
    np.testing.assert_array_equal(
        np.broadcast_to(gone, (B, T, N, 1))[..., 0], ~np.swapaxes(wanted.any(-1), 1, 2)
    )
    kept = wanted.any(-1, keepdims=True)
    np.testing.assert_array_equal(seen & kept, wanted)


def test_masks_of_the_harness_are_known_or_refused():
    """Of those that are the same for all rows, the array is the truth."""
    refused = set()
    for name, case in CASES.items():
        args = checked(case.inputs, {k: x for k, x in case.others.items() if k != "dropout_rng"}
                       | {"dropout_rate": 0.0})  # fmt: skip
        found = splash.known(args) if args.mask is not None else None
        if found is not None:
            expected = allowed(case)
            assert (expected == np.broadcast_to(found, expected.shape)).all()
        elif splash.terms_of(args) is None:
            refused.add(name)
    assert refused == {
        "causal_positions_per_row", "prefix", "segments", "dense", "empty_rows",
        "empty_rows_and_sinks", "everything_at_once",
    }  # fmt: skip


OTHERWISE = {
    "float32": (call(dtype=jnp.float32), "q, k, v: .* got float32"),
    "odd lengths": (call(100, 128), "q: .*multiples of 128 tokens, got 100"),
    "odd keys": (call(128, 100), "k: .*multiples of 128 tokens, got 100"),
    "odd widths": (call(h=80), "v: .*multiples of 64, got 80"),
    "float32 sinks": (call(sinks=np.ones(N, np.float32)), "sinks: .* got float32"),
    "dropout": (call(dropout_rate=0.1, dropout_rng=jax.random.key(0)), "dropout_rate: "),
    "a bias": (call(score=scores.Bias(normal(T, T))), "score: .*Softcap"),
    "two scores": (call(score=(scores.Softcap(2.0), scores.Softcap(3.0))), "score: .*Softcap"),
    "a traced cap": (call(score=scores.Softcap(jnp.array(2.0))), "score: .*Python number"),
    "documents and lengths": (
        call(mask=masks.Segments(IDS) & masks.Lengths(np.array([3, 4]))), "mask: "
    ),
    "a mask of its own for each row": (
        call(mask=masks.Dense(RANDOM.rand(B, 1, T, T) < 0.5)), "mask: "
    ),
    "traced positions": (call(mask=masks.Causal(), q_positions=jnp.arange(T)), "mask: "),
}  # fmt: skip


@pytest.mark.parametrize("name", OTHERWISE)
def test_a_refusal_names_the_argument(name):
    (inputs, others), message = OTHERWISE[name]
    with pytest.raises(NotImplementedError, match=rf'^{message}[\s\S]*implementation="splash"'):
        ops.attention(**inputs, **others, implementation=INTERPRETED)


def test_a_mask_that_closes_over_what_is_traced_is_refused():
    inputs, _ = call()

    def attend(width):
        mask = masks.from_function(lambda q, kv, head: q - kv <= width)
        return ops.attention(**inputs, mask=mask, implementation=INTERPRETED)

    with pytest.raises(NotImplementedError, match=r"^mask: "):
        jax.jit(attend)(3)


def test_inside_shard_map_another_implementation_is_taken():
    inputs, others = CALLS["causal"]
    mesh = jax.make_mesh((2,), ("data",))

    def here(q, k, v):
        args = checked({"q": q, "k": k, "v": v}, others)
        assert "shard_map" in splash.refusal(args)
        return q

    spec = jax.sharding.PartitionSpec("data")
    sharded = jax.reshard(tuple(inputs.values()), jax.sharding.NamedSharding(mesh, spec))
    jax.shard_map(here, mesh=mesh, in_specs=spec, out_specs=spec)(*sharded)
