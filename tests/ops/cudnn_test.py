"""What cuDNN is told of a call, and what it is not asked: each case of the harness is one of them.

The translation is proved on any device: `jax.nn.dot_product_attention` computes the same by XLA,
given the very same arguments. On an NVIDIA GPU the cases run through cuDNN itself.
"""

import dataclasses
import functools
import re

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from qkv_jax import ops
from qkv_jax.ops import arguments, cudnn, kernels, masks, scores
from qkv_jax.ops.attention import KERNELS
from tests.ops.attention_cases import CASES, IDS, LENGTHS
from tests.tolerances import assert_close

SIMULATED = dataclasses.replace(
    cudnn.CUDNN, platform="cpu", attend=functools.partial(cudnn.attend, implementation="xla")
)
on_a_gpu = pytest.mark.skipif(
    kernels.platform() != "gpu", reason=f"needs an NVIDIA GPU, JAX has {kernels.platform()!r}"
)
B, N, K, H = 2, 6, 3, 16


def call(T, S=None, *, sinks=False, dtype=jnp.bfloat16, H=H, h=None, K=K, **others):
    """Inputs with gradients, and the other arguments."""
    rng = np.random.default_rng(0)
    S = S or T
    shapes = {"q": (B, T, N, H), "k": (B, S, K, H), "v": (B, S, K, h or H)}
    inputs = {name: jnp.asarray(rng.normal(size=shape), dtype) for name, shape in shapes.items()}
    if sinks:
        inputs["sinks"] = jnp.asarray(rng.normal(size=N), dtype)
    if "score" in others:
        inputs["score"] = others.pop("score")
    return inputs, others


def of_harness(name, more=0):
    """A case of the harness, in bfloat16, of a width that cuDNN has; of some tokens more."""
    case = CASES[name]
    T, S, K = case.inputs["q"].shape[1], *case.inputs["k"].shape[1:3]
    others = dict(case.others)
    if more and T != S:  # the queries are the last tokens
        others["q_positions"] = np.arange(S - T, S + more)
    if "score" in case.inputs:
        others["score"] = case.inputs["score"]
    return call(T + more, S + more, K=K, sinks="sinks" in case.inputs, **others)


def normal(*shape):
    return jnp.asarray(np.random.default_rng(1).normal(size=shape), jnp.bfloat16)


RANDOM = np.random.default_rng(2).random((B, N, 128, 128)) < 0.1
RANDOM[:, :, 5] = False
MORE = {
    "window": call(8, mask=masks.Causal() & masks.SlidingWindow(2, 1)),
    "window_backwards": call(8, mask=masks.SlidingWindow(2)),
    "two_windows": call(8, mask=masks.SlidingWindow(5) & masks.SlidingWindow(3, 4)),
    "all_the_past": call(8, mask=masks.SlidingWindow(None)),
    "itself": call(8, mask=masks.SlidingWindow(0)),
    "causal_and_lengths": call(8, mask=masks.Causal() & masks.Lengths(jnp.asarray(LENGTHS))),
    "empty_row_of_the_batch": call(8, mask=masks.Causal() & masks.Lengths(np.array([0, 4]))),
    "two_lengths": call(6, 8, mask=masks.Lengths(LENGTHS) & masks.Lengths(4)),
    "lengths_beyond": call(6, 8, mask=masks.Lengths(np.array([9, -2]))),
    "whole_blocks": call(128),
    "bias": call(128, score=scores.Bias(normal(N, 128, 128))),
    "bias_of_keys": call(128, score=scores.Bias(normal(B, 1, 1, 128)), mask=masks.Causal()),
    "dense": call(128, mask=masks.Dense(RANDOM)),
    "dense_and_all_else": call(
        128, score=scores.Bias(normal(1, N, 1, 128)),
        mask=masks.Dense(RANDOM[:1, :1]) & masks.Causal() & masks.SlidingWindow(90)
        & masks.Lengths(np.array([0, 77])),
    ),
}  # fmt: skip
HONOURED = {
    "full", "every_head_its_own_keys", "multi_query", "narrow_values", "given_scale", "no_scale",
    "causal", "lengths",
}  # fmt: skip
# Of the harness's other cases, the argument that cuDNN cannot honour.
REFUSED = {
    "causal_last_queries": "q_positions", "causal_one_query": "q_positions",
    "causal_chunk": "q_positions", "causal_positions_per_row": "q_positions",
    "window": "mask", "window_per_head": "mask", "chunked": "mask", "prefix": "mask",
    "global": "mask", "dilated": "mask", "segments": "mask", "blocks_per_head": "mask",
    "dense": "mask", "mask_of_ones_own": "mask", "not": "mask",
    "softcap": "score", "temperature": "score", "alibi": "score", "relative_bias": "score",
    "relative_bias_bidirectional": "score", "bias": "score", "bias_per_head_and_row": "score",
    "score_of_ones_own": "score", "scores_in_order": "score", "softcap_and_mask": "score",
    "sinks": "sinks", "dropout": "dropout_rate", "empty_rows": "mask",
    "empty_rows_and_sinks": "sinks", "everything_forbidden": "mask", "everything_at_once": "sinks",
}  # fmt: skip
CALLS = {name: of_harness(name, more=1) for name in sorted(HONOURED)} | {
    f"more_{n}": c for n, c in MORE.items()
}
FLOAT16 = {"causal_in_float16": call(8, dtype=jnp.float16, mask=masks.Causal())}  # not by XLA's CPU


