"""Judges `configs/projections.py`: perplexity and cache of shared projections."""

import math
from collections.abc import Sequence

from experiments.studies.study import Findings, Line
from qkv_jax import viz
from qkv_jax.viz import Panel

SEPARATE, KV, QK, ALL = "Q, K, V", "K = V", "Q = K", "Q = K = V"
FEW = 0.05  # of perplexity


def judge(lines: Sequence[Line]) -> Findings:
    """Whether K = V costs at most 5 % of perplexity, and Q = K more than K = V."""
    named = {line.name: line for line in lines}
    reference = named[SEPARATE]

    def cost(line: Line) -> list[float]:
        """The relative rise of perplexity, seed by seed: each pair saw the same batches."""
        pairs = zip(line.results, reference.results, strict=True)
        return [math.expm1(a.scores["loss"] - b.scores["loss"]) for a, b in pairs]

    def mean(values: Sequence[float]) -> float:
        return sum(values) / len(values)

    costs = {name: cost(line) for name, line in named.items()}
    saved = {
        name: 1 - line.results[0].state_size / reference.results[0].state_size
        for name, line in named.items()
    }
    told = {
        name: f"{mean(costs[name]):+.1%} ({min(costs[name]):+.1%} to {max(costs[name]):+.1%})"
        for name in named
    }
    points = {
        name: [(100 * (1 - saved[name]), 100 * mean(values), 50 * (max(values) - min(values)))]
        for name, values in costs.items()
    }
    published = {KV: [(50, 3.1)], SEPARATE: [(100, 0)]}
    return Findings(
        parts={
            "the price of K = V": mean(costs[KV]) <= FEW,
            "the higher price of Q = K": mean(costs[QK]) > mean(costs[KV]),
        },
        ours="; ".join(
            f"{name}: {mean(costs[name]):+.1%} perplexity, {saved[name]:.0%} of the cache saved"
            for name in named
            if name != SEPARATE
        ),
        found=(
            f"Perplexity of K = V {told[KV]}, of Q = K {told[QK]}, of Q = K = V {told[ALL]} "
            "against separate projections (mean and range over seeds)."
        ),
        figures={
            "cost": viz.lines_figure(
                [
                    Panel("ours", points, "cache, % of that of Q, K, V"),
                    Panel("paper, 300 M parameters", published, "cache, % of that of Q, K, V"),
                ],
                y_label="perplexity, % above Q, K, V",
                title="What sharing projections costs and saves",
            )
        },
        captions={
            "cost": "Claimed: K = V halves the cache for a few per cent of perplexity. Each point "
            "is the mean over seeds, with their range."
        },
    )
