"""Every op in attention's calling convention keeps its contract: one harness over all of them.

A new op is one row of OPS. What an op computes is tested in its own file; here, what all share:
grouped heads, order by positions, rows with nothing in them, padding, dtypes, and that no argument
is ignored.
"""

import dataclasses
import functools
import importlib
import inspect
import pkgutil
import zlib
from collections.abc import Callable

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from qkv_jax import ops
from qkv_jax.ops import (
    additive,
    clipped,
    cope,
    cosine,
    forgetting,
    heads,
    latent,
    lowrank,
    masks,
    memory,
    moba,
    native_sparse,
    normalizers,
    scores,
    sparse,
    streaming,
    top_k,
)
from tests.tolerances import assert_close

B, T, N, K, H, h = 2, 11, 4, 2, 5, 7
SHORT = 8  # real tokens where the others are padding
QUICK = {"xla_backend_optimization_level": 0}  # to compile


@dataclasses.dataclass(frozen=True)
class Op:
    """A row of the harness.

    Args:
      call: called as `ops.attention` is, with what else the op needs filled in.
      order: what it knows of its keys' order without a mask: nothing ("set"), their positions, or
        that of the array.
      causal: whether it takes `Causal()`.
      cross: whether it takes T != S.
      refuses: the arguments that it cannot honour, and says so.
      unread: the arguments that its docstring says have no meaning for it.
      alone: whether a head's output depends on that head alone.
      latent: whether keys and values are made of one array, so that a shape has another meaning.
    """

    call: Callable[..., jax.Array]
    order: str = "set"
    causal: bool = True
    cross: bool = True
    refuses: tuple[str, ...] = ()
    unread: tuple[str, ...] = ()
    alone: bool = True
    latent: bool = False


def fixed(*shape):
    """The same random numbers for the same shape."""
    seed = zlib.crc32(repr(shape).encode())
    return np.random.RandomState(seed).randn(*shape).astype(np.float32)


def talking_heads(q, k, v, **kwargs):
    a, b = fixed(2, q.shape[2], q.shape[2])
    return heads.talking_heads_attention(q, k, v, mix_logits=a, mix_weights=b, **kwargs)


