"""The mixers with a matrix per head: their gates, and the recurrence that these drive."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from flax import nnx

from qkv_jax import nn
from qkv_jax.ops import masks
from qkv_jax.ops.delta import delta_rule_step
from qkv_jax.ops.linear import linear_attention_step
from tests.parameters import randomised
from tests.tolerances import assert_close

B, T, D, N = 2, 11, 12, 2
H = D // N
CLASSES = (
    nn.Retention, nn.GatedLinearAttention, nn.StateSpaceDuality, nn.DeltaNet, nn.GatedDeltaNet,
    nn.KimiDeltaAttention,
)  # fmt: skip
X = np.random.RandomState(0).randn(B, T, D).astype(np.float32)


def module(cls, **kwargs):
    return randomised(cls(D, N, conv_width=3, chunk_size=4, rngs=nnx.Rngs(0), **kwargs))


def silu(x):
    return x / (1 + np.exp(-x))


def sigmoid(x):
    return 1 / (1 + np.exp(-x))


def by_hand(m, x):
    """The module of one row, in NumPy and by the one-step forms, as the papers write it."""
    w = jax.tree.map(np.asarray, nn.split(m)[1])
    q, k, v, gate = (x @ w[name]["kernel"] for name in ("query", "key", "value", "gate"))
    if "kernel" in w:
        joined = np.pad(np.concatenate([q, k, v], -1), ((2, 0), (0, 0)))
        joined = silu(sum(w["kernel"][i] * joined[2 - i : 2 - i + len(x)] for i in range(3)))
        q, k, v = np.split(joined, 3, -1)
    q, k, v, gate = (y.reshape(-1, N, H) for y in (q, k, v, gate))
    beta, log_decay, values, kind = None, None, v, type(m).__name__
    if "beta" in w:
        beta = sigmoid(x @ w["beta"]["kernel"])
        q, k = (y / np.sqrt((y**2).sum(-1, keepdims=True) + 1e-6) for y in (q, k))
    if kind == "Retention":
        log_decay = np.log(1 - 2.0 ** (-5 - np.arange(N))) * np.ones((len(x), 1))
    elif kind == "GatedLinearAttention":
        low = x @ w["decay"]["down"]["kernel"] @ w["decay"]["up"]["kernel"]
        log_decay = np.log(sigmoid(low + w["decay"]["up"]["bias"])).reshape(-1, N, H) / 16
    elif "decay" in w:
        step = w["decay"]["step"]
        y = x @ step["kernel"] if "kernel" in step else x @ step["down"]["kernel"]
        y = y if "kernel" in step else y @ step["up"]["kernel"]
        dt = np.log1p(np.exp(y + step.get("bias", step.get("up", {}).get("bias"))))
        dt = dt.reshape(len(x), N, -1)
        log_decay = (-np.exp(w["decay"]["rate"])[:, None] * dt).squeeze(
            -1 if dt.shape[-1] == 1 else ()
        )
        values = v * dt if kind == "StateSpaceDuality" else v
    state, rows = jnp.zeros((1, N, H, H)), []
    for t in range(len(x)):
        now = None if log_decay is None else jnp.float32(log_decay[t][None])
        token = [jnp.float32(y[t][None]) for y in (q, k, values)]
        if beta is None:
            out, state = linear_attention_step(*token, state=state, log_decay=now)
        else:
            token.append(jnp.float32(beta[t][None]))
            out, state = delta_rule_step(*token, state=state, log_decay=now)
        rows.append(np.asarray(out[0]))
    out = np.stack(rows)
    if kind == "StateSpaceDuality":
        out = out + w["skip"][:, None] * v
    out = out / np.sqrt((out**2).mean(-1, keepdims=True) + 1e-6) * w["norm"]["scale"]
    return (out * silu(gate)).reshape(len(x), -1) @ w["out"]["kernel"]


@pytest.mark.parametrize("cls", CLASSES)
def test_a_module_is_its_paper_s_recurrence_token_by_token(cls):
    m = module(cls)
    out = jax.jit(lambda x: m(x, mask=masks.Causal()))(X)
    for b in range(B):
        assert_close(out[b], by_hand(m, X[b]), "float32", scale=100)


@pytest.mark.parametrize("cls", CLASSES)
def test_at_first_states_remember_and_gates_are_in_their_range(cls):
    m = cls(D, N, rngs=nnx.Rngs(0))
    if isinstance(m, nn.GatedDeltaNet | nn.KimiDeltaAttention | nn.StateSpaceDuality):
        dt, log_decay = m.decay(jnp.zeros((1, 1, D)))
        assert (dt >= 1e-3 * 0.99).all() and (dt <= 0.1 * 1.01).all()
        assert (np.exp(log_decay) > 0.15).all() and (log_decay < 0).all()
    out = m(X, mask=masks.Causal())
    assert np.isfinite(out).all() and np.abs(out).max() > 1e-3


def test_what_a_state_holds():
    assert module(nn.Retention).state_size(1000) == N * H * H
    assert module(nn.GatedDeltaNet).state_size(1000) == N * H * H + 2 * 3 * D


def test_rotation_makes_distances_matter():
    plain, rotated = module(nn.Retention), module(nn.Retention, rotary_base=100.0)
    outs = [m(X, mask=masks.Causal()) for m in (plain, rotated)]
    assert np.abs(outs[0] - outs[1]).max() > 1e-2
    shifted = rotated(X, mask=masks.Causal(), positions=np.arange(T) + 5)
    assert_close(shifted, outs[1], scale=100)


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"num_heads": 5}, "num_heads: wanted a divisor of width = 12"),
        ({"conv_width": 0}, "conv_width: wanted a positive integer, got 0"),
        ({"chunk_size": 0}, "chunk_size: wanted a positive integer, got 0"),
    ],
    ids=repr,
)
def test_wrong_sizes_are_named(changes, message):
    with pytest.raises(ValueError, match=message):
        nn.GatedDeltaNet(**({"width": D, "num_heads": N} | changes), rngs=nnx.Rngs(0))


def test_a_mask_that_is_not_causal_is_refused():
    with pytest.raises(NotImplementedError, match="mask: GatedDeltaNet is causal"):
        module(nn.GatedDeltaNet)(X)
