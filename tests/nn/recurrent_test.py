"""`run` and the recurrent mixers against the equations as loops, and against PyTorch's layers."""

import functools

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from flax import nnx

from qkv_jax import nn
from qkv_jax.nn.recurrent import GRU, LSTM, initial_state, run
from qkv_jax.ops import masks
from tests.parameters import randomised
from tests.tolerances import assert_close

B, T, D, F = 3, 7, 5, 2
RANDOM = np.random.RandomState(0)
X = RANDOM.randn(B, T, D).astype("f")
LENGTHS = np.array([5, 7, 1])
CELLS = {"lstm": nnx.LSTMCell, "gru": nnx.GRUCell}
cells = pytest.mark.parametrize("name", CELLS)


@functools.cache
def make(name, **kwargs):
    return randomised(CELLS[name](D, F, rngs=nnx.Rngs(0), **kwargs))


@functools.partial(jax.jit, static_argnames=("graphdef", "reverse"))
def _run(graphdef, params, x, state, lengths, reverse):
    return run(nn.merge(graphdef, params), x, state=state, lengths=lengths, reverse=reverse)


def jit_run(cell, x, *, state=None, lengths=None, reverse=False):
    return _run(*nn.split(cell), x, state, lengths, reverse)


def gates(cell):
    """The matrices of input and state and the bias, gate by gate, [.., gates F] in float64."""
    _, p = nn.split(cell)
    if "ii" in p:
        W, U, b = (
            np.concatenate([np.asarray(p[f"{part}{gate}"][which]) for gate in gates], axis=-1)
            for part, gates, which in (
                ("i", ("i", "f_", "g", "o"), "kernel"),
                ("h", "ifgo", "kernel"),
                ("h", "ifgo", "bias"),
            )
        )
    else:
        W, U = (np.asarray(p[part]["kernel"]) for part in ("dense_i", "dense_h"))
        [b] = (np.asarray(part["bias"]) for part in p.values() if "bias" in part)
    return [np.asarray(a, np.float64) for a in (W, U, b)]


def sigmoid(x):
    return 1 / (1 + np.exp(-x))


def one_row(cell, x):
    """The outputs and the last state of one sequence [T, D], as the equations read."""
    W, U, b = gates(cell)
    c = h = np.zeros(F)
    outputs = []
    for token in x:
        if W.shape[1] == 4 * F:
            i, f, g, o = np.split(token @ W + h @ U + b, 4)
            c = sigmoid(f) * c + sigmoid(i) * np.tanh(g)
            h = sigmoid(o) * np.tanh(c)
        else:
            (xr, xz, xn), (hr, hz, hn) = np.split(token @ W + b, 3), np.split(h @ U, 3)
            r, z = sigmoid(xr + hr), sigmoid(xz + hz)
            h = (1 - z) * np.tanh(xn + r * hn) + z * h
        outputs.append(h)
    return np.stack(outputs), ((c, h) if W.shape[1] == 4 * F else h)


@cells
@pytest.mark.parametrize("reverse", [False, True])
def test_a_run_is_the_equations_row_by_row(name, reverse):
    cell = make(name)
    out, state = jit_run(cell, X, lengths=LENGTHS, reverse=reverse)
    assert out.shape == (B, T, F)
    order = slice(None, None, -1 if reverse else 1)
    for b, length in enumerate(LENGTHS):
        expected, last = one_row(cell, X[b, :length][order])
        assert_close(out[b, :length], expected[order])
        assert_close(out[b, length:], np.zeros((T - length, F)))
        for actual, wanted in zip(jax.tree.leaves(state), jax.tree.leaves(last), strict=True):
            assert_close(actual[b], wanted)


@cells
def test_the_state_carries_across_any_split(name):
    cell = make(name)
    whole, last = jit_run(cell, X)
    head, state = jit_run(cell, X[:, :6])
    tail, state = jit_run(cell, X[:, 6:], state=state)
    assert_close(jnp.concatenate([head, tail], axis=1), whole)
    jax.tree.map(assert_close, state, last)


