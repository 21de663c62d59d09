"""`explain` counts what `attention` computes, and foretells what it allocates."""

import functools

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from qkv_jax import ops
from qkv_jax.ops import masks, scores

B, N, K, H, h = 3, 4, 2, 5, 7
SMALL = ops.Blockwise(block_q=8, block_kv=16)
LENGTHS = np.array([11, 48, 29])
DOCUMENTS = np.sort(np.random.RandomState(0).randint(0, 3, (B, 37)))


def shapes(T, S, B=B, N=N, K=K, H=H, h=h, dtype=jnp.float32):
    sizes = (B, T, N, H), (B, S, K, H), (B, S, K, h)
    return [jax.ShapeDtypeStruct(size, dtype) for size in sizes]


def counted(mask, T, S, block_q, block_kv):
    """Skipped, partial and full blocks of all batch rows and heads, from every element."""
    q_pos, kv_pos = np.arange(T)[None, None, :, None], np.arange(S)[None, None, None]
    allowed = mask.aligned().mask(q_pos, kv_pos, np.arange(N)[None, :, None, None])
    allowed = np.broadcast_to(allowed, (B, N, T, S))
    counts = np.zeros(3, int)
    for i in range(0, T, block_q):
        for j in range(0, S, block_kv):
            block = allowed[:, :, i : i + block_q, j : j + block_kv]
            none, every = ~block.any((2, 3)), block.all((2, 3))
            every &= block.shape[2:] == (block_q, block_kv)
            counts += [none.sum(), (~none & ~every).sum(), every.sum()]
    return tuple(counts)


@pytest.mark.parametrize(
    ("mask", "T", "S"),
    [
        (masks.Causal(), 64, 64),
        (masks.Causal(), 37, 37),
        (masks.SlidingWindow(np.array([3, 30, 17, 0])), 64, 64),  # heads differ
        (masks.Lengths(LENGTHS), 29, 48),  # batch rows differ
        (masks.Segments(DOCUMENTS), 37, 37),
        (masks.Lengths(jnp.array([16, 48, 32])) & masks.SlidingWindow(np.arange(N), None), 48, 48),
    ],
    ids=["causal", "ragged", "heads", "rows", "documents", "rows and heads"],
)
def test_blocks_are_counted_over_all_batch_rows_and_heads(mask, T, S):
    found = ops.explain(*shapes(T, S), mask=mask, implementation=SMALL)
    assert (found.block_q, found.block_kv) == (8, 16)
    assert (found.skipped, found.partial, found.full) == counted(mask, T, S, 8, 16)


def test_operations_are_those_of_the_blocks_that_are_computed():
    found = ops.explain(*shapes(64, 64), mask=masks.Causal(), implementation=SMALL)
    elements = (found.partial + found.full) * 8 * 16
    assert 0 < elements < B * N * 64 * 64
    cost = found.costs["blockwise"]
    assert cost.forward_flops == 2 * elements * (H + h)
    assert cost.training_flops == 2 * elements * (4 * H + 3 * h)


def forward_and_backward(attend):
    def both(q, k, v, d_out):
        out, pullback = jax.vjp(attend, q, k, v)
        return out, pullback(d_out)

    return both


def test_operations_of_reference_are_those_that_xla_counts():
    """Beside the products, XLA counts what the softmax does, a few operations per weight."""
    inputs = shapes(67, 83, H=64, h=96)
    attend = functools.partial(ops.attention, implementation="reference")

    def counted(f, *args):
        return jax.jit(f).lower(*args).compile().cost_analysis()["flops"]

    cost = ops.explain(*inputs).costs["reference"]
    out = jax.eval_shape(attend, *inputs)
    assert 0.9 < cost.forward_flops / counted(attend, *inputs) <= 1
    assert 0.9 < cost.training_flops / counted(forward_and_backward(attend), *inputs, out) <= 1


PACKED = masks.Causal() & masks.Segments(np.repeat([[0, 1], [2, 3]], 1024, 1))
SIZES = {"T": 2048, "S": 2048, "B": 1, "N": 4, "K": 4, "H": 64, "h": 64}


@pytest.mark.parametrize("implementation", ["reference", "blockwise"])
@pytest.mark.parametrize(
    ("sizes", "options"),
    [
        ({}, {"mask": masks.Causal()}),
        ({"B": 2}, {"mask": PACKED}),
        ({"T": 1999, "K": 1, "h": 32}, {"mask": masks.Lengths(np.array([1500]))}),
        ({"dtype": jnp.bfloat16}, {"score": scores.Softcap(30.0)}),
    ],
    ids=["causal", "packed", "ragged and grouped", "bfloat16"],
)
def test_bytes_are_within_a_factor_of_one_and_a_half_of_what_xla_allocates(
    sizes, options, implementation
):
    inputs = shapes(**SIZES | sizes)
    attend = functools.partial(ops.attention, implementation=implementation, **options)

    def allocated(f, *args):
        return jax.jit(f).lower(*args).compile().memory_analysis().temp_size_in_bytes

    cost = ops.explain(*inputs, **options).costs[implementation]
    out = jax.eval_shape(attend, *inputs)
    forward, both = (
        allocated(attend, *inputs),
        allocated(forward_and_backward(attend), *inputs, out),
    )
    assert 1 / 1.5 < cost.forward_bytes / forward < 1.5
    assert 1 / 1.5 < cost.training_bytes / both < 1.5


