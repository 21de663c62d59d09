"""Judges `configs/long_documents.py`: loss by position in a long document."""

import itertools
from collections.abc import Sequence

import jax
import numpy as np
import optax

from experiments import setup
from experiments.studies.study import Findings, Line, Run
from qkv_jax import data, nn, viz
from qkv_jax.data.batches import Batch
from qkv_jax.viz import Panel

FIRST = 64  # tokens in the first of the groups of positions, which double from there
WINDOWS = 24  # long windows that are read
LOCAL = "window"  # the run that sees nothing else
NOTE = (
    "Likely reason where full attention is behind: too few steps. A window is told what is near; "
    "full attention must learn to leave out thousands of keys, and has not when training ends. "
    "Without norms of queries and keys, which bound its logits, it learns no faster."
)


def judge(lines: Sequence[Line]) -> Findings:
    """Whether full attention is ahead late in a document, and what the others recover of it."""
    curves = {
        line.name: np.mean([losses_by_position(result.run) for result in line.results], axis=0)
        for line in lines
    }
    late = {name: float(curve[len(curve) // 2 :].mean()) for name, curve in curves.items()}
    behind = {name: loss - late[LOCAL] for name, loss in late.items() if name != LOCAL}
    gap = -behind["full"]
    found = (
        f"In the second half of the windows the window alone costs {late[LOCAL]:.3f} nats per "
        "token; beside it: "
        + ", ".join(f"{name} {difference:+.3f}" for name, difference in behind.items())
        + "."
    )
    if gap > 0:
        shares = {name: -loss / gap for name, loss in behind.items() if name != "full"}
        found += " Of full attention's lead, " + ", ".join(
            f"{name} recovers {share:.0%}" for name, share in shares.items()
        )
        found += "."
    early = float((curves["full"] - curves[LOCAL])[:FIRST].mean())
    found += (
        f" On the first {FIRST} tokens, of which both see all, full attention is {early:+.3f} from "
        "the window: what it is behind there, it has learnt less."
    )
    parts = {
        "full attention's lead": gap > 0,
        **{f"the gain of {name}": loss < 0 for name, loss in behind.items() if name != "full"},
    }
    return Findings(
        parts=parts,
        ours="nats per token, first / second half of the windows: "
        + ", ".join(
            f"{name} {curve[: len(curve) // 2].mean():.3f} / {late[name]:.3f}"
            for name, curve in curves.items()
        ),
        found=found,
        figures={"position": _figure(curves)},
        notes=(NOTE,),
        captions={
            "position": "Claimed: with full attention the loss goes on falling, with a window "
            "alone it stops where the window is full, and the others lie between. Each point is "
            "the mean over the positions up to it from the one before."
        },
    )


def losses_by_position(run: Run) -> np.ndarray:
    """Nats per token by position, [T], the mean over long windows of the validation text."""
    trained = setup.load_run(run.directory.path)
    context = trained.settings.data.context

    @jax.jit
    def losses(params: nn.Params, batch: Batch) -> jax.Array:
        logits = nn.merge(trained.graphdef, params)(batch["inputs"])
        return optax.softmax_cross_entropy_with_integer_labels(logits, batch["targets"])

    windows = data.sequential_windows(trained.task.text.validation, batch_size=1, context=context)
    whole = [batch for batch in windows if batch["weights"].all()][:WINDOWS]
    if not whole:
        raise ValueError(
            f"data.context: wanted at most the validation text's length, got {context}"
        )
    return np.mean([np.asarray(losses(trained.params, batch))[0] for batch in whole], axis=0)


def _figure(curves: dict[str, np.ndarray]):
    points = {}
    for name, curve in curves.items():
        ends = [0, FIRST]
        while ends[-1] < len(curve):
            ends.append(min(2 * ends[-1], len(curve)))
        points[name] = [
            (end, float(curve[begin:end].mean())) for begin, end in itertools.pairwise(ends)
        ]
    return viz.lines_figure(
        [Panel("validation text", points, "position, tokens")],
        y_label="nats per token", log_x=True, title="Loss by position in a long window",
    )  # fmt: skip