def differential(q, k, v, **kwargs):
    lam = abs(fixed(q.shape[2] // 2))
    return heads.differential_attention(q, k, v, lam=lam, **kwargs)


def cosines(q, k, v, **kwargs):
    temperature = 1 + abs(fixed(q.shape[2]))
    return cosine.cosine_attention(q, k, v, temperature=temperature, **kwargs)


def bahdanau(q, k, v, **kwargs):
    return additive.additive_attention(q, k, v, energy=fixed(*q.shape[2:]), **kwargs)


def local_p(q, k, v, **kwargs):
    centers = T * jax.nn.sigmoid(jnp.moveaxis(1.0 * q.sum(-1), 1, -1))
    return additive.local_attention(q, k, v, centers=centers, window=3, **kwargs)


def contextual(q, k, v, **kwargs):
    return cope.cope_attention(q, k, v, embeddings=fixed(6, q.shape[-1]), **kwargs)


def forget(q, k, v, **kwargs):
    log_forget = -jax.nn.softplus(1.0 * q.sum(-1))
    return forgetting.forgetting_attention(q, k, v, log_forget=log_forget, **kwargs)


def latents(op):
    def call(q, k, v, **kwargs):
        R, C = 2, v.shape[2] * v.shape[3]
        ups = fixed(C, q.shape[2], q.shape[3] - R), fixed(C, q.shape[2], v.shape[3])
        return op(q, v.reshape(*v.shape[:2], C), k[:, :, 0, :R], *ups, **kwargs)

    return call


def native(q, k, v, **kwargs):
    pattern = native_sparse.Pattern(
        compressed_size=3, stride=2, block_size=2, num_selected=2, window=2, num_local=1
    )
    rows = [pattern.last_tokens(q.shape[1]) - back for back in range(3)]
    compressed_k, compressed_v = (sum(x[:, row] for row in rows) / 3 for x in (k, v))
    return native_sparse.native_sparse_attention(
        q, k, v, compressed_k=compressed_k, compressed_v=compressed_v,
        gates=jax.nn.sigmoid(1.0 * q[..., :3]), pattern=pattern, **kwargs,
    )  # fmt: skip


def linformer(q, k, v, **kwargs):
    e, f = fixed(2, 3, 2 * T)[..., : k.shape[1]]
    return lowrank.linformer_attention(q, k, v, key_projection=e, value_projection=f, **kwargs)


POSITIONS = ("q_positions", "kv_positions")
IN_ORDER = ("score", "mask", *POSITIONS)
# By their names, without "_attention"; a frozen dataclass stands for its function.
OPS = {
    "attention": Op(ops.attention),
    "entmax": Op(normalizers.Entmax(1.25)),
    "sparsemax": Op(normalizers.sparsemax_attention),
    "off_by_one": Op(normalizers.off_by_one_attention),
    "sigmoid": Op(normalizers.Sigmoid()),
    "clipped_softmax": Op(clipped.ClippedSoftmax(-0.05, 1.1)),
    "talking_heads": Op(talking_heads, alone=False),
    "differential": Op(differential, alone=False),
    "cosine": Op(cosines),
    "additive": Op(bahdanau),
    "local_p": Op(local_p, order="positions"),
    "cope": Op(contextual, order="array"),
    "forgetting": Op(forget, order="array", cross=False),
    "latent": Op(latents(latent.latent_attention), latent=True),
    "absorbed_latent": Op(latents(latent.absorbed_latent_attention), latent=True),
    "local": Op(sparse.Local(3), order="positions"),
    "chunkedlocal": Op(sparse.ChunkedLocal(3), order="positions"),
    "longformer": Op(sparse.Longformer(2), order="positions"),
    "streaming": Op(streaming.Streaming(3, 2), order="positions"),
    "bigbird": Op(sparse.BigBird(2, num_random_blocks=1, length=T), order="positions"),
    "strided": Op(sparse.Strided(3), order="positions"),
    "fixed": Op(sparse.Fixed(3), order="positions"),
    "moba": Op(moba.MoBA(2, 2), order="array", cross=False, refuses=IN_ORDER),
    "native_sparse": Op(native, order="array", cross=False, refuses=IN_ORDER, alone=False),
    "linformer": Op(
        linformer, order="array", causal=False, refuses=("score", "mask"), unread=POSITIONS
    ),
    "nystrom": Op(
        lowrank.Nystrom(3, iterations=2), order="array", causal=False, cross=False,
        refuses=("score", "mask"), unread=POSITIONS,
    ),
    "topk": Op(top_k.TopK(3)),
    "memory": Op(functools.partial(memory.memory_attention, num_keys=3), refuses=("score",)),
}  # fmt: skip
every_op = pytest.mark.parametrize("name", OPS)


def those(condition):
    return pytest.mark.parametrize("name", [name for name, op in OPS.items() if condition(op)])


def inputs(dtype="float32"):
    random = np.random.RandomState(0)
    shapes = (B, T, N, H), (B, T, K, H), (B, T, K, h)
    return [jnp.asarray(random.randn(*shape), dtype) for shape in shapes]


def own_mask(name):
    return masks.Causal() if OPS[name].causal else None


def compiled(f, *args):
    return jax.jit(f, compiler_options=QUICK)(*args)


@functools.cache
def padded(name):
    """Called as (qkv, lengths, cotangent): the output under Lengths, and the gradients."""
    op, order = OPS[name], own_mask(name)

    @functools.partial(jax.jit, compiler_options=QUICK)
    def out_and_gradients(qkv, lengths, cotangent):
        mask = masks.Lengths(lengths)
        mask = mask if order is None else order & mask
        out, pullback = jax.vjp(lambda *qkv: op.call(*qkv, mask=mask), *qkv)
        return out, pullback(cotangent)

    return out_and_gradients


@functools.cache
def whole(name):
    """The output for all tokens, under `Causal()` where the op takes it."""
    out, _ = padded(name)(inputs(), jnp.array([T, T]), jnp.zeros((B, T, N, h)))
    return np.asarray(out)


def is_op(name, value):
    """Whether it is an op with attention's calling convention, or a class of such ops."""
    if inspect.isfunction(value):
        names = set(inspect.signature(value).parameters)
        return name.endswith("attention") and bool(names & {"kv_positions", "kwargs"})
    if not dataclasses.is_dataclass(value):
        return False
    calls = [vars(base)["__call__"] for base in value.mro() if "__call__" in vars(base)]
    return bool(calls) and [*inspect.signature(calls[0]).parameters][1:4] == ["q", "k", "v"]


def test_every_op_has_a_row():
    found = set()
    for info in pkgutil.iter_modules(ops.__path__):
        # Features have no weights, so little to honour; a sequence's shards want several devices.
        if info.name in ("features", "context", "sharded"):  # their own tests have harnesses
            continue
        module = importlib.import_module(f"qkv_jax.ops.{info.name}")
        for name, value in vars(module).items():
            if getattr(value, "__module__", None) == module.__name__ and is_op(name, value):
                found.add(name.lower().removesuffix("_attention").replace("_", ""))
    assert "entmax" in found and found <= {name.replace("_", "") for name in OPS}


# Heads


@those(lambda op: op.alone and not op.latent)
def test_a_group_of_query_heads_shares_its_key_head(name):
    q, k, v = inputs()
    k, v = (jnp.repeat(x, N // K, axis=2) for x in (k, v))
    out = compiled(lambda *qkv: OPS[name].call(*qkv, mask=own_mask(name)), q, k, v)
    assert_close(out, whole(name), scale=5)


@every_op
def test_any_number_of_key_heads_that_divides_the_query_heads_is_taken(name):
    q, k, v = inputs()
    for heads_ in (1, N):
        keys, values = (jnp.repeat(x[:, :, :1], heads_, axis=2) for x in (k, v))
        call = lambda *qkv: OPS[name].call(*qkv, mask=own_mask(name))  # noqa: E731
        if (name, heads_) == ("differential", 1):
            with pytest.raises(ValueError, match=r"^k: key/value heads come in pairs"):
                jax.eval_shape(call, q, keys, values)
        else:
            assert jax.eval_shape(call, q, keys, values).shape == (B, T, N, h)


# Order


@those(lambda op: op.causal)
def test_no_output_depends_on_a_later_token(name):
    cotangent = jnp.zeros((B, T, N, h)).at[:, 5].set(1.0)
    _, gradients = padded(name)(inputs(), jnp.array([T, T]), cotangent)
    for gradient in gradients:
        np.testing.assert_array_equal(gradient[:, 6:], 0)
        assert np.abs(gradient[:, :6]).max() > 0
    assert np.abs(gradients[2][:, 5]).max() > 0


@those(lambda op: op.order == "set")
def test_permuted_tokens_give_permuted_outputs(name):
    order = np.random.RandomState(0).permutation(T)
    f = jax.jit(OPS[name].call, compiler_options=QUICK)
    out = f(*inputs())
    assert_close(f(*(x[:, order] for x in inputs())), out[:, order], scale=5)
    q, k, v = inputs()
    assert_close(f(q, k[:, order], v[:, order]), out, scale=5)


@those(lambda op: op.order != "array")
def test_tokens_that_are_permuted_with_their_positions_give_permuted_outputs(name):
    order = np.random.RandomState(0).permutation(T)
    positions = {"q_positions": order, "kv_positions": order}
    call = lambda *qkv: OPS[name].call(*qkv, mask=masks.Causal(), **positions)  # noqa: E731
    assert_close(compiled(call, *(x[:, order] for x in inputs())), whole(name)[:, order], scale=5)


@those(lambda op: op.cross)
def test_the_last_queries_alone_give_the_last_outputs(name):
    op, mask = OPS[name], own_mask(name)
    where = {} if mask is None else {"q_positions": np.arange(T - 3, T)}
    q, k, v = inputs()
    out = compiled(lambda *qkv: op.call(*qkv, mask=mask, **where), q[:, -3:], k, v)
    assert_close(out, whole(name)[:, -3:], scale=5)
    if mask is not None:
        with pytest.raises(ValueError, match=r"^q_positions: "):
            op.call(q[:, -3:], k, v, mask=mask)


@those(lambda op: not op.cross)
def test_what_is_self_attention_says_so(name):
    q, k, v = inputs()
    with pytest.raises(ValueError, match=r"^(k|q_positions): "):
        OPS[name].call(q[:, -3:], k, v, mask=own_mask(name))


# Padding


@every_op
def test_a_row_that_may_attend_to_nothing_gives_0_and_has_no_gradient(name):
    with jax.debug_nans(True):
        out, gradients = padded(name)(inputs(), jnp.array([0, T]), jnp.ones((B, T, N, h)))
    for x in (out, *gradients):
        np.testing.assert_array_equal(x[0], 0)
        assert np.abs(x[1]).max() > 0


@every_op
def test_what_padding_holds_changes_nothing_and_has_no_gradient(name):
    lengths = jnp.array([SHORT, SHORT])
    cotangent = jnp.ones((B, T, N, h)).at[:, SHORT:].set(0.0)
    out, gradients = padded(name)(inputs(), lengths, cotangent)
    noise = [x.at[:, SHORT:].multiply(-9) for x in inputs()]
    other, others = padded(name)(noise, lengths, cotangent)
    assert_close(other[:, :SHORT], out[:, :SHORT])
    for gradient, unchanged in zip(gradients, others, strict=True):
        np.testing.assert_array_equal(gradient[:, SHORT:], 0)
        assert_close(unchanged, gradient, scale=5)


@every_op
def test_appended_padding_changes_nothing(name):
    out, _ = padded(name)(inputs(), jnp.array([SHORT, SHORT]), jnp.zeros((B, T, N, h)))
    call = lambda *qkv: OPS[name].call(*qkv, mask=own_mask(name))  # noqa: E731
    assert_close(out[:, :SHORT], compiled(call, *(x[:, :SHORT] for x in inputs())), scale=5)


# Arguments

# As leaves of one compiled program, what changes is one value at a time.
PLAIN = {
    "score": scores.Softcap(jnp.float32(1e4)),
    "scale": jnp.float32(0.4),
    "mask": masks.Dense(jnp.ones((N, T, T), bool)),
    "dropout_rng": jax.random.key(0),
    "q_positions": jnp.arange(T),
    "kv_positions": jnp.arange(T),
}
CHANGED = {
    "score": scores.Softcap(jnp.float32(0.5)),
    "scale": jnp.float32(2.0),
    "mask": masks.Dense(jnp.asarray(np.eye(T, dtype=bool) | (fixed(N, T, T) > 0))),
    "dropout_rng": jax.random.key(1),
    "q_positions": jnp.arange(T)[::-1],
    "kv_positions": jnp.arange(T)[::-1],
}


@every_op
def test_no_argument_is_ignored(name):
    """Each changes the output, or is refused by its name, or is documented to mean nothing."""
    op, order = OPS[name], own_mask(name)
    for argument in op.refuses:
        kwargs = {"mask": order} | {argument: CHANGED[argument]}
        with pytest.raises(NotImplementedError, match=f"^{argument}: "):
            jax.eval_shape(functools.partial(op.call, **kwargs), *inputs())

    @functools.partial(jax.jit, compiler_options=QUICK)
    def call(qkv, kwargs):
        mask = kwargs.pop("mask", None)
        mask = mask if order is None else order if mask is None else order & mask
        return op.call(*qkv, mask=mask, dropout_rate=0.25, **kwargs)

    plain = {argument: x for argument, x in PLAIN.items() if argument not in op.refuses}
    out = call(inputs(), plain)
    for argument in plain:
        other = call(inputs(), plain | {argument: CHANGED[argument]})
        assert np.isfinite(other).all(), argument
        changed = np.abs(other - out).max()
        assert changed == 0 if argument in op.unread else changed > 1e-3, argument


@every_op
@pytest.mark.parametrize("dtype", ["bfloat16", "float16", "float32"])
def test_the_output_has_the_dtype_of_v(name, dtype):
    q, k, v = inputs(dtype=dtype)
    call = lambda *qkv: OPS[name].call(*qkv, mask=own_mask(name))  # noqa: E731
    out = jax.eval_shape(call, q, k, v)
    assert (out.shape, out.dtype) == ((B, T, N, h), dtype)
    if not OPS[name].latent:
        assert jax.eval_shape(call, q, k.astype("float32"), v).dtype == dtype


@those(lambda op: not op.latent)
def test_arrays_of_a_wrong_shape_or_dtype_are_named(name):
    q, k, v = inputs()
    for argument, wrong in (
        ("q", (q[0], k, v)),
        ("q", (q.astype("int32"), k, v)),
        ("k", (q, k[..., :1], v)),
        ("k", (q, k[0], v)),
        ("k", (q, k[:1], v)),
        ("k", (q, jnp.repeat(k, 3, axis=2), jnp.repeat(v, 3, axis=2))),
        ("v", (q, k, v[:, :, :, 0])),
        ("v", (q, k, v[:, :-1])),
    ):
        with pytest.raises(ValueError, match=f"^{argument}: "):
            OPS[name].call(*wrong, mask=own_mask(name))


WRONG = {
    "mask": {"mask": np.ones((T, T), bool)},
    "score": {"score": 1.0},
    "scale": {"scale": np.ones(N)},
    "dropout_rate": {"dropout_rate": 1.5},
    "dropout_rng": {"dropout_rate": 0.5},
    "q_positions": {"q_positions": np.zeros(T + 1, int)},
    "kv_positions": {"kv_positions": np.arange(T) / 2},
}


@pytest.mark.parametrize("argument", WRONG)
@every_op
def test_any_other_wrong_argument_is_named(name, argument):
    kwargs = {"mask": own_mask(name)} | WRONG[argument]
    wanted = NotImplementedError if argument in OPS[name].refuses else ValueError
    with pytest.raises((ValueError, wanted), match=f"^{argument}: "):
        OPS[name].call(*inputs(), **kwargs)