@cells
def test_padding_gets_no_gradient_and_the_state_passes_it_on(name):
    graphdef, params = nn.split(make(name))

    def loss(params, x, lengths):
        out, state = run(nn.merge(graphdef, params), x, lengths=lengths)
        return (out**2).sum() + sum((s**2).sum() for s in jax.tree.leaves(state))

    gradients = jax.jit(jax.grad(loss, argnums=(0, 1)))
    of_params, of_x = gradients(params, X[:1], 4)
    short_params, short_x = gradients(params, X[:1, :4], 4)
    assert (of_x[:, 4:] == 0).all()
    assert_close(of_x[:, :4], short_x)
    jax.tree.map(assert_close, of_params, short_params)


@cells
def test_the_state_is_float32_in_bfloat16_and_float64_in_float64(name):
    cell = make(name, dtype="bfloat16")
    out, state = jit_run(cell, X)
    assert out.dtype == "bfloat16"
    assert {s.dtype for s in jax.tree.leaves(state)} == {jnp.dtype("float32")}
    assert_close(out, one_row_outputs(cell), scale=2)  # every product is rounded to bfloat16
    with jax.enable_x64(True):
        cell = make(name, param_dtype="float64")
        out, state = jit_run(cell, X.astype(np.float64))
        assert {s.dtype for s in jax.tree.leaves((out, state))} == {jnp.dtype("float64")}
        assert_close(out, one_row_outputs(cell))


def one_row_outputs(cell):
    return np.stack([one_row(cell, x)[0] for x in X])


@pytest.mark.parametrize(("mixer", "numbers"), [(LSTM, 2), (GRU, 1)])
@pytest.mark.parametrize("hidden", [None, 3])
def test_a_mixer_is_its_cell_and_a_projection(mixer, numbers, hidden):
    module = randomised(mixer(D, hidden, rngs=nnx.Rngs(0)))
    y, _ = run(module.cell, X)
    assert y.shape == (B, T, hidden or D)
    assert_close(module(X, mask=masks.Causal()), y @ module.out.kernel[...])
    assert module.state_size(1) == module.state_size(1000) == numbers * (hidden or D)


def test_a_new_lstm_keeps_most_of_what_it_holds():
    cell = LSTM(D, F, rngs=nnx.Rngs(0)).cell
    (c, _), _ = cell((jnp.ones((1, F)), jnp.zeros((1, F))), jnp.zeros((1, D)))
    assert_close(c, np.full((1, F), 1 / (1 + np.exp(-1))))


@pytest.mark.parametrize("mixer", [LSTM, GRU])
def test_a_mixer_is_causal_and_padding_changes_no_real_token(mixer):
    module = randomised(mixer(D, rngs=nnx.Rngs(0)))
    jacobian = jax.jit(jax.jacobian(lambda x: module(x[None], mask=masks.Causal())[0].sum(-1)))
    influence = np.abs(jacobian(X[0])).max(-1)  # [T out, T in]
    assert (influence[np.triu_indices(T, 1)] == 0).all()
    assert (influence[np.tril_indices(T)] > 1e-5).all()
    padded = module(X, mask=masks.Causal() & masks.Lengths(LENGTHS))
    for b, length in enumerate(LENGTHS):
        alone = module(X[b : b + 1, :length], mask=masks.Causal())
        assert_close(padded[b, :length], alone[0])


@pytest.mark.parametrize("mixer", [LSTM, GRU])
@pytest.mark.parametrize("dtype", [None, "bfloat16"])
def test_the_dtype_of_a_mixer_is_the_layers_dtype(mixer, dtype):
    module = mixer(D, dtype=dtype, param_dtype=dtype or "float32", rngs=nnx.Rngs(0))
    assert module(X, mask=masks.Causal()).dtype == (dtype or "float32")
    assert {p.dtype.name for p in jax.tree.leaves(nn.split(module)[1])} == {dtype or "float32"}


@pytest.mark.parametrize("mixer", [LSTM, GRU])
def test_equal_mixers_have_equal_structures_and_only_parameters(mixer):
    (a, params), (b, _) = (nn.split(mixer(D, F, rngs=nnx.Rngs(i))) for i in range(2))
    assert a == b and hash(a) == hash(b)
    assert all(jnp.issubdtype(p.dtype, jnp.floating) for p in jax.tree.leaves(params))


