"""Judges `configs/sinks.py`: a cache without the first tokens, with them, and with a sink."""

import dataclasses
import math
from collections.abc import Callable, Iterator, Sequence

import numpy as np
from flax import nnx

from experiments import setup
from experiments.studies.study import Findings, Line, Run
from qkv_jax import data, nn, training, viz
from qkv_jax.data.batches import Batch
from qkv_jax.models.maps import attention_maps
from qkv_jax.ops.sparse import Local
from qkv_jax.ops.streaming import Streaming
from qkv_jax.viz import Panel

KEPT = (0, 1, 2, 4)  # first tokens that a cache keeps
LONGER = 8  # times the training's length, that the texts are
HURTS = 1.05  # times the perplexity, that a cache without the first tokens has at least
RESTORED = 1.02  # times the perplexity at the training's length, that counts as the same
WINDOWS = 32  # long texts that are read
LATE = 16  # tokens after which a place no longer is one of the first


@dataclasses.dataclass(frozen=True)
class Stream:
    """What a trained model does with long texts.

    Args:
      kept: nats per token beyond the training's length, by how many first tokens the cache keeps.
      whole: the same with nothing evicted.
      first: the share of attention that the first token gets, by layer, at the training's length.
    """

    kept: dict[int, float]
    whole: float
    first: tuple[float, ...]


def judge(lines: Sequence[Line]) -> Findings:
    """Whether evicting the first tokens hurts, and whether keeping them or a sink helps."""
    streams = {line.name: [stream(result.run) for result in line.results] for line in lines}
    near = {line.name: line.mean("loss") for line in lines}
    kept = {
        name: {n: float(np.mean([stream.kept[n] for stream in of])) for n in of[0].kept}
        for name, of in streams.items()
    }
    whole = {name: float(np.mean([stream.whole for stream in of])) for name, of in streams.items()}
    most = max(KEPT)
    relative = {
        "without": math.exp(kept["softmax"][0] - near["softmax"]),
        "with": math.exp(kept["softmax"][most] - near["softmax"]),
        "sink": math.exp(kept["trained sink"][0] - near["trained sink"]),
    }
    shares = {
        name: np.mean([stream.first for stream in of], axis=0) for name, of in streams.items()
    }
    largest = max(shares["softmax"])
    return Findings(
        parts={
            "the harm without the first tokens": relative["without"] >= HURTS * relative["with"],
            "the repair by keeping them": relative["with"] <= RESTORED,
            "the trained sink": relative["sink"] <= RESTORED,
        },
        ours="perplexity per character: "
        + "; ".join(
            f"{name}: {math.exp(near[name]):.3f} at the training's length, then "
            + ", ".join(f"{math.exp(x):.3f} with {n} first tokens" for n, x in kept[name].items())
            + f", {math.exp(whole[name]):.3f} with all"
            for name in kept
        ),
        found=(
            f"Times the perplexity at the training's length: {relative['without']:.3f} without the "
            f"first tokens, {relative['with']:.3f} with {most} of them (wanted: at most {RESTORED} "
            f"and {HURTS} times less), {relative['sink']:.3f} with a trained sink and no first "
            f"token. The softmax gives the first token {largest:.1%} of its attention in the layer "
            "where it gives it most."
        ),
        figures={"cache": _cache(near, kept), "first": _first(shares)},
        captions={
            "cache": "Claimed: a cliff at 0 first tokens for the softmax, none for the trained "
            f"sink. Perplexity beyond the training's length, in texts {LONGER} times as long, with "
            "a cache of the training's length; the dashed line is the softmax's at that length.",
            "first": "Claimed: weight that has nowhere to go lies on the first token. Its mean "
            "share of the attention of all later places; what is left of a trained sink's weight "
            "lies on the sink.",
        },
        notes=[
            "A window of a running text begins anywhere, so nothing but its place makes the first "
            "token special. A small model whose queries find near characters in every layer has "
            "little weight left over; the published models have 100 to 10,000 times as many "
            "parameters."
        ],
    )


def stream(run: Run) -> Stream:
    """Reads long texts with the trained model of a run, cache by cache."""
    trained = setup.load_run(run.directory.path)
    context, model = trained.settings.data.context, trained.settings.model
    base = model["rotary_base"] if model["position"] == "rotary" else None
    sink = model["mixer"] == "sink"
    caches = {n: Streaming(context - n - 1, n, base) for n in KEPT if n} if not sink else {}
    losses = {n: _loss(trained, op) for n, op in ({0: Local(context - 1)} | caches).items()}
    return Stream(losses, _loss(trained, None), _first_share(trained))


def _loss(trained: setup.TrainedRun, op: Callable | None) -> float:
    """Nats per token beyond the training's length, with another op in every layer."""
    network = nn.merge(trained.graphdef, trained.params)
    for block in network.blocks if op is not None else ():
        block.mixer.op = op
    graphdef, params = nn.split(network)
    eval_step = training.make_eval_step(graphdef, trained.task.predict)
    return training.mean_metrics(eval_step, params, _late(trained))["loss"]


def _late(trained: setup.TrainedRun) -> Iterator[Batch]:
    """Long windows of the validation text, in which only late tokens count."""
    context = trained.settings.data.context
    windows = data.sequential_windows(
        trained.task.text.validation, batch_size=1, context=LONGER * context
    )
    for batch, _ in zip(windows, range(WINDOWS), strict=False):
        late = np.arange(LONGER * context) >= context
        yield batch | {"weights": batch["weights"] * late}


def _first_share(trained: setup.TrainedRun) -> tuple[float, ...]:
    """By layer: the mean weight on the first token, over heads and all but the first places."""
    batch = next(trained.task.eval_batches())
    network: nnx.Module = nn.merge(trained.graphdef, trained.params)
    maps = np.asarray(attention_maps(network, batch["inputs"]))  # [L, B, N, T, T]
    return tuple(float(weights[..., LATE:, 0].mean()) for weights in maps)


def _cache(near: dict[str, float], kept: dict[str, dict[int, float]]):
    lines = {name: [(n, math.exp(x)) for n, x in of.items()] for name, of in kept.items()}
    levels = {"at the training's length": math.exp(near["softmax"])}
    return viz.lines_figure(
        [Panel("a cache of the training's length", lines, "first tokens that it keeps", levels)],
        y_label="perplexity per character", title="Reading on, with a cache",
    )  # fmt: skip


def _first(shares: dict[str, np.ndarray]):
    lines = {
        name: [(layer, float(share)) for layer, share in enumerate(of, start=1)]
        for name, of in shares.items()
    }
    return viz.lines_figure(
        [Panel("the first token", lines, "layer")],
        y_label="share of attention", title="Where weight goes that is needed nowhere",
    )  # fmt: skip
