"""A kernel that is preferred on its platform, and what stands in for what it lacks."""

import dataclasses
import functools

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from flax import nnx
from jax.sharding import AxisType, PartitionSpec

from qkv_jax import ops
from qkv_jax.models import Decoder, DecoderConfig
from qkv_jax.ops import cudnn, kernels, masks, scores
from qkv_jax.ops.attention import KERNELS
from qkv_jax.ops.fused import fused
from tests.tolerances import assert_close

# cuDNN's layer as it would be if XLA's own attention on a CPU were the kernel.
SIMULATED = dataclasses.replace(
    cudnn.CUDNN, platform="cpu", attend=functools.partial(cudnn.attend, implementation="xla")
)
B, T, N, K, H = 4, 16, 4, 2, 8
CAUSAL = masks.Causal() & masks.Lengths(jnp.array([0, 3, 16, 7]))


@pytest.fixture
def preferred(monkeypatch):
    """The simulated kernel, preferred on a CPU; and the calls that it takes."""
    calls = []

    def attend(args):
        calls.append(args.q.shape)
        return SIMULATED.attend(args)

    kernel = dataclasses.replace(SIMULATED, attend=attend)
    monkeypatch.setitem(KERNELS, "cpu", kernel)
    return calls


def arrays(dtype=jnp.bfloat16, shape=(B, T)):
    keys = jax.random.split(jax.random.key(0), 3)
    return [
        jax.random.normal(key, (*shape, n, H), dtype)
        for key, n in zip(keys, (N, K, K), strict=True)
    ]


def loss(q, k, v, **settings):
    return (ops.attention(q, k, v, **settings).astype(jnp.float32) ** 2).sum()


def mesh_of(**sizes):
    return jax.make_mesh(tuple(sizes.values()), tuple(sizes), (AxisType.Auto,) * len(sizes))


def check_gradients(reference="reference", **settings):
    of = functools.partial(loss, **settings)
    found = jax.jit(jax.value_and_grad(of, (0, 1, 2)))(*arrays())
    wide = [x.astype(jnp.float32) for x in arrays()]
    expected = jax.value_and_grad(functools.partial(of, implementation=reference), (0, 1, 2))(*wide)
    for x, wanted in zip(*map(jax.tree.leaves, (found, expected)), strict=True):
        assert_close(x, wanted, dtype=jnp.bfloat16, scale=3)


def test_a_kernel_is_preferred_where_it_honours_the_call(preferred):
    check_gradients(mask=CAUSAL)
    assert len(preferred) == 2  # the values, and what has gradients
    preferred.clear()
    check_gradients(mask=CAUSAL, score=scores.Softcap(3.0))
    assert preferred == []


def test_another_platform_takes_the_other_implementation(preferred, monkeypatch):
    """As a program for the CPU beside a GPU: which it is, is known when it is compiled."""
    monkeypatch.setitem(KERNELS, "cpu", dataclasses.replace(KERNELS["cpu"], platform="tpu"))
    q, k, v = arrays()
    out = jax.jit(lambda *x: ops.attention(*x, mask=CAUSAL))(q, k, v)
    expected = ops.attention(q, k, v, mask=CAUSAL, implementation="reference")
    np.testing.assert_array_equal(out, expected)
    check_gradients(mask=CAUSAL)


def test_statistics_take_another_implementation(preferred):
    out, stats = ops.attention_with_stats(*arrays(), mask=CAUSAL)
    assert preferred == [] and (stats.lse[0] == -np.inf).all() and (out[0] == 0).all()
    with pytest.raises(NotImplementedError, match='implementation: "cudnn" runs on NVIDIA'):
        ops.attention(*arrays(), implementation="cudnn")
    with pytest.raises(NotImplementedError, match='implementation: "cudnn" leaves no statistics'):
        cudnn.CUDNN.check_place("gpu", stats=True)


