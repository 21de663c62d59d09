"""The residual stream of a Transformer: embeddings in, blocks, what they share."""

import collections
import functools
import itertools
import math
from collections.abc import Callable, Iterator, Sequence
from typing import Any

import jax
import jax.numpy as jnp
from flax import nnx
from flax.typing import Initializer

from qkv_jax import nn
from qkv_jax.models.config import TransformerConfig
from qkv_jax.models.mixers import HEADS, MIXERS, qk_norm_kind
from qkv_jax.nn import sharding
from qkv_jax.nn.cross_block import CrossBlock
from qkv_jax.ops import mesh
from qkv_jax.ops.cache import check_room
from qkv_jax.ops.masks import Mask
from qkv_jax.ops.positions import alibi_slopes
from qkv_jax.ops.scores import Alibi, RelativeBias, Score, Softcap


def kernel_init(config: TransformerConfig) -> Initializer:
    """How embeddings and matrices begin."""
    return nnx.initializers.normal(config.init_std)


def out_init(config: TransformerConfig) -> Initializer:
    """How what a block adds begins: scaled by 1 / sqrt(2 L) as in GPT-2, or zero."""
    if config.zero_init_outputs:
        return nnx.initializers.zeros
    return nnx.initializers.normal(config.init_std / math.sqrt(2 * config.num_layers))


def make_norm(config: TransformerConfig, rngs: nnx.Rngs) -> Callable[[], nnx.Module]:
    """Makes the norms that the config asks for."""
    return functools.partial(
        nn.make_norm, config.norm, config.width, use_bias=config.use_bias,
        epsilon=config.norm_epsilon, dtype=config.dtype, rngs=rngs,
    )  # fmt: skip


def make_final_norm(config: TransformerConfig, rngs: nnx.Rngs) -> nnx.Module | None:
    """The norm of the last residual stream; None where the last block has normed it."""
    return None if config.norm_position == "post" else make_norm(config, rngs)()


def make_positions(config: TransformerConfig, rngs: nnx.Rngs) -> nnx.Module | None:
    """The embedding of positions; rotary ones are the mixers', others scores of the logits."""
    if config.position == "learned":
        return nn.LearnedPositions(
            config.context, config.width, embedding_init=kernel_init(config), rngs=rngs
        )
    if config.position == "sinusoidal":
        return nn.SinusoidalPositions(config.width)
    return None


def add_positions(
    config: TransformerConfig,
    embedding: nnx.Module | None,
    x: jax.Array,
    positions: jax.Array | None,
) -> jax.Array:
    """Token embeddings [B, T, D] with those of their positions, by default 0 ... T-1."""
    x = sharding.looked_up(x)
    if config.scale_embeddings or config.position == "sinusoidal":
        x = x * math.sqrt(
            config.width
        )  # as Vaswani et al. do, whose sines are of size 1, and Gemma
    if embedding is None:
        return x
    if positions is None:
        positions = jnp.arange(x.shape[1])
    return x + embedding(positions).astype(x.dtype)


def make_bias(
    config: TransformerConfig, blocks: nnx.List, rngs: nnx.Rngs, *, field: str = "mixer"
) -> nnx.Param | None:
    """T5's table of biases, [buckets, N], which a stack shares; None but for position "relative".

    Raises:
      ValueError: positions or a cap are to be a score, and no layer of the stack is attention;
        `field` is the config's that names its mixers.
    """
    attention = any(isinstance(block.mixer, nn.MultiHeadAttention) for block in blocks)
    if config.position in ("alibi", "relative") and not attention:
        raise ValueError(
            f"model.position: {config.position} positions are a score of attention's logits, and "
            f"no layer of model.{field} = {config.mixer!r} is attention"
        )
    if config.attention_softcap and not attention:
        raise ValueError(
            f"model.attention_softcap: {config.attention_softcap} was set, and no layer of "
            f"model.{field} = {config.mixer!r} is attention"
        )
    if config.position != "relative":
        return None
    table = kernel_init(config)(rngs.params(), (config.relative_buckets, config.num_heads))
    return nnx.Param(table)


