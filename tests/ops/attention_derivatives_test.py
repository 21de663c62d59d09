"""Derivatives of attention of every order and mode, and JAX's transformations around it."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from qkv_jax import ops
from qkv_jax.ops import masks
from tests.ops.attention_cases import CASES
from tests.tolerances import assert_close

IMPLEMENTATIONS = ["reference", ops.Blockwise(block_q=2, block_kv=3)]
every_implementation = pytest.mark.parametrize("implementation", IMPLEMENTATIONS)
# Where a derivative can go wrong: operands, tanh, a sink, dropout, rows with nothing in them.
difficult_cases = pytest.mark.parametrize(
    "name", ["scores_in_order", "everything_at_once", "empty_rows"]
)


def problem(name, implementation, dtype="float64"):
    """A loss of every differentiable output, and where to take its derivatives and along what."""
    case = CASES[name]
    inputs = jax.tree.map(lambda x: jnp.asarray(x, dtype), case.inputs)
    random = np.random.RandomState(4)
    tangents = jax.tree.map(lambda x: jnp.asarray(random.randn(*x.shape), x.dtype), inputs)

    def loss(inputs):
        out, stats = ops.attention_with_stats(
            **inputs, **case.others, implementation=implementation
        )
        lse = jnp.where(jnp.isfinite(stats.lse), stats.lse, 0)
        return (out**3).sum() + (lse**2).sum() + (stats.entropy**2).sum()

    return loss, inputs, tangents


def dot(a, b):
    return sum(jnp.vdot(x, y) for x, y in zip(jax.tree.leaves(a), jax.tree.leaves(b), strict=True))


@every_implementation
@difficult_cases
def test_forward_and_reverse_mode_agree_with_differences_to_second_order(name, implementation):
    with jax.enable_x64(True):
        loss, inputs, tangents = problem(name, implementation)
        gradient = jax.grad(loss)
        value_and_gradient = jax.jit(jax.value_and_grad(loss))

        @jax.jit
        def derivatives(inputs, tangents):
            _, forward = jax.jvp(loss, (inputs,), (tangents,))
            # Hessian-vector products: forward over reverse, reverse over forward, twice reverse.
            products = (
                jax.jvp(gradient, (inputs,), (tangents,))[1],
                jax.grad(lambda x: jax.jvp(loss, (x,), (tangents,))[1])(inputs),
                jax.grad(lambda x: dot(gradient(x), tangents))(inputs),
            )
            return forward, products

        forward, products = derivatives(inputs, tangents)
        reverse = dot(value_and_gradient(inputs)[1], tangents)
        up, down = (
            value_and_gradient(jax.tree.map(lambda x, d: x + step * d, inputs, tangents))  # noqa: B023
            for step in (1e-5, -1e-5)
        )
        assert_close(forward, reverse, scale=100)
        np.testing.assert_allclose((up[0] - down[0]) / 2e-5, forward, rtol=1e-7)
        for product in products[1:]:
            jax.tree.map(lambda a, b: assert_close(a, b, scale=100), products[0], product)
        jax.tree.map(
            lambda up, down, product: np.testing.assert_allclose(
                (up - down) / 2e-5, product, rtol=1e-5, atol=1e-5
            ),
            up[1],
            down[1],
            products[0],
        )


@every_implementation
def test_second_derivatives_of_empty_rows_are_not_nan(implementation):
    with jax.debug_nans(True):
        loss, inputs, tangents = problem("empty_rows", implementation, "float32")
        product = jax.jvp(jax.grad(loss), (inputs,), (tangents,))[1]
        assert all(np.isfinite(x).all() for x in jax.tree.leaves(product))


def call(q, k, v, implementation):
    return ops.attention(
        q, k, v, mask=masks.Causal(), q_positions=np.arange(2, 7), implementation=implementation
    )


def inputs():
    return [jnp.asarray(CASES["full"].inputs[x], jnp.float32) for x in "qkv"]


@every_implementation
def test_vmap_is_a_loop(implementation):
    q, k, v = (jnp.stack([x, 2 * x, -x]) for x in inputs())
    loop = jnp.stack([call(*one, implementation) for one in zip(q, k, v, strict=True)])
    mapped = jax.jit(jax.vmap(lambda *one: call(*one, implementation)))
    assert_close(mapped(q, k, v), loop)
    shared_keys = jax.jit(jax.vmap(lambda q: call(q, k[0], v[0], implementation)))(q)
    assert_close(shared_keys[2], call(q[2], k[0], v[0], implementation))


@every_implementation
def test_vmap_over_operands_positions_and_dropout_keys(implementation):
    q, k, v = inputs()
    lengths = jnp.array([[1, 7], [3, 2], [5, 6]])
    first = jnp.array([0, 2, 9])
    rngs = jax.random.split(jax.random.key(0), 3)

    def masked(lengths, first, rng):
        return ops.attention(
            q, k, v, mask=masks.Causal() & masks.Lengths(lengths), dropout_rate=0.5,
            dropout_rng=rng, q_positions=first + jnp.arange(5), implementation=implementation,
        )  # fmt: skip

    mapped = jax.jit(jax.vmap(masked))(lengths, first, rngs)
    for i in range(3):
        assert_close(mapped[i], masked(lengths[i], first[i], rngs[i]))


@every_implementation
def test_scan_is_a_loop_with_its_gradient(implementation):
    q, k, v = inputs()

    def looped(q):
        for i in range(3):
            q = q + call(q, k, v * (i + 1), implementation)[..., :11]
        return (q**2).sum()

    def scanned(q):
        def body(q, v):
            return q + call(q, k, v, implementation)[..., :11], None

        return (jax.lax.scan(body, q, jnp.stack([v, 2 * v, 3 * v]))[0] ** 2).sum()

    assert_close(jax.jit(scanned)(q), looped(q), scale=10)
    assert_close(jax.jit(jax.grad(scanned))(q), jax.grad(looped)(q), scale=100)


@every_implementation
def test_checkpoint_changes_no_gradient(implementation):
    q, k, v = inputs()
    loss = lambda q: (call(q, k, v, implementation) ** 2).sum()  # noqa: E731
    assert_close(jax.jit(jax.grad(jax.checkpoint(loss)))(q), jax.grad(loss)(q))


@every_implementation
def test_no_constant_of_the_size_of_the_weights_is_compiled_in(implementation):
    q, k, v = inputs()
    constants = jax.make_jaxpr(lambda q: call(q, k, v, implementation))(q).consts
    assert all(np.size(constant) <= q.size for constant in constants)
    assert not any(np.shape(constant)[-2:] == (5, 7) for constant in constants)
