"""What a softmax over keys leaves behind, and how two softmaxes become one."""

import chex
import jax
import jax.numpy as jnp
import numpy as np

Array = jax.Array | np.ndarray


@chex.dataclass(frozen=True)
class Stats:
    """What a softmax over keys leaves behind, row by row; float32, or float64 for float64 input.

    `lse` and `entropy` are differentiable; `max_logit` carries no gradient. A row that may attend
    to nothing has lse and max -inf and entropy 0; with a sink, lse is the sink.
    """

    lse: jax.Array  # [B, N, T], log of the sum of exp(logit), sinks included
    max_logit: jax.Array  # [B, N, T], over keys alone
    entropy: jax.Array  # [B, N, T], in nats, of the distribution over keys (and the sink)


def merge(out_a: Array, stats_a: Stats, out_b: Array, stats_b: Stats) -> tuple[jax.Array, Stats]:
    """The attention over two disjoint sets of keys, from the attention over each.

        lse = log(exp(lse_a) + exp(lse_b))
        out = exp(lse_a - lse) out_a + exp(lse_b - lse) out_b

    Exact, differentiable and associative: ring attention, split-key decoding and prefix caching
    are this one line. The partial results must come from the same queries, without sinks.

    Args:
      out_a, out_b: [B, T, N, h].
      stats_a, stats_b: what `attention_with_stats` returned beside them.

    Returns:
      [B, T, N, h] in the dtype of `out_a`, and the merged statistics.
    """
    peak = jax.lax.stop_gradient(jnp.maximum(stats_a.lse, stats_b.lse))
    peak = jnp.where(peak > -jnp.inf, peak, 0)
    share_a, share_b = jnp.exp(stats_a.lse - peak), jnp.exp(stats_b.lse - peak)
    total = share_a + share_b
    empty = total == 0
    total = jnp.where(empty, 1, total)
    share_a, share_b = share_a / total, share_b / total
    out = sum(
        jnp.swapaxes(share, 1, 2)[..., None] * x.astype(share.dtype)
        for share, x in ((share_a, out_a), (share_b, out_b))
    )
    lse = peak + jnp.log(total)
    # Entropy is lse - E[logit], and the expected logit of the whole is the mean of the parts'.
    mean_logit = sum(
        share * jnp.where(share > 0, stats.lse - stats.entropy, 0)
        for share, stats in ((share_a, stats_a), (share_b, stats_b))
    )
    return out.astype(out_a.dtype), Stats(
        lse=jnp.where(empty, -jnp.inf, lse),
        max_logit=jnp.maximum(stats_a.max_logit, stats_b.max_logit),
        entropy=jnp.where(empty, 0, lse - mean_logit),
    )