@pytest.mark.parametrize("mixer", [LSTM, GRU])
def test_recurrent_matrices_start_orthogonal_gate_by_gate(mixer):
    cell = mixer(D, F, rngs=nnx.Rngs(0)).cell
    _, U, _ = gates(cell)
    for gate in np.split(U, U.shape[1] // F, axis=1):
        assert_close(gate @ gate.T, np.eye(F), dtype="float32")


def test_what_cannot_be_honoured_raises():
    for mixer in (LSTM, GRU):
        module = mixer(D, rngs=nnx.Rngs(0))
        for mask in (None, masks.Lengths(3)):
            with pytest.raises(NotImplementedError, match=f"mask: {mixer.__name__} is causal"):
                module(X, mask=mask)
        with pytest.raises(NotImplementedError, match=f"mask: {mixer.__name__}.*SlidingWindow"):
            module(X, mask=masks.SlidingWindow(2))
        with pytest.raises(ValueError, match="hidden: wanted a positive integer, got 0"):
            mixer(D, 0, rngs=nnx.Rngs(0))
    cell = make("gru")
    with pytest.raises(ValueError, match=r"x: wanted \[B, T, features\], got \[7, 5\]"):
        run(cell, X[0])
    with pytest.raises(ValueError, match=r"lengths: wanted a number or \[B\] = \[3\], got \[2\]"):
        run(cell, X, lengths=LENGTHS[:2])
    assert initial_state(cell, B).shape == (B, F)


def torch_layer(name, cell, **kwargs):
    """PyTorch's layer with the weights of a cell, which are those of both its directions."""
    import torch

    kind = torch.nn.LSTM if "lstm" in name else torch.nn.GRU
    layer = kind(D, F, batch_first=True, bidirectional=True)
    W, U, b = (torch.tensor(a.T.astype("f")) for a in gates(cell))
    layer.load_state_dict(
        {
            f"{part}_l0{direction}": value
            for direction in ("", "_reverse")
            for part, value in (
                ("weight_ih", W), ("weight_hh", U), ("bias_ih", b), ("bias_hh", 0 * b),
            )
        }
    )  # fmt: skip
    return layer


@pytest.mark.oracle
@cells
def test_a_bidirectional_padded_run_is_pytorch_s_with_its_gradients(name):
    import torch

    cell = make(name)
    layer = torch_layer(name, cell)
    x = torch.tensor(X, requires_grad=True)
    packed = torch.nn.utils.rnn.pack_padded_sequence(
        x, torch.tensor(LENGTHS), batch_first=True, enforce_sorted=False
    )
    packed, last = layer(packed)
    expected, _ = torch.nn.utils.rnn.pad_packed_sequence(packed, batch_first=True)
    (expected**2).sum().backward()

    graphdef, params = nn.split(cell)

    def both(params, x):
        cell = nn.merge(graphdef, params)
        (ahead, first), (back, second) = (
            run(cell, x, lengths=LENGTHS, reverse=reverse) for reverse in (False, True)
        )
        out = jnp.concatenate([ahead, back], axis=-1)
        return (out**2).sum(), (out, first, second)

    (_, (out, first, second)), (of_params, of_x) = jax.jit(
        jax.value_and_grad(both, argnums=(0, 1), has_aux=True)
    )(params, X)
    assert_close(out, expected.detach())
    h, c = last if "lstm" in name else (last, None)
    for ours, direction in ((first, 0), (second, 1)):
        ours_c, ours_h = ours if c is not None else (None, ours)
        assert_close(ours_h, h[direction].detach())
        if c is not None:
            assert_close(ours_c, c[direction].detach())
    assert_close(of_x, x.grad)
    theirs = [
        sum(getattr(layer, f"{part}_l0{direction}").grad.numpy() for direction in ("", "_reverse"))
        for part in ("weight_ih", "weight_hh", "bias_ih")
    ]
    for ours, wanted in zip(gates(nn.merge(graphdef, of_params)), theirs, strict=True):
        assert_close(ours, wanted.T, dtype="float32", scale=5)