def checked(inputs, others):
    settings = dict.fromkeys(("mask", "score", "scale", "sinks", "dropout_rng"))
    settings |= dict.fromkeys(("q_positions", "kv_positions")) | {"dropout_rate": 0.0}
    return arguments.check(**settings | inputs | others)


def both_passes(implementation, others):
    def attend(inputs):
        return ops.attention(**inputs, **others, implementation=implementation)

    def both(inputs):
        out, pullback = jax.vjp(attend, inputs)
        cotangent = np.random.default_rng(3).normal(size=out.shape)
        return out, *pullback(jnp.asarray(cotangent, jnp.bfloat16).astype(out.dtype))

    return jax.jit(both)


def check_values_and_gradients(implementation, inputs, others):
    found = both_passes(implementation, others)(inputs)
    wide = jax.tree.map(lambda x: x.astype(jnp.float32), inputs)
    expected = both_passes("reference", others)(wide)
    for x, wanted, given in zip(
        *map(jax.tree.leaves, (found, expected, (inputs["v"], inputs))), strict=True
    ):
        assert x.dtype == given.dtype
        assert_close(x, wanted, dtype=jnp.bfloat16, scale=2)
    return found


@pytest.mark.parametrize("name", CALLS)
def test_what_is_honoured_equals_the_reference(name):
    check_values_and_gradients(SIMULATED, *CALLS[name])


@on_a_gpu
@pytest.mark.gpu
@pytest.mark.parametrize("name", CALLS | FLOAT16)
def test_on_a_gpu_cudnn_equals_the_reference_and_is_preferred(name):
    inputs, others = (CALLS | FLOAT16)[name]
    check_values_and_gradients("cudnn", inputs, others)
    preferred = jax.jit(lambda inputs: ops.attention(**inputs, **others)).lower(inputs)
    assert "__cudnn$fmha" in preferred.as_text()


def test_every_case_of_the_harness_is_honoured_or_refused():
    assert HONOURED | REFUSED.keys() == CASES.keys()
    assert not HONOURED & REFUSED.keys()


@pytest.mark.parametrize("name", REFUSED)
def test_a_refusal_names_the_argument(name):
    inputs, others = of_harness(name)
    with pytest.raises(NotImplementedError, match=rf'^{REFUSED[name]}: .*implementation="cudnn"'):
        ops.attention(**inputs, **others, implementation=SIMULATED)


OTHERWISE = {
    "float32": (call(7, dtype=jnp.float32), "q, k, v: .* got float32"),
    "wide values": (call(7, h=24), "v: .* got h = 24 beside H = 16"),
    "narrow heads": (call(7, H=12), "q: .* got 12"),
    "wide heads": (call(7, H=192), r"q: .*128 wide \(256 on Hopper\).* 192"),
    "a traced scale": (call(7, scale=jnp.float32(2)), "scale: "),
    "no keys": (call(0), "q, k, v: .* no empty axis"),
    "a bias that it would round": (
        call(128, score=scores.Bias(np.ones((128, 128), np.float32))), "score: .* round float32"
    ),
    "a bias over half a block": (
        call(192, score=scores.Bias(normal(192, 192))), "score: .*multiples of 128, got 192 x 192"
    ),
    "a mask over half a block": (
        call(64, mask=masks.Dense(RANDOM[..., :64, :64])), "mask: .*multiples of 128, got 64 x 64"
    ),
    "a mask in float16": (
        call(128, dtype=jnp.float16, mask=masks.Dense(RANDOM)), "mask: in float16"
    ),
    "a window without order": (call(7, mask=masks.SlidingWindow(2, None)), "mask: "),
    "a window beside lengths": (
        call(7, mask=masks.SlidingWindow(2) & masks.Lengths(LENGTHS)), "mask: .*without keys"
    ),
    "keys elsewhere": (
        call(7, mask=masks.Lengths(3), kv_positions=np.arange(1, 8)), "kv_positions: "
    ),
    "odd queries": (call(7, 8), "q: .* even number of tokens, got 7"),
    "odd keys": (call(8, 7), "k: .* even number of tokens, got 7"),
    "a bias and a window": (
        call(128, score=scores.Bias(normal(128, 128)), mask=masks.SlidingWindow(2)),
        "score: .*window",
    ),
    "documents": (call(7, mask=masks.Causal() & masks.Segments(IDS)), "mask: "),
}  # fmt: skip


@pytest.mark.parametrize("name", OTHERWISE)
def test_a_call_that_cudnn_would_get_wrong_is_refused(name):
    (inputs, others), message = OTHERWISE[name]
    with pytest.raises(NotImplementedError, match=message):
        SIMULATED(checked(inputs, others))


