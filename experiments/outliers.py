"""Outliers among the activations of runs, and what 8 bits cost each: a report in Markdown."""

import dataclasses
from collections.abc import Sequence

import jax
import jax.numpy as jnp
import numpy as np

from experiments.setup import TrainedRun
from qkv_jax import nn
from qkv_jax.inference import quantize
from qkv_jax.models import Decoder
from qkv_jax.models.outliers import activations, kurtosis, largest

# Bondarenko et al. 2023, table 2: perplexity, max infinity norm, average kurtosis, W8A8 perplexity.
PUBLISHED = {
    "BERT-base, softmax": (4.49, 735, 3076, 1294),
    "BERT-base, clipped softmax": (4.39, 21.5, 80, 4.52),
    "BERT-base, gated": (4.45, 39.2, 201, 4.65),
    "OPT-125m, softmax": (15.84, 340, 1778, 21.18),
    "OPT-125m, clipped softmax": (16.29, 63.2, 19728, 37.20),
    "OPT-125m, gated": (15.55, 8.7, 18.9, 16.02),
}
ABOUT = """\
*Largest*: the infinity norm of a window's activations, mean over windows, of the outputs of
attention, feed-forward network and block the largest of any layer. *Kurtosis*: of the attention's
outputs, mean over layers and windows; 3 is a normal distribution's. W8A8: all linear layers in
int8, activations with a scale for each token, or with one for a batch, which its largest number
sets. Published: perplexities of pieces of words, from Bondarenko et al. 2023, table 2,
arxiv.org/abs/2306.12929, whose scales are static; clipping did not help their OPT."""


@dataclasses.dataclass(frozen=True)
class Outliers:
    """What was found in the activations of a model.

    Args:
      largest: by "attention", "feed_forward" and "residual", of each layer, the mean over windows.
      kurtosis: the same.
    """

    largest: dict[str, np.ndarray]
    kurtosis: dict[str, np.ndarray]

    @property
    def inf_norm(self) -> float:
        """The paper's "max inf norm"."""
        return max(float(x.max()) for x in self.largest.values())

    @property
    def tails(self) -> float:
        """The paper's "average kurtosis", of what attention adds."""
        return float(self.kurtosis["attention"].mean())


def outliers(trained: TrainedRun, model: Decoder) -> Outliers:
    """Statistics of a model's activations over the full validation text of a run."""
    graphdef, params = nn.split(model)

    @jax.jit
    def sums(params: nn.Params, tokens: jax.Array) -> dict[str, dict[str, jax.Array]]:
        found = activations(nn.merge(graphdef, params), tokens)
        return {
            name: {kind: of(x).sum(1) for kind, x in found.items()}
            for name, of in (("largest", largest), ("kurtosis", kurtosis))
        }

    found, windows = None, 0
    for batch in trained.task.all_batches():
        new = sums(params, batch["inputs"])
        windows += len(batch["inputs"])
        found = new if found is None else jax.tree.map(jnp.add, found, new)
    return Outliers(**jax.tree.map(lambda x: np.asarray(x) / windows, found))


def report(runs: Sequence[TrainedRun]) -> str:
    """Tables of the runs, side by side, and of the first one's layers before and after W8A8.

    Args:
      runs: of one text.

    Raises:
      ValueError: they are of different texts.
    """
    first, *others = runs
    for other in others:
        if other.task.text.corpus.sha256 != first.task.text.corpus.sha256:
            raise ValueError(f"beside: wanted runs of one text, got another's: {other.run.path}")
    head = (
        "| run | mixer | largest | kurtosis | nats per token | W8A8, a scale for each token "
        "| W8A8, one for a batch | largest, W8A8 | kurtosis, W8A8 |"
    )
    lines, layers = [head, "|---|---|" + "---:|" * 7], []
    for run in runs:
        whole = nn.merge(run.graphdef, run.params)
        small = quantize(whole, activations="int8")
        coarse = quantize(whole, activations="int8_tensor")
        before, after = outliers(run, whole), outliers(run, small)
        losses = [run.task.measure(*nn.split(model))["loss"] for model in (whole, small, coarse)]
        cells = [
            run.run.path.name, f"`{run.settings.model['mixer']}`", f"{before.inf_norm:.1f}",
            f"{before.tails:.2f}", f"{losses[0]:.4f}",
            *(f"{loss:.4f} ({loss - losses[0]:+.4f})" for loss in losses[1:]),
            f"{after.inf_norm:.1f}", f"{after.tails:.2f}",
        ]  # fmt: skip
        lines.append(f"| {' | '.join(cells)} |")
        layers = layers or layer_table(before, after)
    published = [
        f"| {name} | {norm:g} | {tails:g} | {ppl:g} | {quantized:g} |"
        for name, (ppl, norm, tails, quantized) in PUBLISHED.items()
    ]
    return "\n".join([
        *lines, "",
        "| published | largest | kurtosis | perplexity | W8A8 |", "|---|" + "---:|" * 4,
        *published, "", ABOUT, "",
        f"Layers of {first.run.path.name}, in float32 and, in brackets, in W8A8:", "", *layers,
    ])  # fmt: skip


def layer_table(before: Outliers, after: Outliers) -> list[str]:
    """Every layer's statistics, as Markdown."""
    names = list(before.largest)
    columns = [f"{name}, {kind}" for name in names for kind in ("largest", "kurtosis")]
    lines = [f"| layer | {' | '.join(columns)} |", "|---|" + "---:|" * len(columns)]
    for layer in range(len(before.largest[names[0]])):
        cells = [
            f"{getattr(before, kind)[name][layer]:.2f} ({getattr(after, kind)[name][layer]:.2f})"
            for name in names
            for kind in ("largest", "kurtosis")
        ]
        lines.append(f"| {layer} | {' | '.join(cells)} |")
    return lines
