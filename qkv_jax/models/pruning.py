"""Heads removed from a trained decoder, whose matrices become smaller."""

import dataclasses
from collections.abc import Collection, Mapping, Sized

import jax
import jax.numpy as jnp
import numpy as np
from flax import nnx

from qkv_jax import nn
from qkv_jax.models.decoder import Decoder, DecoderConfig

Heads = Mapping[int, Collection[int]]  # layer -> some of its query heads, both from 0

# Heads of these mixers are alike and meet in the projection out alone, so that any may go.
PRUNABLE = (
    "attention", "sliding_window", "chunked", "longformer", "streaming", "bigbird", "strided",
    "fixed", "topk", "moba", "sigmoid", "entmax", "sparsemax", "off_by_one", "clipped_softmax",
    "linear", "performer",
)  # fmt: skip


def prune_heads(model: Decoder, heads: Heads) -> Decoder:
    """The decoder without some heads: what it computes where those heads' outputs are zero.

    The projections to queries, keys and values lose the heads' columns, the projection out their
    rows (Michel et al. 2019, arxiv.org/abs/1905.10650). `config.heads_per_layer` says what is left.

    With grouped queries a key/value head goes where all queries of its group do; the other groups
    of the layer must keep equally many.

    Args:
      model: its pruned layers have mixers of `PRUNABLE`, its positions know no heads (not ALiBi,
        nor T5's). It stays as it was.
      heads: layer -> its query heads that go.

    Raises:
      ValueError: there is no such layer or head, it cannot go, or none would be left in its layer.
    """
    config, params = model.config, nn.split(model)[1]
    left, blocks = [], dict(params["blocks"])
    _check_layers(config, heads)
    for layer, block in blocks.items():
        mixer, gone = model.blocks[layer].mixer, set(heads.get(layer, ()))
        if not gone:
            own = config.of_layer(layer)
            left.append((own.num_heads, own.kv_heads))
            continue
        queries, keys = _kept(layer, mixer.num_heads, mixer.num_kv_heads, gone)
        left.append((len(queries), len(keys)))
        blocks[layer] = block | {"mixer": _cut(block["mixer"], queries, keys, mixer.head_dim)}
    config = dataclasses.replace(config, head_dim=config.attention_dim, heads_per_layer=tuple(left))
    return rebuilt(config, params | {"blocks": blocks})


def silence_heads(model: Decoder, heads: Heads) -> Decoder:
    """The decoder with some heads' outputs zero, in matrices of the size that they had.

    What `prune_heads` returns computes the same; but this one takes any heads, and the same
    compiled program.

    Args:
      model, heads: as for `prune_heads`, but all of a layer's heads may go.

    Raises:
      ValueError: there is no such layer or head, or it cannot go.
    """
    _check_layers(model.config, heads)
    factors = {}
    for layer, gone in heads.items():
        N = model.blocks[layer].mixer.num_heads
        _check_heads(layer, N, gone)
        factors[layer] = np.isin(np.arange(N), list(gone), invert=True).astype(np.float32)
    return scale_heads(model, factors)


def scale_heads(model: Decoder, factors: Mapping[int, jax.Array | np.ndarray]) -> Decoder:
    """The decoder with heads' outputs times factors, which its projections out take in.

    Args:
      model: it stays as it was.
      factors: layer -> [N], floating, possibly traced.

    Raises:
      ValueError: there is no such layer, it has another number of heads, or they cannot be scaled.
    """
    graphdef, params = nn.split(model)
    blocks = dict(params["blocks"])
    _check_layers(model.config, factors)
    for layer, factor in factors.items():
        mixer, own = model.blocks[layer].mixer, dict(blocks[layer]["mixer"])
        if np.shape(factor) != (mixer.num_heads,):
            raise ValueError(
                f"factors: wanted one for each of the {mixer.num_heads} heads of layer {layer}, "
                f"got the shape {list(np.shape(factor))}"
            )
        kernel = own["out"]["kernel"]
        rows = jnp.repeat(jnp.asarray(factor, kernel.dtype), mixer.head_dim)[:, None]
        own["out"] = own["out"] | {"kernel": rows * kernel}
        blocks[layer] = blocks[layer] | {"mixer": own}
    return nn.merge(graphdef, params | {"blocks": blocks})