def logit_scores(config: TransformerConfig, bias: nnx.Param | None) -> tuple[Score, ...] | None:
    """What happens to the logits of a stack's attention to itself: a cap, ALiBi, T5's table."""
    scores: list[Score] = []
    if config.attention_softcap:
        scores.append(Softcap(config.attention_softcap))
    if config.position == "alibi":
        scores.append(Alibi(alibi_slopes(config.num_heads)))
    if config.position == "relative":
        table = RelativeBias(
            bias[...], bidirectional=not config.causal, max_distance=config.relative_distance
        )
        scores.append(table)
    return tuple(scores) or None


def make_feed_forward(config: TransformerConfig, rngs: nnx.Rngs) -> nn.FeedForward | None:
    """The network of one block that mixes no tokens, if it has one."""
    if config.hidden == 0:
        return None
    return nn.FeedForward(
        config.width, config.hidden, activation=config.activation, use_bias=config.use_bias,
        kernel_init=kernel_init(config), out_init=out_init(config), dtype=config.dtype, rngs=rngs,
    )  # fmt: skip


def make_cross_attention(config: TransformerConfig, rngs: nnx.Rngs) -> nn.MultiHeadAttention:
    """What reads the encoder's output: with the sizes of the mixers, but without positions."""
    return nn.MultiHeadAttention(
        config.width, config.num_heads, **{name: getattr(config, name) for name in HEADS},
        use_bias=config.use_bias, qkv_bias=config.qkv_bias, qk_norm=config.qk_norm,
        qk_norm_kind=qk_norm_kind(config), norm_epsilon=config.norm_epsilon,
        scale=config.attention_scale, dropout_rate=config.dropout_rate,
        kernel_init=kernel_init(config), out_init=out_init(config), dtype=config.dtype, rngs=rngs,
    )  # fmt: skip


def make_blocks(config: TransformerConfig, rngs: nnx.Rngs) -> nnx.List:
    """One block for each layer, with the mixer that `config.mixer` names.

    Where the config says `cross_attention`, a block also attends to a context.
    """

    def block(layer: int, name: str) -> nn.TransformerBlock | CrossBlock:
        branches = [
            MIXERS[name].make(
                config.of_layer(layer), layer, kernel_init=kernel_init(config),
                out_init=out_init(config), dtype=config.dtype, rngs=rngs,
            )
        ]  # fmt: skip
        kind = nn.TransformerBlock
        if config.cross_attention:
            kind = CrossBlock
            branches.append(make_cross_attention(config, rngs))
        return kind(
            *branches,
            make_feed_forward(config, rngs),
            norm=make_norm(config, rngs),
            norm_position=config.norm_position,
            dropout_rate=config.dropout_rate,
        )

    return nnx.List(block(layer, name) for layer, name in enumerate(config.mixers))


def dropout_rngs(config: TransformerConfig, rng: jax.Array | None, number: int) -> list:
    """Keys for so many dropouts, or so many times None."""
    if rng is None or config.dropout_rate == 0:
        return [None] * number
    return list(jax.random.split(rng, number))


def apply_blocks(
    config: TransformerConfig,
    blocks: Sequence[nn.TransformerBlock | CrossBlock],
    x: jax.Array,
    **kwargs: Any,
) -> jax.Array:
    """The residual stream [B, T, D] after all blocks; arguments as in `block_states`."""
    return last(itertools.chain([x], block_states(config, blocks, x, **kwargs)))


def last(states: Iterator[jax.Array]) -> jax.Array:
    """The last of some states; those before it are let go as it comes."""
    return collections.deque(states, maxlen=1).pop()


def block_states(
    config: TransformerConfig,
    blocks: Sequence[nn.TransformerBlock | CrossBlock],
    x: jax.Array,
    *,
    mask: Mask | None,
    positions: jax.Array | None,
    rngs: Sequence[jax.Array | None],
    score: tuple[Score, ...] | None = None,
    **shared: Any,
) -> Iterator[jax.Array]:
    """The residual stream [B, T, D] after each block.

    `score` is for the mixers that are attention, as rotary positions are: the others know order by
    themselves. `shared` is what else every block takes, such as a context.
    """
    first_values = None  # those of the first layer that hands its values down
    for block, rng in zip(blocks, rngs, strict=True):
        own, first_values = own_arguments(config, block, x, score, first_values)
        own |= {"mask": mask, "positions": positions, **shared}
        apply = functools.partial(_apply, block, own)
        if config.remat:
            apply = jax.checkpoint(apply)
        elif mesh.cuts("fsdp"):
            apply = jax.checkpoint(apply, policy=sharding.saved)
        x = apply(x, rng)
        yield x


