"""Judges `configs/translate.py`: exact matches or BLEU by model and by length of the source."""

import itertools
from collections.abc import Mapping, Sequence

import numpy as np

from experiments import setup
from experiments.studies.study import Findings, Line, by_kind
from qkv_jax import nn, viz
from qkv_jax.viz import Panel

PLAIN, ATTENTIVE = "no attention", ("Luong", "Bahdanau")
TIE = 0.01  # of 1: a rung that is so little below the one before counts as equal
# B. Trevett's notebooks: test BLEU on Multi30k, German to English; recurrent models of GRUs.
LADDER = {PLAIN: 20.61, "Bahdanau": 28.30, "convolution": 34.14, "Transformer": 36.52}
# Bahdanau et al. 2014, table 1, all sentences: BLEU by the longest sentence trained on.
BY_TRAINING = {PLAIN: {30: 13.93, 50: 17.82}, "Bahdanau": {30: 21.50, 50: 26.75}}


def judge(lines: Sequence[Line]) -> Findings:
    """Whether attention is ahead, most on long sources, and the ladder is in order."""
    corpora = by_kind(lines, ": ")
    rungs = list(dict.fromkeys(name for named in corpora.values() for name in named))
    score = {
        name: float(np.mean([_quality(named[name]) for named in corpora.values()]))
        for name in rungs
    }
    ahead = {name: score[name] - score[PLAIN] for name in ATTENTIVE}
    short, long = (_mean_gap(corpora, part) for part in (0, 1))
    below = [
        f"{name} is {score[before] - score[name]:.3f} below {before}"
        for before, name in itertools.pairwise(rungs)
        if score[name] < score[before] - TIE
    ]
    parts = {
        "attention's lead": min(ahead.values()) > TIE,
        "that it is the greater the longer the source": long > short,
        "the ladder's order": not below and score[rungs[-1]] > score[PLAIN],
    }
    found = (
        "Attention is ahead of none by "
        + " and ".join(f"{gap:.3f} ({name})" for name, gap in ahead.items())
        + f"; by {short:.3f} on the shorter half of the lengths, by {long:.3f} on the longer. "
        + (f"On the ladder, {', '.join(below)}." if below else "The ladder is in order.")
    )
    ours = "; ".join(
        f"{corpus}, {_unit(named)}: "
        + ", ".join(f"{name} {_quality(line):.3f}" for name, line in named.items())
        for corpus, named in corpora.items()
    )
    figures = {"length": _lengths(corpora), "ladder": _ladder(corpora, rungs)}
    figures |= _alignment(corpora)
    return Findings(
        parts=parts,
        ours=ours,
        found=found,
        figures=figures,
        captions={name: CAPTIONS[name] for name in figures},
        notes=[
            "A rung that is at most "
            f"{TIE} below the one before counts as equal: where all are right nearly always, "
            "their order says nothing."
        ],
    )


CAPTIONS = {
    "length": "Claimed: a fixed vector cannot hold a long sentence, attention does not care. "
    "What is right of the translations, by the tokens of the source; on the right what Bahdanau et "
    "al. found when training on sentences of up to 30 or 50 words.",
    "ladder": "Claimed: each model is better than the one before. Ours, and the BLEU of the "
    "notebooks on Multi30k (as a share of 100; no Luong there), of another task and scale.",
    "alignment": "Claimed: attention finds the words that a word comes from, though their order "
    "differs. A row is a token of the translation, darker where the model looks in the source as "
    "it is about to write it; the mean over layers and heads. As Bahdanau et al., figure 3.",
}


def _quality(line: Line, suffix: str = "") -> float:
    """BLEU as a share of 100 where it was measured, else exact matches."""
    if "bleu" in line.results[0].scores:
        return line.mean(f"bleu{suffix}") / 100
    return line.mean(f"exact_match{suffix}")


def _unit(named: Mapping[str, Line]) -> str:
    first = next(iter(named.values()))
    return "BLEU / 100" if "bleu" in first.results[0].scores else "exact matches"


def _tops(line: Line) -> list[int]:
    """The longest source of each group of lengths that every seed has."""
    return sorted(
        set.intersection(*(
            {int(name.removeprefix("exact_match_")) for name in result.scores
             if name.startswith("exact_match_")}
            for result in line.results
        ))
    )  # fmt: skip


def _mean_gap(corpora: Mapping[str, Mapping[str, Line]], part: int) -> float:
    """Attention's lead over none, on the shorter (0) or the longer (1) half of the lengths."""
    gaps = [
        _quality(named[name], f"_{top}") - _quality(named[PLAIN], f"_{top}")
        for named in corpora.values()
        for name in ATTENTIVE
        for top in np.array_split(_tops(named[PLAIN]), 2)[part]
    ]
    return float(np.mean(gaps))


def _lengths(corpora: Mapping[str, Mapping[str, Line]]):
    panels = [
        Panel(
            corpus,
            {
                name: [(top, _quality(line, f"_{top}")) for top in _tops(line)]
                for name, line in named.items()
            },
            "tokens of the source, at most",
        )
        for corpus, named in corpora.items()
    ]
    published = {
        name: [(length, bleu / 100) for length, bleu in by_length.items()]
        for name, by_length in BY_TRAINING.items()
    }
    panels.append(
        Panel("Bahdanau et al. 2014, BLEU / 100", published, "words of the longest trained on")
    )
    return viz.lines_figure(
        panels, y_label=_units(corpora), y_limits=(-0.03, 1.05),
        title="Translations by length",
    )  # fmt: skip


def _ladder(corpora: Mapping[str, Mapping[str, Line]], rungs: Sequence[str]):
    ticks = dict(enumerate(rungs))
    ours = {
        corpus: [(i, _quality(named[name])) for i, name in ticks.items()]
        for corpus, named in corpora.items()
    }
    published = [(i, LADDER[name] / 100) for i, name in ticks.items() if name in LADDER]
    return viz.lines_figure(
        [
            Panel("ours", ours, "", ticks=ticks),
            Panel("Multi30k notebooks, BLEU / 100", {"published": published}, "", ticks=ticks),
        ],
        y_label=_units(corpora), y_limits=(-0.03, 1.05), title="The ladder",
    )  # fmt: skip


def _units(corpora: Mapping[str, Mapping[str, Line]]) -> str:
    return " or ".join(dict.fromkeys(_unit(named) for named in corpora.values()))


def _alignment(corpora: Mapping[str, Mapping[str, Line]]) -> dict:
    """The alignments of one pair of the first corpus by all models whose checkpoints are there."""
    maps, names, labels = [], [], None
    for name, line in next(iter(corpora.values())).items():
        run = line.results[0].run
        if not run.directory.checkpoints.exists():
            continue  # only its results are here
        trained = setup.load_run(str(run.workdir))
        model = nn.merge(trained.graphdef, trained.params)
        try:
            weights, *labels = trained.task.alignment(model)
        except NotImplementedError:
            continue  # it does not attend
        maps.append(weights.mean((0, 1)))
        names.append(name)
    if not maps:
        return {}
    target, source = labels
    figure = viz.heads_figure(
        np.stack(maps), target, key_tokens=source, names=names, title="Alignments", num_columns=2
    )
    return {"alignment": figure}