def least_important(
    importance: np.ndarray,
    number: int,
    *,
    num_kv_heads: int | None = None,
    gone: Heads | None = None,
) -> dict[int, list[int]]:
    """The heads to go next: the least important ones of all layers, but never a layer's last.

    Importance is divided by its norm over the heads of each layer, as Michel et al. 2019 do
    (section 4.1). With grouped queries, heads go with all of their group: its importance is theirs
    together.

    Args:
      importance: [L, N], of `head_importance`.
      number: of heads that go, counted with `gone`.
      num_kv_heads: K; None: N.
      gone: heads that went before, which stay among them.

    Returns:
      Layer -> heads, those of `gone` included.

    Raises:
      ValueError: so many cannot go, or they are no whole groups.
    """
    N = importance.shape[1]
    G = N // (N if num_kv_heads is None else num_kv_heads)
    norms = np.linalg.norm(importance, axis=1, keepdims=True)
    shares = (importance / np.maximum(norms, 1e-30)).reshape(len(importance), -1, G).sum(-1)
    went = {(layer, head // G) for layer, heads in (gone or {}).items() for head in heads}
    return lowest(dict(enumerate(shares)), number, G, first=went)


def lowest(
    values: Mapping[int, np.ndarray],
    number: int,
    group: int,
    *,
    first: Collection[tuple[int, int]] = (),
) -> dict[int, list[int]]:
    """The heads with the lowest values, but never a layer's last.

    Args:
      values: layer -> [K], of its key/value heads.
      number: of query heads, counted with those of `first`.
      group: G, the query heads of a key/value head, which are in or out together.
      first: (layer, key/value head) that come before all others.

    Returns:
      Layer -> query heads, in order.

    Raises:
      ValueError: there are not so many, or they are no whole groups.
    """
    left = {layer: len(x) for layer, x in values.items()}
    most = group * sum(K - 1 for K in left.values())
    if number % group or not 0 <= number <= most:
        raise ValueError(
            f"number: wanted a multiple of {group} from 0 to {most}, the heads of all layers "
            f"but one group each, got {number}"
        )
    every = [(layer, k) for layer, K in left.items() for k in range(K)]
    chosen: list[tuple[int, int]] = []
    for layer, k in sorted(every, key=lambda at: (at not in first, values[at[0]][at[1]])):
        if len(chosen) < number // group and left[layer] > 1:
            left[layer] -= 1
            chosen.append((layer, k))
    return {
        layer: sorted(k * group + i for at, k in chosen if at == layer for i in range(group))
        for layer in sorted({at for at, _ in chosen})
    }


def rebuilt(config: DecoderConfig, params: nn.Params) -> Decoder:
    """The decoder of a config with these parameters."""
    graphdef, _ = nn.split(nnx.eval_shape(lambda: Decoder(config, rngs=nnx.Rngs(0))))
    return nn.merge(graphdef, params)


def _check_layers(config: DecoderConfig, heads: Mapping[int, Sized]) -> None:
    for layer in heads:
        if layer not in range(config.num_layers):
            raise ValueError(f"heads: wanted layers from 0 to {config.num_layers - 1}, got {layer}")
        if len(heads[layer]) and config.mixers[layer] not in PRUNABLE:
            raise ValueError(
                f"heads: layer {layer} is {config.mixers[layer]!r}; only the heads of these "
                f"mixers can go: {', '.join(PRUNABLE)}"
            )


def _check_heads(layer: int, number: int, heads: Collection[int]) -> None:
    for head in heads:
        if head not in range(number):
            raise ValueError(
                f"heads: wanted heads from 0 to {number - 1} of layer {layer}, got {head}"
            )


def _kept(layer: int, N: int, K: int, gone: Collection[int]) -> tuple[list[int], list[int]]:
    """The query heads that stay, and the key/value heads."""
    _check_heads(layer, N, gone)
    G = N // K
    groups = [[head for head in range(k * G, (k + 1) * G) if head not in gone] for k in range(K)]
    keys = [k for k, group in enumerate(groups) if group]
    if not keys:
        raise ValueError(f"heads: wanted one of layer {layer} to stay, got all of its {N}")
    if len({len(groups[k]) for k in keys}) > 1:
        raise ValueError(
            f"heads: layer {layer} has {K} key/value heads for {G} queries each: wanted all of a "
            f"group to go, or equally many of each, got {sorted(gone)}"
        )
    return [head for k in keys for head in groups[k]], keys


def _cut(mixer: nn.Params, queries: list[int], keys: list[int], head_dim: int) -> nn.Params:
    """The parameters of a mixer with these heads."""

    def keep(x: jax.Array, heads: list[int], axis: int) -> jax.Array:
        x = jnp.moveaxis(x, axis, 0)
        x = x.reshape(-1, head_dim, *x.shape[1:])[jnp.asarray(heads)]
        return jnp.moveaxis(x.reshape(-1, *x.shape[2:]), 0, axis)

    cut = dict(mixer)
    for name, heads in (("query", queries), ("key", keys), ("value", keys)):
        if name in mixer:
            cut[name] = jax.tree.map(lambda x, heads=heads: keep(x, heads, -1), mixer[name])
    cut["out"] = mixer["out"] | {"kernel": keep(mixer["out"]["kernel"], queries, 0)}
    return cut
