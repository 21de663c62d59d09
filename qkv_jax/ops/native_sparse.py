"""Native sparse attention: a summary of everything, the blocks that matter, and a window."""

import dataclasses
import math

import jax
import jax.numpy as jnp
import numpy as np

from qkv_jax.ops.attention import attention_with_stats
from qkv_jax.ops.block_selection import SCORES, attend_chosen, best_blocks, check
from qkv_jax.ops.masks import Causal, Lengths, Mask
from qkv_jax.ops.rows import by_rows
from qkv_jax.ops.scores import Score
from qkv_jax.ops.sparse import Local

Array = jax.Array | np.ndarray


@dataclasses.dataclass(frozen=True)
class Pattern:
    """Which keys native sparse attention attends to.

    Row i of the compressed keys and values stands for the tokens from i * stride on,
    `compressed_size` of them: as many rows as are whole.

    Args:
      compressed_size: l, tokens in a row.
      stride: d, from one row to the next; the paper's divides l and l'.
      block_size: l', keys in a block that can be selected.
      num_selected: n, how many blocks a query selects, the given ones among them.
      window: how far back the window reaches, as in `masks.SlidingWindow`.
      num_initial: how many of the first blocks are given.
      num_local: how many of the last blocks up to the query's own are given.
    """

    compressed_size: int = 32
    stride: int = 16
    block_size: int = 64
    num_selected: int = 16
    window: int = 512
    num_initial: int = 1
    num_local: int = 2

    def __post_init__(self):
        for field in dataclasses.fields(self):
            value = getattr(self, field.name)
            least = 0 if field.name in ("window", "num_initial", "num_local") else 1
            if not isinstance(value, int) or value < least:
                raise ValueError(
                    f"{field.name}: wanted an integer of at least {least}, got {value!r}"
                )
        if self.num_initial + self.num_local > self.num_selected:
            raise ValueError(
                f"num_selected: wanted at least num_initial + num_local = "
                f"{self.num_initial + self.num_local}, got {self.num_selected}"
            )

    def last_tokens(self, length: int) -> np.ndarray:
        """The last token of each row that `length` tokens compress to, [M]."""
        num_rows = max(0, (length - self.compressed_size) // self.stride + 1)
        return np.arange(num_rows) * self.stride + self.compressed_size - 1


def native_sparse_attention(
    q: Array,
    k: Array,
    v: Array,
    *,
    compressed_k: Array,
    compressed_v: Array,
    gates: Array,
    pattern: Pattern,
    mask: Mask | None = None,
    score: Score | tuple[Score, ...] | None = None,
    scale: float | None = None,
    dropout_rate: float = 0.0,
    dropout_rng: Array | None = None,
    q_positions: Array | None = None,
    kv_positions: Array | None = None,
) -> jax.Array:
    """Native sparse attention, NSA (Yuan et al. 2025, arxiv.org/abs/2502.11089).

        out[t] = gates[t, 0] * attention to the rows of compressed keys whose last token is <= t
               + gates[t, 1] * attention to the keys <= t in the blocks that t selects
               + gates[t, 2] * attention to the keys t - window ... t

    The query heads of a key head select together: the first and the last blocks up to their own,
    as `pattern` gives them, and those of greatest importance,

        importance[t, j] = sum over these heads and the rows i of
                           weight[t, i] in the first branch * strides that i and j share

    The selection has no gradient. A branch without keys is 0, as the first is for early queries.
    Approximates attention over all keys. O(T (window + num_selected * block_size)), and T S /
    stride products for the compressed rows.

    Args:
      q, k, v: as in `ops.attention`, with T == S. The branches share k and v; in the paper each
        has keys and values of its own.
      compressed_k, compressed_v: floating [B, M, K, H] and [B, M, K, h].
      gates: floating [B, T, N, 3].
      pattern: the sizes of blocks and window, and how many are selected.
      mask: `Causal()`, alone or joined by `&` with `Lengths(...)`.
      score, q_positions, kv_positions: None; tokens stand in array order.
      scale, dropout_rate, dropout_rng: as in `ops.attention`; each branch drops for itself.

    Returns:
      [B, T, N, h], in the dtype of v.

    Raises:
      ValueError: naming the argument, what came and what was wanted.
      NotImplementedError: for any other mask, a score or positions.
    """
    args, causal, lengths = check(
        q, k, v, who="native sparse attention", mask=mask, score=score, scale=scale,
        dropout_rate=dropout_rate, dropout_rng=dropout_rng, q_positions=q_positions,
        kv_positions=kv_positions,
    )  # fmt: skip
    if not causal:
        raise NotImplementedError("mask: native sparse attention is causal, so wanted Causal()")
    B, T, N, H = args.q.shape
    K, h = args.v.shape[2:]
    ends = pattern.last_tokens(T)
    for name, x, wanted in (
        ("compressed_k", compressed_k, (B, len(ends), K, H)),
        ("compressed_v", compressed_v, (B, len(ends), K, h)),
        ("gates", gates, (B, T, N, 3)),
    ):
        if np.shape(x) != wanted:
            raise ValueError(f"{name}: wanted {list(wanted)}, got {list(np.shape(x))}")

    order = Causal() if lengths is None else Causal() & Lengths(lengths)
    rngs = jax.random.split(dropout_rng, 3) if args.dropout_rate else [None] * 3
    dropped = [{"dropout_rate": args.dropout_rate, "dropout_rng": rng} for rng in rngs]
    compressed, stats = attention_with_stats(
        args.q, compressed_k, compressed_v, mask=order, scale=args.scale,
        q_positions=np.arange(T), kv_positions=ends, **dropped[0],
    )  # fmt: skip
    chosen = blocks_by_importance(
        args.q, compressed_k, stats.lse, pattern=pattern, scale=args.scale, lengths=lengths
    )
    selected = attend_chosen(
        dataclasses.replace(args, **dropped[1]), chosen, block_size=pattern.block_size,
        causal=True, lengths=lengths,
    )  # fmt: skip
    window = Local(pattern.window)(
        args.q, args.k, args.v, mask=order, scale=args.scale, **dropped[2]
    )
    gates = jnp.asarray(gates, args.dtype)
    branches = (compressed, selected, window)
    out = sum(gates[..., i, None] * branch for i, branch in enumerate(branches))
    return out.astype(args.v.dtype)


def blocks_by_importance(
    q: jax.Array,
    compressed_k: Array,
    lse: jax.Array,
    *,
    pattern: Pattern,
    scale: float | Array,
    lengths: int | Array | None = None,
) -> jax.Array:
    """NSA's choice: int32 [B, T, K, num_selected], -1 where there are fewer blocks.

    Args:
      q, compressed_k, scale: of the first branch.
      lse: [B, N, T], its log-sum-exp, which makes weights of logits.
      pattern: says which rows and blocks there are.
      lengths: an integer or integers [B]; rows that are not of real tokens alone do not count.
    """
    B, T, N, H = q.shape
    M, K = compressed_k.shape[1:3]
    ends = pattern.last_tokens(T)
    real = ends < jnp.asarray(T if lengths is None else lengths).reshape(-1, 1, 1, 1, 1)
    keys = jnp.asarray(compressed_k, lse.dtype)
    blocks = np.arange(-(-T // pattern.block_size))

    def choose(start: int | jax.Array, size: int) -> jax.Array:
        rows = jax.lax.dynamic_slice_in_dim(q, start, size, axis=1).astype(lse.dtype)
        total = jax.lax.dynamic_slice_in_dim(lse, start, size, axis=2)
        query = (start + np.arange(size))[:, None]
        logits = jnp.einsum("BTKGH,BmKH->BKGTm", rows.reshape(B, size, K, N // K, H), keys)
        logits = logits * jnp.asarray(scale, lse.dtype) - total.reshape(B, K, N // K, size, 1)
        weights = jnp.where((ends <= query) & real, jnp.exp(logits), 0).sum(2)
        importance = importance_of_blocks(jnp.swapaxes(weights, 1, 2), len(blocks), pattern)
        own = query[:, None] // pattern.block_size
        given = (blocks < pattern.num_initial) | (blocks > own - pattern.num_local)
        importance = jnp.where(given, jnp.inf, importance)
        return best_blocks(jnp.where(blocks <= own, importance, -jnp.inf), pattern.num_selected)

    q, lse, keys = jax.lax.stop_gradient((q, lse, keys))
    return by_rows(choose, T, max(1, SCORES // max(1, B * N * M)))


def importance_of_blocks(weights: jax.Array, num_blocks: int, pattern: Pattern) -> jax.Array:
    """Equation 9 of the paper: [..., M] weights of compressed rows to [..., num_blocks].

    Tokens are counted in units that strides, rows and blocks are made of: where the stride divides
    the others, in strides. A row gives its weight to each of its units, a block takes the sum.
    """
    sizes = pattern.stride, pattern.compressed_size, pattern.block_size
    unit = math.gcd(*sizes)
    stride, row, block = (size // unit for size in sizes)
    last = (weights.shape[-1] - 1) * stride  # where the last row begins
    rest = num_blocks * block - max(0, last + 1)
    none = [(0, 0, 0)] * (weights.ndim - 1)
    units = sum(
        jax.lax.pad(weights, jnp.zeros((), weights.dtype), [*none, (n, rest - n, stride - 1)])
        for n in range(row)
    )
    return units.reshape(*weights.shape[:-1], num_blocks, block).sum(-1) / stride
