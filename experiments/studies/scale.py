"""Judges `configs/scale.py`: logits, softmax, gradient and loss by d_k, with and without scale."""

import functools
import math
from collections.abc import Sequence

import jax
import jax.numpy as jnp

from experiments.studies.study import Findings, Line, by_kind
from qkv_jax import ops, viz
from qkv_jax.ops.scores import Bias
from qkv_jax.viz import Panel

DIMS = (1, 8, 64, 512, 4096)
KEYS, WIDTH = 256, 64  # of the attention that is looked at: T = S, and h
SCALES = {"scaled": lambda dim: dim**-0.5, "unscaled": lambda dim: 1.0}
CLOSE = 0.25  # of the variance that the argument predicts
TINY = 0.1  # of the scaled softmax's gradient
X_LABEL = "d_k"


def judge(lines: Sequence[Line]) -> Findings:
    """Whether variance, saturation, gradient and loss are as claimed."""
    found = {
        name: {dim: at_initialisation(dim, scale(dim)) for dim in DIMS}
        for name, scale in SCALES.items()
    }
    losses = {
        kind: {line.fields["model.head_dim"]: line for line in named.values()}
        for kind, named in by_kind(lines).items()
    }
    cost = {
        dim: line.mean("loss") - losses["scaled"][dim].mean("loss")
        for dim, line in losses["unscaled"].items()
    }
    noise = max(line.spread("loss") for line in lines)
    near, far, widest, shown = min(cost), max(cost), max(DIMS), DIMS[1:]
    wide = {name: by_dim[widest] for name, by_dim in found.items()}
    gradient = wide["unscaled"]["gradient"] / wide["scaled"]["gradient"]
    parts = {
        "the variance": all(map(_is_predicted, found.items())),
        "the softmax": wide["unscaled"]["largest"] > wide["scaled"]["largest"],
        "the gradient": gradient <= TINY,
        "the loss": cost[far] > max(noise, cost[near]),
    }
    told = (
        f"At d_k = {widest:,} unscaled logits have variance {wide['unscaled']['variance']:,.0f}, "
        f"the largest of {KEYS} weights is {wide['unscaled']['largest']:.2f} "
        f"({wide['scaled']['largest']:.2f} with scale), and the gradient that reaches a typical "
        f"query's logits {gradient:.0e} of that with scale. Leaving the scale out costs "
        + ", ".join(f"{nats:+.3f} (d_k = {dim})" for dim, nats in cost.items())
        + f" nats per character; the largest half of a range over seeds is {noise:.3f}."
    )
    return Findings(
        parts=parts,
        ours=f"at d_k = {' / '.join(f'{dim:,}' for dim in shown)}, unscaled: "
        + "; ".join(
            f"{label} " + " / ".join(_short(found["unscaled"][dim][what]) for dim in shown)
            for what, label in LABELS.items()
        )
        + f"; scaled, at {widest:,}: "
        + ", ".join(f"{label} {_short(wide['scaled'][what])}" for what, label in LABELS.items()),
        found=told,
        figures=_figures(found, losses),
        captions=CAPTIONS,
        tables={
            "initialisation": [
                {"scale": name, "d_k": dim} | values
                for name, by_dim in found.items()
                for dim, values in by_dim.items()
            ]
        },
    )


LABELS = {
    "variance": "variance", "largest": "largest weight", "gradient": "gradient at the logits",
}  # fmt: skip
CAPTIONS = {
    "sizes": "Claimed: unscaled, the variance of logits is d_k (as Vaswani et al. derive) and the "
    "gradient that reaches them becomes extremely small; scaled, both stay. Queries and keys "
    f"are standard normal, {KEYS} of each; the gradient is the norm over a query's logits, of the "
    "median query.",
    "saturation": "Claimed: unscaled, the softmax becomes one key alone as d_k grows. Means over "
    "queries.",
    "loss": "Claimed: for small d_k the scale matters little, for large d_k much. Bars are the "
    "range over seeds.",
}


def at_initialisation(head_dim: int, scale: float) -> dict[str, float]:
    """What attention does to standard normal queries and keys, before anything is learned.

    Args:
      head_dim: d_k; values are `WIDTH` wide whatever it is.
      scale: of the logits.

    Returns:
      `variance` of the logits; `entropy` of the weights, as a share of a uniform row's; `largest`
      weight; and `gradient`, the norm of d loss / d logits of a query, where d loss / d output is
      standard normal: of the median query, the others are means.
    """
    return {name: float(x) for name, x in _at_initialisation(head_dim, scale).items()}


@functools.partial(jax.jit, static_argnums=0)
def _at_initialisation(head_dim: int, scale: jax.Array) -> dict[str, jax.Array]:
    rngs = jax.random.split(jax.random.key(0), 4)
    q, k = (jax.random.normal(rng, (1, KEYS, 1, head_dim)) for rng in rngs[:2])
    v, g = (jax.random.normal(rng, (1, KEYS, 1, WIDTH)) for rng in rngs[2:])
    _, stats = ops.attention_with_stats(q, k, v, scale=scale)

    def loss(bias: jax.Array) -> jax.Array:
        return (ops.attention(q, k, v, scale=scale, score=Bias(bias)) * g).sum()

    gradient = jax.grad(loss)(jnp.zeros((KEYS, KEYS)))
    return {
        "variance": (scale * jnp.einsum("btnh,bsnh->bnts", q, k)).var(),
        "entropy": stats.entropy.mean() / math.log(KEYS),
        "largest": ops.attention_weights(q, k, scale=scale).max(-1).mean(),
        "gradient": jnp.median(jnp.linalg.norm(gradient, axis=-1)),
    }


def _short(value: float) -> str:
    return f"{value:,.0f}" if value >= 10 else f"{value:.2g}"


def _is_predicted(item: tuple[str, dict[int, dict[str, float]]]) -> bool:
    name, by_dim = item
    return all(
        abs(values["variance"] / (dim * SCALES[name](dim) ** 2) - 1) <= CLOSE
        for dim, values in by_dim.items()
    )


def _figures(found: dict[str, dict[int, dict[str, float]]], losses: dict[str, dict[int, Line]]):
    def panel(title: str, what: str, show=lambda value: value) -> Panel:
        lines = {
            name: [(dim, show(values[what])) for dim, values in by_dim.items()]
            for name, by_dim in found.items()
        }
        return Panel(title, lines, X_LABEL)

    variance = panel("variance of logits", "variance", math.log10)
    predicted = {"d_k (Vaswani et al.)": [(dim, math.log10(dim)) for dim in DIMS]}
    return {
        "sizes": viz.lines_figure(
            [
                Panel(variance.title, variance.lines | predicted, X_LABEL),
                panel("gradient at the logits", "gradient", math.log10),
            ],
            y_label="log10", log_x=True, title="Logits and gradients before training",
        ),
        "saturation": viz.lines_figure(
            [
                panel("largest weight", "largest"),
                panel("entropy, of a uniform row's", "entropy"),
            ],
            y_label="share", log_x=True, y_limits=(-0.03, 1.05),
            title="The softmax before training",
        ),
        "loss": viz.lines_figure(
            [
                Panel(
                    "after training",
                    {
                        name: [
                            (dim, line.mean("loss"), line.spread("loss"))
                            for dim, line in by_dim.items()
                        ]
                        for name, by_dim in losses.items()
                    },
                    X_LABEL,
                )
            ],
            y_label="nats per character", log_x=True, title="Loss",
        ),
    }  # fmt: skip