def test_it_names_the_implementation_that_attention_takes_and_why():
    small, large = (ops.explain(*shapes(n, n)) for n in (16, 2048))
    assert (small.implementation, large.implementation) == ("reference", "blockwise")
    assert "not faster where T x S is 16 x 16" in small.reasons["blockwise"]
    assert "needs 403 MB for the 2048 x 2048 weights" in large.reasons["reference"]
    asked = ops.explain(*shapes(16, 16), implementation="blockwise")
    assert (asked.implementation, asked.reasons["blockwise"]) == ("blockwise", "asked for")
    asked = ops.explain(*shapes(2048, 2048), implementation="reference")
    assert (asked.implementation, asked.reasons["reference"]) == ("reference", "asked for")


HALF = shapes(2048, 2048, H=64, h=64, dtype=jnp.bfloat16)


@pytest.mark.parametrize(("platform", "kernel"), [("gpu", "cudnn"), ("tpu", "splash")])
def test_it_names_the_kernel_of_a_platform_or_the_argument_that_it_refuses(platform, kernel):
    found = ops.explain(*HALF, mask=masks.Causal(), platform=platform)
    assert found.implementation == kernel
    assert found.reasons[kernel] == "the fastest that honours every argument"
    assert str(found).startswith(kernel) and set(found.costs) == {"blockwise", "reference"}
    found = ops.explain(*HALF, dropout_rate=0.1, dropout_rng=jax.random.key(0), platform=platform)
    assert found.implementation == "blockwise"
    assert found.reasons[kernel].startswith("dropout_rate: ")
    assert f"\n{kernel:<11}dropout_rate: " in str(found)
    asked = ops.explain(*HALF, implementation=kernel, platform=platform)
    assert (asked.implementation, asked.reasons[kernel]) == (kernel, "asked for")
    with pytest.raises(NotImplementedError, match=f'float32 .implementation="{kernel}"'):
        ops.explain(*shapes(128, 128), implementation=kernel, platform=platform)


def test_a_platform_is_one_that_is_known_and_by_default_this_one():
    found = ops.explain(*HALF, mask=masks.Causal())
    assert found == ops.explain(*HALF, mask=masks.Causal(), platform="cpu")
    assert set(found.reasons) == {"blockwise", "reference"}
    other = ops.explain(*HALF, mask=masks.Causal(), platform="gpu")
    assert other.block_kv > found.block_kv  # what was measured there
    with pytest.raises(ValueError, match=r"platform: wanted one of .*'cpu'.* or None, got 'cuda'"):
        ops.explain(*HALF, platform="cuda")
    with pytest.raises(NotImplementedError, match='"splash" runs on TPUs'):
        ops.explain(*HALF, implementation="splash")


@pytest.mark.parametrize("traced", ["positions", "mask"])
def test_traced_positions_and_masks_leave_the_blocks_uncounted(traced):
    found = []

    def f(positions, lengths):
        options = {"mask": masks.Causal(), "q_positions": positions}
        if traced == "mask":
            options = {"mask": masks.Lengths(lengths)}
        found.append(ops.explain(*shapes(64, 64), implementation=SMALL, **options))

    jax.eval_shape(f, np.arange(64), LENGTHS)
    (found,) = found
    assert (found.skipped, found.partial, found.full) == (None, None, None)
    every = ops.explain(*shapes(64, 64), implementation=SMALL)
    assert found.costs["blockwise"].forward_flops == every.costs["blockwise"].forward_flops
    assert "not counted: positions or mask are traced" in str(found)


@pytest.mark.parametrize("asked", [None, "reference"])
def test_it_fits_a_terminal_and_says_what_it_knows(asked):
    inputs = shapes(131_072, 131_072, B=64, N=128, K=8, H=256, h=256)
    text = str(ops.explain(*inputs, mask=masks.Causal(), implementation=asked))
    assert max(map(len, text.splitlines())) < 80
    assert text == "\n".join(line.rstrip() for line in text.splitlines())
    for part in ("blockwise", "reference", "[64, 131072, 128, 256]", "PFLOP", "MB", "TB", "%"):
        assert part in text


def test_arrays_give_what_their_shapes_give():
    arrays = [np.ones(x.shape, np.float32) for x in shapes(17, 19)]
    assert ops.explain(*arrays) == ops.explain(*shapes(17, 19))


def test_a_wrong_argument_is_an_error_as_in_attention():
    with pytest.raises(ValueError, match="q_positions: 17 queries, 19 keys"):
        ops.explain(*shapes(17, 19), mask=masks.Causal())
    with pytest.raises(ValueError, match="implementation: wanted one of"):
        ops.explain(*shapes(17, 17), implementation="fast")
    with pytest.raises(ValueError, match=r"no empty axis, got k \[3, 0, 2, 5\], v \[3, 0"):
        ops.explain(*shapes(17, 0))