def _apply(
    block: nn.TransformerBlock | CrossBlock,
    kwargs: dict[str, Any],
    x: jax.Array,
    rng: jax.Array | None,
) -> jax.Array:
    return sharding.gathered(block)(x, rng=rng, **kwargs)


def init_caches(blocks: Sequence[nn.TransformerBlock | CrossBlock], *args, **kwargs) -> list[Any]:
    """A cache for each block; arguments as of its mixer's `init_cache`."""
    return [block.mixer.init_cache(*args, **kwargs) for block in blocks]


def extend_blocks(
    config: TransformerConfig,
    blocks: Sequence[nn.TransformerBlock | CrossBlock],
    x: jax.Array,
    caches: Sequence[Any],
    *,
    score: tuple[Score, ...] | None = None,
    own: Sequence[dict[str, Any]] | None = None,
    **shared: Any,
) -> tuple[jax.Array, list[Any]]:
    """New tokens [B, T, D] after all blocks, and their caches: `apply_blocks`, in parts.

    Args:
      caches: of the blocks.
      score: for the mixers that are attention, as in `block_states`.
      own: what else each block takes.
      shared: what else all take: positions, lengths.

    Raises:
      ValueError: for known positions that a cache has no room for.
    """
    check_room(caches, shared["positions"], shared.get("lengths"))
    first_values, after = None, []
    own = [{}] * len(blocks) if own is None else own
    for block, cache, given in zip(blocks, caches, own, strict=True):
        kwargs, first_values = own_arguments(config, block, x, score, first_values)
        x, cache = block.extend(x, cache, **shared, **given, **kwargs)
        after.append(cache)
    return x, after


def own_arguments(
    config: TransformerConfig,
    block: nn.TransformerBlock | CrossBlock,
    x: jax.Array,
    score: tuple[Score, ...] | None,
    first_values: jax.Array | None,
) -> tuple[dict[str, Any], jax.Array | None]:
    """What a block's mixer takes that not all take, and the first layer's values for later ones."""
    kwargs: dict[str, Any] = {}
    if score is not None and isinstance(block.mixer, nn.MultiHeadAttention):
        kwargs["score"] = score
    if isinstance(block.mixer, nn.ValueResidualAttention):
        kwargs["first_values"] = first_values
        if first_values is None:  # the block computes them too, and the compiler shares them
            seen = x if config.norm_position == "post" else block.mixer_norm(x)
            first_values = block.mixer.values(seen)
    return kwargs, first_values


def make_head(config: TransformerConfig, rngs: nnx.Rngs) -> nn.Linear | None:
    """What makes logits of the residual stream; None where the token embedding does."""
    if config.tie_embeddings:
        return None
    return nn.Linear(
        config.width, config.vocab_size, use_bias=False,
        kernel_init=nnx.initializers.zeros if config.zero_init_outputs else kernel_init(config),
        dtype=config.dtype, rngs=rngs,
    )  # fmt: skip


def vocabulary_logits(
    config: TransformerConfig,
    x: jax.Array,
    embedding: nnx.Embed,
    head: nn.Linear | None,
    bias: nnx.Param | None = None,
) -> jax.Array:
    """The logits, float32 [B, T, V], of x [B, T, D]; without a head, by the embedding."""
    x = sharding.all_tokens(x)
    if config.scale_logits:
        x = x / math.sqrt(config.width)
    if head is None:
        table = embedding.embedding[...].astype(x.dtype)
        if x.size // x.shape[-1] <= nn.linear.FEW:  # no copy of the table, which `.T` may be
            logits = jax.lax.dot_general(x, table, (((x.ndim - 1,), (1,)), ((), ())))
        else:
            logits = nn.linear.flat_dot_general(x, table.T, (((x.ndim - 1,), (0,)), ((), ())))
    else:
        logits = head(x)
    logits = mesh.constrain(logits.astype(jnp.float32), mesh.ROWS, mesh.TOKENS, mesh.HEADS)
    if bias is not None:
        logits += bias[...]
    if cap := config.logit_softcap:
        logits = cap * jnp.tanh(logits / cap)
    return logits
