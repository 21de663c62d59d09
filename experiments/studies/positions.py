"""Judges `configs/positions.py`: loss by kind of positions, at one to eight times the length."""

import itertools
import math
from collections.abc import Sequence

from experiments.studies.study import Findings, Line, by_kind
from qkv_jax import viz
from qkv_jax.viz import Panel

LITTLE = 0.05  # of perplexity, that a causal model may lose without positions
COLLAPSE = 1.5  # times the perplexity, that a bidirectional one loses at least

# Press et al. 2022, tables 2 and 3: perplexity of models trained on 512 tokens.
PUBLISHED = {
    "sinusoidal": {1: 20.05, 1012 / 512: 43.54, 2512 / 512: 132.4, 15512 / 512: 406},
    "rotary": {1: 20.07, 1012 / 512: 21.37, 2512 / 512: 31.58, 15512 / 512: 79.3},
    "T5": {1: 19.65, 1012 / 512: 18.79, 2512 / 512: 20.41},
    "ALiBi": {1: 19.73, 1012 / 512: 18.73, 2512 / 512: 18.41, 15512 / 512: 18.31},
}


def judge(lines: Sequence[Line]) -> Findings:
    """Whether extrapolation is ordered as claimed, and positions matter where claimed."""
    kinds = by_kind(lines)
    causal = {name: _by_length(line) for name, line in kinds["causal"].items()}
    masked = {name: line.mean("loss") for name, line in kinds["masked"].items()}
    far = max(causal["ALiBi"])
    ratio = {
        name: math.exp(losses[far] - losses[1]) for name, losses in causal.items() if far in losses
    }
    order = [ratio[name] for name in ("sinusoidal", "rotary", "T5", "ALiBi")]
    ordered = all(worse > better for worse, better in itertools.pairwise(order))
    told = min(losses[1] for name, losses in causal.items() if name != "none")
    cost = math.expm1(causal["none"][1] - told)
    collapse = math.exp(masked["none"] - min(masked.values()))
    parts = {
        "the order": ordered,
        "ALiBi's steadiness": ratio["ALiBi"] <= 1,
        "causal models' indifference": cost <= LITTLE,
        "bidirectional models' collapse": collapse >= COLLAPSE,
    }
    found = (
        f"Perplexity at {far} times the length, in that at the training's: "
        + ", ".join(f"{name} {value:.2f}" for name, value in ratio.items())
        + f". Without positions a causal model's is {cost:+.1%} above the best, a bidirectional "
        f"one's {collapse:.2f} times the best."
    )
    ours = "perplexity at " + " / ".join(f"{length}x" for length in causal["ALiBi"]) + ": "
    ours += ", ".join(
        f"{name} " + " / ".join(f"{math.exp(loss):.2f}" for loss in losses.values())
        for name, losses in causal.items()
    )
    ours += "; masked: " + ", ".join(f"{name} {math.exp(x):.2f}" for name, x in masked.items())
    return Findings(
        parts=parts,
        ours=ours,
        found=found,
        figures={"length": _figure(kinds["causal"])},
        captions={
            "length": "Claimed: sinusoidal positions fail on longer texts, ALiBi does not notice. "
            "Perplexity in that at the training's length, on a logarithmic axis; ours on the left, "
            "the paper's on the right."
        },
        notes=[
            "Likely reasons where it differs: a causal model without positions must count by its "
            "layers, and here it has few of them and few steps (the published one has 1.3 billion "
            "parameters); and a masked model finds no use for addresses, learned or sinusoidal, "
            "until it has trained for longer, where ALiBi tells it at once what is near."
        ],
    )


def _by_length(line: Line, prefix: str = "loss_") -> dict[int, float]:
    """The mean loss by how many times longer the windows were."""
    losses = {1: line.mean("loss")}
    for name in line.results[0].scores:
        if name.startswith(prefix):
            losses[int(name.removeprefix(prefix).removesuffix("x"))] = line.mean(name)
    return losses


def _figure(named: dict[str, Line]):
    ours = {}
    for name, line in named.items():
        curves = {name: _by_length(line)}
        if name == "rotary":
            curves["rotary, interpolated"] = _by_length(line, "interpolated_")
        for label, losses in curves.items():
            if len(losses) > 1:
                ours[label] = [(x, (y - losses[1]) / math.log(2)) for x, y in losses.items()]
    published = {
        name: [(x, math.log2(ppl / curve[1])) for x, ppl in curve.items()]
        for name, curve in PUBLISHED.items()
    }
    label = "length / the training's"
    return viz.lines_figure(
        [Panel("ours", ours, label), Panel("Press et al. 2022", published, label)],
        y_label="log2 of perplexity, relative", log_x=True,
        title="Perplexity on longer texts",
    )  # fmt: skip