@pytest.mark.parametrize(
    ("capability", "width", "message"),
    [
        ((7, 5), 64, "implementation: .* 8.0, got 7.5"),
        ((8, 0), 136, "q: .* at most 128 wide"),
        ((8, 9), 128, None),
        ((9, 0), 256, None),
        ((9, 0), 264, "q: .* at most 256 wide"),
        ((10, 0), 256, "q: .* at most 128 wide"),
    ],
)
def test_what_is_honoured_depends_on_the_gpu(capability, width, message, monkeypatch):
    monkeypatch.setattr(cudnn, "_capability", lambda: capability)
    found = cudnn.refusal(checked(*call(8, H=width)))
    assert found is None if message is None else re.match(message, found)


@pytest.mark.parametrize(
    ("T", "S", "mask", "expected"),
    [
        (6, 8, None, {"is_causal": False, "key_value_seq_lengths": [8, 8]}),
        (128, 256, None, {"is_causal": False}),
        (8, 8, masks.Causal(), {"is_causal": True}),
        (8, 8, masks.SlidingWindow(2), {"is_causal": True, "local_window_size": (2, 0)}),
        (6, 8, masks.Lengths(LENGTHS), {"is_causal": False, "key_value_seq_lengths": [3, 5]}),
        (8, 8, masks.Causal() & masks.Lengths(0),
         {"is_causal": True, "key_value_seq_lengths": [1, 1]}),
    ],
    ids=["full", "whole blocks", "causal", "window", "lengths", "nothing"],
)  # fmt: skip
def test_the_arguments_of_jax_nn(T, S, mask, expected):
    given, empty = cudnn.translated(checked(*call(T, S, mask=mask)))
    given = {key: np.asarray(x).tolist() if hasattr(x, "shape") else x for key, x in given.items()}
    assert given == expected
    assert (empty is None) == ("Lengths" not in repr(mask))


SETTINGS = {
    "full": ("PADDING", 0),
    "more_whole_blocks": ("NO_MASK", 0),
    "more_window_backwards": ("CAUSAL", 3),
    "more_causal_and_lengths": ("PADDING_CAUSAL", 0),
    "more_dense": ("NO_MASK", 0),
}


@pytest.mark.parametrize(
    "name",
    [n if n in SETTINGS else pytest.param(n, marks=pytest.mark.slow) for n in CALLS | FLOAT16],
)
def test_a_program_for_a_gpu_holds_two_kernels_and_one_for_a_cpu_none(name, monkeypatch):
    """Forward and backward; made here, run nowhere: JAX need only believe that it has a cuDNN."""
    module = pytest.importorskip("jax._src.cudnn.fused_attention_stablehlo")
    if not hasattr(module, "check_cudnn_version"):
        pytest.skip("this JAX asks for cuDNN's version elsewhere")
    monkeypatch.setattr(module, "check_cudnn_version", lambda: 91000)
    monkeypatch.setitem(KERNELS, kernels.platform(), cudnn.CUDNN)
    inputs, others = (CALLS | FLOAT16)[name]
    traced = both_passes(None, others).trace(inputs)
    program = traced.lower(lowering_platforms=("cuda",)).as_text()
    calls = re.findall(r"__cudnn\$fmha(?:ScaleBias)?Softmax\w*", program)
    assert len(calls) == 2 and calls[1] == calls[0] + "Backward"
    if name in SETTINGS:
        mask_type, window = SETTINGS[name]
        settings = program.replace("\\22", '"')
        assert settings.count(f'"mask_type": "{mask_type}"') == 2
        assert settings.count(f'"sliding_window_length": {window}') == 2
        assert "__cudnn" not in traced.lower(lowering_platforms=("cpu",)).as_text()


def test_empty_rows_are_nothing_with_no_gradient():
    inputs, others = MORE["dense"]
    out, gradients = check_values_and_gradients(SIMULATED, inputs, others)
    assert (out[:, 5] == 0).all() and (gradients["q"][:, 5] == 0).all()
    assert jnp.isfinite(gradients["k"]).all()


def test_derivatives_that_cudnn_lacks_are_those_of_blockwise():
    inputs, others = MORE["causal_and_lengths"]

    def derivatives(implementation):
        def loss(q):
            out = ops.attention(**inputs | {"q": q}, **others, implementation=implementation)
            return (out.astype(jnp.float32) ** 3).sum()

        q = inputs["q"]
        along = lambda f: jax.jvp(f, (q,), (jnp.ones_like(q),))[1]  # noqa: E731
        return jax.jit(
            lambda: [
                along(loss),
                along(jax.grad(loss)),
                jax.grad(lambda q: along(loss) * q.sum())(q),
            ]
        )()

    for x, wanted in zip(derivatives(SIMULATED), derivatives("blockwise"), strict=True):
        assert_close(x, wanted, dtype=jnp.bfloat16, scale=10)
