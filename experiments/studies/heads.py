"""Judges `configs/heads.py`: loss by number of heads, width of a head and depth."""

import math
import re
from collections.abc import Sequence

import numpy as np

from experiments.studies.head_roles import ROLES, head_roles
from experiments.studies.study import Findings, Line
from qkv_jax import viz
from qkv_jax.viz import Panel

# Vaswani et al. 2017, table 3: perplexity on newstest2013.
PUBLISHED_HEADS = {1: 5.29, 4: 5.00, 8: 4.92, 16: 4.91, 32: 5.01}
PUBLISHED_DIMS = {16: 5.16, 32: 5.01, 64: 4.92}


def judge(lines: Sequence[Line]) -> Findings:
    """Whether loss is U-shaped in the number of heads, and falls with d_k and depth."""
    rows = _rows(lines)
    roles = head_roles(rows[-1][max(rows[-1])].results[0].run)  # of the deepest
    heads, dims, depth = ({x: line.mean("loss") for x, line in row.items()} for row in rows)
    best = min(heads, key=heads.get)
    inside = min(heads) < best < max(heads)
    wider = dims[min(dims)] - dims[max(dims)]
    deeper = depth[min(depth)] - depth[max(depth)]
    noise = sum(line.spread("loss") for line in lines) / len(lines)
    return Findings(
        parts={
            "a valley in the number of heads": inside,
            "the gain of a wider d_k": wider > 0,
            "the gain of depth": deeper > 0,
        },
        ours="nats per character: "
        + "; ".join(
            f"{what} {' / '.join(map(str, losses))}: "
            + " / ".join(f"{loss:.3f}" for loss in losses.values())
            for what, losses in (("heads", heads), ("d_k", dims), ("layers", depth))
        ),
        found=(
            f"{best} heads are best: one head costs {heads[min(heads)] - heads[best]:+.3f} nats, "
            f"{max(heads)} cost {heads[max(heads)] - heads[best]:+.3f}. d_k from {min(dims)} to "
            f"{max(dims)} gains {wider:.3f}, {max(depth)} layers instead of {min(depth)} gain "
            f"{deeper:.3f}. Half of the range over seeds is {noise:.3f} on average."
        ),
        figures={"ours": _ours(rows), "published": _published(), "roles": _drawn(roles)},
        captions={
            "ours": "Claimed: a valley in the number of heads, a fall with d_k and with depth. "
            "Bars are the range over seeds.",
            "published": "The paper's perplexities, as their logarithm, in nats per token.",
            "roles": "What each head of the deepest model looks at, a row a layer (L), a column a "
            "head: at one distance, at delimiters, at what followed the same characters before. 0 "
            "is a head that looks everywhere alike, 1 one that looks nowhere else.",
        },
        notes=[_told(roles)],
    )


def _told(roles: dict[str, np.ndarray]) -> str:
    """How many heads look most at what, and where the clearest of each is."""
    shares = np.stack([roles[role] for role in ROLES])  # [roles, L, N]
    most = shares.argmax(0)
    parts = []
    for i, role in enumerate(ROLES):
        layer, head = np.unravel_index(shares[i].argmax(), shares[i].shape)
        parts.append(
            f"{(most == i).sum()} {role} (the clearest in layer {layer + 1}, head {head}, "
            f"{shares[i].max():.2f})"
        )
    return (
        f"Of {most.size} heads of the deepest model, by what they look at most: {', '.join(parts)}."
        " A model of characters has no words, so structure stands for syntax, and what followed "
        "the same characters for meaning."
    )


def _drawn(roles: dict[str, np.ndarray]):
    layers = [f"L{i}" for i in range(1, len(roles[ROLES[0]]) + 1)]
    return viz.matrices_figure(
        {role: roles[role] for role in ROLES}, layers, title="What heads look at", width=8.0
    )


def _rows(lines: Sequence[Line]) -> tuple[dict[int, Line], ...]:
    """The runs by number of heads, by d_k, and by depth; the shared run is in each."""
    heads, dims, depth = {}, {}, {}
    for line in lines:
        number = int(re.search(r"\d+", line.name)[0])
        if "heads" in line.name:
            heads[number] = line
        else:
            (dims if line.name.startswith("d_k") else depth)[number] = line
    base = lines[0].results[0].run.config.model
    shared = [line for line in lines if line.fields == {"model.num_heads": _shared_heads(lines)}]
    for line in shared:
        model = line.results[0].run.config.model
        dims[model.width // model.num_heads] = line
        depth[base.num_layers] = line
    return tuple(dict(sorted(row.items())) for row in (heads, dims, depth))


def _shared_heads(lines: Sequence[Line]) -> int:
    """The number of heads of the runs that vary something else."""
    other = next(line for line in lines if "heads" not in line.name)
    return other.results[0].run.config.model.num_heads


def _ours(rows: tuple[dict[int, Line], ...]):
    titles = ("heads, width fixed", "d_k, heads fixed", "layers")
    return viz.lines_figure(
        [
            Panel(
                title,
                {"ours": [(x, l.mean("loss"), l.spread("loss")) for x, l in row.items()]},
                title.partition(",")[0],
            )
            for title, row in zip(titles, rows, strict=True)
        ],
        y_label="nats per character", log_x=True, title="Heads, their width, and depth",
    )  # fmt: skip


def _published():
    return viz.lines_figure(
        [
            Panel(title, {"paper": [(x, math.log(ppl)) for x, ppl in row.items()]}, label)
            for title, label, row in (
                ("heads, width fixed", "heads", PUBLISHED_HEADS),
                ("d_k, heads fixed", "d_k", PUBLISHED_DIMS),
            )
        ],
        y_label="nats per token", log_x=True, title="Vaswani et al. 2017, table 3",
    )  # fmt: skip
