"""Grouped queries for a trained decoder: fewer key/value heads, each the mean of several."""

import dataclasses

import jax

from qkv_jax import nn
from qkv_jax.models.decoder import Decoder
from qkv_jax.models.mixers import MIXERS
from qkv_jax.models.pruning import PRUNABLE, rebuilt


def group_heads(model: Decoder, num_kv_heads: int) -> Decoder:
    """The decoder with fewer key/value heads, each the mean of those that it stands for.

    The columns of the projections to keys and values are averaged, group by group (Ainslie et al.
    2023, section 2.1, arxiv.org/abs/2305.13245). The model predicts worse until it is trained on.

    Args:
      model: the mixers of its layers are of `PRUNABLE` or have no key/value heads; its layers have
        equally many heads. It stays as it was.
      num_kv_heads: K of the result, which divides the model's.

    Raises:
      ValueError: the heads cannot be grouped so.
    """
    config, params = model.config, nn.split(model)[1]
    K, H = config.kv_heads, config.attention_dim
    if config.heads_per_layer is not None:
        raise ValueError(
            "model: wanted layers of equally many heads, got model.heads_per_layer = "
            f"{config.heads_per_layer}"
        )
    if num_kv_heads < 1 or K % num_kv_heads:
        raise ValueError(
            f"num_kv_heads: wanted a divisor of the model's {K} key/value heads, got {num_kv_heads}"
        )

    def pool(x: jax.Array) -> jax.Array:  # [..., K * H]
        x = x.reshape(*x.shape[:-1], num_kv_heads, K // num_kv_heads, H).mean(-2)
        return x.reshape(*x.shape[:-2], -1)

    blocks = dict(params["blocks"])
    for layer, name in enumerate(config.mixers):
        if "num_kv_heads" not in MIXERS[name].reads:
            continue
        if name not in PRUNABLE:
            raise ValueError(
                f"model: layer {layer} is {name!r}; only the heads of these mixers can be grouped: "
                f"{', '.join(PRUNABLE)}"
            )
        mixer = dict(blocks[layer]["mixer"])
        mixer |= {y: jax.tree.map(pool, mixer[y]) for y in ("key", "value") if y in mixer}
        blocks[layer] = blocks[layer] | {"mixer": mixer}
    config = dataclasses.replace(config, num_kv_heads=num_kv_heads)
    return rebuilt(config, params | {"blocks": blocks})
