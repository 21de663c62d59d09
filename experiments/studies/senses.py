"""Judges `configs/senses.py`: what vectors of ambiguous words tell, and answers found in a text."""

import dataclasses
import math
from collections.abc import Sequence

import numpy as np

from experiments import setup
from experiments.studies.study import Findings, Line, Run, by_kind
from experiments.tasks.senses import Told
from qkv_jax import nn, viz
from qkv_jax.data.grammar import CAT, IDS, LATIN, SENSES, WATASHI
from qkv_jax.models import attention_maps
from qkv_jax.viz import Panel

EXACT = 0.95  # share of answers that counts as finding them
HALF = 0.5  # of answers, that no other model finds
TOLD = 0.8  # accuracy that counts as telling senses apart
CHANCE = float(np.mean([1 / len(senses) for senses in SENSES.values()]))
UNTOLD = CHANCE + 0.15  # below, nothing counts as told: the rarer sense may be missed throughout
APART = 0.05  # cosine, by which senses differ at least
READ = {  # sentence -> (its words, who looks, at what)
    "cat": (CAT, "cat", ("sat", "mat", "the")),
    "watashi": (WATASHI, "私", ("学校", "行く")),
}
# Peters et al. 2018, table 5: F1 of the nearest mean vector, by layer; the most frequent sense.
PUBLISHED, PUBLISHED_FLOOR = {1: 0.674, 2: 0.690}, 0.659


@dataclasses.dataclass(frozen=True)
class Look:
    """What a trained run makes of words.

    Args:
      told: by its vectors of ambiguous words.
      maps: attention weights [L, N, T, T] for the sentences of `READ`; none where there is none.
    """

    told: Told
    maps: dict[str, np.ndarray]


def judge(lines: Sequence[Line]) -> Findings:
    """Whether senses are told after mixing, within reach, and answers by attention alone."""
    kinds = by_kind(lines, ": ")
    looks = {
        name: [look_at(result.run) for result in line.results]
        for name, line in kinds["words"].items()
    }
    depth = {name: _mean(of, "accuracy") for name, of in looks.items()}
    distance = {name: _by_distance(of) for name, of in looks.items()}
    reached = {
        name: _by_reach(distance[name], reach(line)) for name, line in kinds["words"].items()
    }
    within, between = (_mean(looks["attention"], name) for name in ("within", "between"))
    exact = {name: line.mean("exact_match") for name, line in kinds["answers"].items()}
    others = max(value for name, value in exact.items() if name != "attention")
    near, far = zip(*reached.values(), strict=True)
    parts = {
        "nothing told by an embedding": max(of[0] for of in depth.values()) <= UNTOLD,
        "all told within reach": np.nanmin(near) >= TOLD,
        "nothing told beyond": np.nanmax(far) <= UNTOLD,
        "senses apart after attention": within[-1] - between[-1] >= APART,
        "answers by attention alone": exact["attention"] >= EXACT and others < HALF,
    }
    found = (
        f"The nearest mean is the right sense's (chance: {CHANCE:.2f}) before and after each "
        "block / within reach / beyond: "
        + "; ".join(
            f"{name} {', '.join(f'{x:.2f}' for x in of)} / {reached[name][0]:.2f} / "
            f"{reached[name][1]:.2f}".replace("nan", "-")
            for name, of in depth.items()
        )
        + f". Attention's cosine within a sense is {within[-1]:.2f}, between senses "
        f"{between[-1]:.2f} after the last block, {within[0]:.2f} and {between[0]:.2f} before the "
        f"first. Exact answers: attention {exact['attention']:.1%}, the best other {others:.1%}."
    )
    return Findings(
        parts=parts,
        ours="right sense before / after all blocks: "
        + ", ".join(f"{name} {of[0]:.2f} / {of[-1]:.2f}" for name, of in depth.items())
        + "; exact answers: "
        + ", ".join(f"{name} {value:.2f}" for name, value in exact.items()),
        found=found,
        figures={
            "similarity": _similarity(looks), "told": _told(depth, distance), **_maps(looks),
        },
        captions=_captions(looks),
        notes=[_by_word(looks["attention"]), *_weights(looks["attention"][0])],
    )  # fmt: skip


def look_at(run: Run) -> Look:
    """What the trained model of a run makes of words."""
    trained = setup.load_run(run.directory.path)
    told = trained.task.told(trained.graphdef, trained.params)
    encoder = trained.task.stack(nn.merge(trained.graphdef, trained.params))
    maps = {}
    if run.config.model.mixer == "attention":
        for name, (words, *_) in READ.items():
            tokens = np.array([[IDS[word] for word in words]], np.int32)
            maps[name] = np.asarray(attention_maps(encoder, tokens)[:, 0])
    return Look(told, maps)


def reach(line: Line) -> float:
    """How far the last block's vector of a word looks, in words to either side."""
    model = line.results[0].run.config.model
    if model.mixer == "attention":
        return math.inf
    return model.num_layers * (model.conv_width - 1) // 2