@pytest.mark.parametrize(
    "sizes",
    [{"data": 4, "tensor": 2}, pytest.param({"fsdp": 2, "context": 4}, marks=pytest.mark.slow)],
    ids=str,
)
def test_on_a_mesh_each_device_decides_for_its_part(preferred, sizes):
    """Along `context` a device's queries do not begin at 0: there the kernel is not asked."""
    with jax.set_mesh(mesh_of(**sizes)):
        check_gradients(mask=CAUSAL)
    expected = {(1, T, N // 2, H)} if "data" in sizes else set()
    assert set(preferred) == expected


def test_where_keys_can_travel_they_do_though_a_kernel_is_preferred_elsewhere(preferred):
    x = arrays(shape=(1, 512))
    with jax.set_mesh(mesh_of(context=2)):
        program = str(jax.make_jaxpr(functools.partial(ops.attention, mask=masks.Causal()))(*x))
    assert preferred == [] and "ppermute" in program and "all_gather" not in program


def test_heads_that_travel_keep_the_kernel_and_keys_that_travel_do_not(preferred):
    q, k, v = arrays()
    for form in (ops.ulysses_attention, ops.all_gather_attention, ops.ring_attention):
        preferred.clear()
        attend = jax.shard_map(
            functools.partial(form, axis_name="seq", mask=masks.Causal()), mesh=mesh_of(seq=2),
            in_specs=PartitionSpec(None, "seq"), out_specs=PartitionSpec(None, "seq"),
        )  # fmt: skip
        expected = ops.attention(q, k, v, mask=masks.Causal(), implementation="reference")
        assert_close(jax.jit(attend)(q, k, v), expected, scale=2)
        assert len(preferred) == (form is ops.ulysses_attention)


def test_a_bias_that_all_devices_share_has_the_gradient_of_all(preferred):
    bias = jax.random.normal(jax.random.key(1), (N, 128, 128), jnp.bfloat16)
    x = arrays(shape=(4, 128))

    def of(bias, *x):
        return loss(*x, score=scores.Bias(bias))

    expected = jax.grad(of)(bias, *x)
    with jax.set_mesh(mesh_of(data=4)):
        found = jax.jit(jax.grad(of))(bias, *x)
    assert preferred
    assert_close(found, expected, scale=3)


def test_a_decoder_in_bfloat16_trains_on_it(preferred):
    config = DecoderConfig(
        vocab_size=7, context=T, num_layers=1, width=16, num_heads=2, num_kv_heads=2, head_dim=8,
        mlp_width=16, position="rotary", dropout_rate=0.0, dtype="bfloat16",
    )  # fmt: skip
    graphdef, params = nnx.split(Decoder(config, rngs=nnx.Rngs(0)))
    tokens = jnp.zeros((B, T), jnp.int32)
    jax.eval_shape(jax.grad(lambda p: nnx.merge(graphdef, p)(tokens).sum()), params)
    assert set(preferred) == {(B, T, 2, 8)}


@pytest.mark.parametrize(("T", "name"), [(16, "reference"), (512, "blockwise")])
def test_on_a_cpu_nothing_has_changed(T, name):
    def program(implementation):
        of = functools.partial(loss, mask=CAUSAL, implementation=implementation)
        return str(jax.make_jaxpr(jax.grad(of))(*arrays(shape=(B, T))))

    assert program(None) == program(name)


def test_positions_in_order_are_known_ones():
    assert kernels.in_order(np.arange(5)[None, None, :, None])
    assert not kernels.in_order(np.arange(1, 6)[None, None, :, None])
    assert not kernels.in_order(np.array([[0, 1, 2], [0, 2, 1]])[:, None, None])
    assert not kernels.in_order(jnp.arange(5)[None, None, :, None])


# fused


def sine(x, n):
    return jnp.sin(x) * n.astype(x.dtype)


@pytest.fixture
def counted():
    """The sine with one derivative, the first in reverse mode; and what was asked of it."""
    asked = []

    @jax.custom_vjp
    def kernel(x, n):
        asked.append("value")
        return sine(x, n)

    def forward(x, n):
        asked.append("value")
        return sine(x, n), (x, n)

    def backward(held, cotangent):
        asked.append("cotangent")
        x, n = held
        return cotangent * jnp.cos(x) * n.astype(x.dtype), None

    kernel.defvjp(forward, backward)
    return functools.partial(fused, kernel, sine), asked


X, COUNT = jnp.linspace(-1.0, 1.0, 5), jnp.array(3)


def cubed(f):
    return lambda x: (f(x, COUNT) ** 3).sum()


def along(f):
    return lambda x: jax.jvp(f, (x,), (x + 1,))[1]


def scanned(f):
    def step(carry, _):
        return f(carry, COUNT), None

    return lambda x: jax.lax.scan(step, x, None, length=3)[0].sum()


DERIVATIVES = {
    "gradient": lambda f: jax.grad(cubed(f)),
    "tangent": lambda f: along(cubed(f)),
    "forward over reverse": lambda f: jax.jacfwd(jax.grad(cubed(f))),
    "reverse over reverse": lambda f: jax.jacrev(jax.grad(cubed(f))),
    "forward over forward": lambda f: jax.jacfwd(jax.jacfwd(cubed(f))),
    "reverse over forward": lambda f: jax.grad(along(cubed(f))),
    "third": lambda f: jax.jacfwd(jax.jacrev(jax.grad(cubed(f)))),
    "vmap": lambda f: lambda x: jax.vmap(jax.grad(cubed(f)))(jnp.stack([x, x + 1])),
    "vmap of a tangent": lambda f: lambda x: jax.vmap(along(cubed(f)))(jnp.stack([x, x + 1])),
    "checkpoint": lambda f: jax.grad(jax.checkpoint(cubed(f))),
    "scan": lambda f: jax.grad(scanned(f)),
}


@pytest.mark.parametrize("compiled", [pytest.param(False, marks=pytest.mark.slow), True])
@pytest.mark.parametrize("name", DERIVATIVES)
def test_derivatives_of_every_kind_are_those_of_the_exact_function(counted, name, compiled):
    f, _ = counted
    derivative, expected = DERIVATIVES[name](f), DERIVATIVES[name](sine)
    assert_close((jax.jit(derivative) if compiled else derivative)(X), expected(X), scale=3)


def test_a_training_step_asks_the_kernel_once_for_values_and_once_for_cotangents(counted):
    f, asked = counted
    jax.grad(cubed(f))(X)
    assert asked == ["value", "cotangent"]


def test_what_is_given_is_not_held_a_second_time(counted):
    """In a scan, what is kept for the backward pass is stacked: each array once."""
    f, _ = counted
    program = jax.make_jaxpr(jax.grad(scanned(f)))(X)
    forward = next(eqn for eqn in program.eqns if eqn.primitive.name == "scan")
    assert [x.aval.shape for x in forward.outvars].count((3, *X.shape)) == 1