def _mean(looks: Sequence[Look], what: str) -> np.ndarray:
    """The mean over seeds and words of a field of `Told`, by depth."""
    return np.mean([list(getattr(look.told, what).values()) for look in looks], axis=(0, 1))


def _by_distance(looks: Sequence[Look]) -> dict[int, float]:
    """The mean accuracy over seeds after the last block."""
    distances = looks[0].told.by_distance
    return {d: float(np.mean([look.told.by_distance[d][-1] for look in looks])) for d in distances}


def _by_reach(accuracies: dict[int, float], farthest: float) -> tuple[float, float]:
    """The mean up to a distance, and beyond; nan where there is none."""
    near = [accuracy for distance, accuracy in accuracies.items() if distance <= farthest]
    far = [accuracy for distance, accuracy in accuracies.items() if distance > farthest]
    return tuple(float(np.mean(of)) if of else math.nan for of in (near, far))


def _similarity(looks: dict[str, Sequence[Look]]):
    panels = []
    for name, of in looks.items():
        curves = {
            "two of one sense": _mean(of, "within"),
            "two of two senses": _mean(of, "between"),
        }
        points = {label: list(enumerate(map(float, curve))) for label, curve in curves.items()}
        panels.append(Panel(name, points, "blocks before it"))
    return viz.lines_figure(
        panels, y_label="cosine of two vectors", title="The same word in two sentences"
    )


def _told(depth: dict[str, np.ndarray], distance: dict[str, dict[int, float]]):
    chance = {"chance": CHANCE}
    panels = [
        Panel(
            "ours, by depth",
            {name: list(enumerate(map(float, of))) for name, of in depth.items()},
            "blocks before it", chance,
        ),
        Panel(
            "ours, after the last block",
            {name: list(of.items()) for name, of in distance.items()},
            "words to what decides", chance,
        ),
        Panel(
            "Peters et al. 2018 (F1)",
            {
                "paper: biLM": list(PUBLISHED.items()),
                "paper: most frequent sense": [(layer, PUBLISHED_FLOOR) for layer in PUBLISHED],
            },
            "layer",
        ),
    ]  # fmt: skip
    return viz.lines_figure(
        panels, y_label="right sense nearest", y_limits=(-0.03, 1.05),
        title="Which sense does the vector tell?",
    )  # fmt: skip


def _maps(looks: dict[str, Sequence[Look]]):
    """The maps of the first seed, all layers in one grid."""
    figures = {}
    for name, maps in looks["attention"][0].maps.items():
        words = [LATIN.get(word, word) for word in READ[name][0]]
        layers, heads = maps.shape[:2]
        figures[name] = viz.heads_figure(
            maps.reshape(layers * heads, *maps.shape[2:]), words, num_columns=heads,
            title="What each word attends to",
            names=[f"layer {i + 1}, head {j}" for i in range(layers) for j in range(heads)],
        )  # fmt: skip
    return figures


def _captions(looks: dict[str, Sequence[Look]]) -> dict[str, str]:
    captions = {
        "similarity": "Claimed: one line before the first block, two after attention. The mean "
        "cosine of two occurrences of an ambiguous word, by depth.",
        "told": "Claimed: chance before the first block; afterwards all senses for attention, and "
        "for a convolution those whose deciding word is within its reach. On the right what the "
        "paper found, F1 on running text by layer of its model.",
    }
    for name, maps in looks["attention"][0].maps.items():
        words, who, _ = READ[name]
        captions[name] = (
            f"Claimed: words look at those that they depend on. {' '.join(words)}: a row of the "
            f"grid is a layer of {maps.shape[1]} heads, a row of a map a word, its columns what "
            f"the word looks at; the numbers for {who} stand below."
        )
    return captions


def _by_word(looks: Sequence[Look]) -> str:
    told = [look.told for look in looks]
    found = [
        f"{word} {np.mean([of.within[word][-1] for of in told]):.2f} / "
        f"{np.mean([of.between[word][-1] for of in told]):.2f}"
        for word in SENSES
    ]
    return (
        "Attention's cosine within a sense / between senses after the last block, by word: "
        + ", ".join(found)
        + "."
    )


def _weights(look: Look) -> list[str]:
    """What the words of `READ` attend to, in numbers."""
    notes = []
    for name, (words, who, others) in READ.items():
        row = look.maps[name][:, :, words.index(who)]  # [L, N, T]
        found = []
        for other in others:
            to = row[..., [word == other for word in words]].sum(-1)  # [L, N]
            found.append(f"{other} " + " / ".join(f"{of.mean():.2f} ({of.max():.2f})" for of in to))
        notes.append(
            f"In {' '.join(words)}, {who} gives these weights, by layer, the mean over heads and "
            f"in brackets the largest (even weights are {1 / len(words):.2f} a word): "
            f"{', '.join(found)}."
        )
    return notes
