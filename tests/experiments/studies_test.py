"""Studies: every config is one, its runs train, what they find is judged and reported as said."""

import dataclasses
import json
import shutil

import numpy as np
import pytest

from configs import char_lm
from configs import study as base
from experiments.studies import (
    STUDIES,
    Study,
    approximation,
    by_run,
    config_of,
    distance,
    estimates,
    heads,
    listing,
    lm,
    report,
)
from experiments.studies import training as study_training
from experiments.studies.lm import floors
from experiments.tasks import TASKS
from qkv_jax.training.run_directory import read_config
from tests.experiments.runs import ROOT, assert_one_sentence
from tests.experiments.studies import judged, result_of, study_of

NAMES = list(STUDIES)


@pytest.fixture(autouse=True)
def measured(monkeypatch):
    """What judges measure beside the results: of trained models, which no test here has."""
    counted = {"uniform": 4.5, "unigram": 3.3, "bigram": 2.6}
    monkeypatch.setattr(lm, "floors", lambda run: counted)
    shares = {"positional": 0.9, "structural": 0.1, "content": 0.2}
    found = {role: np.full((2, 3), share) for role, share in shares.items()}
    monkeypatch.setattr(heads, "head_roles", lambda run: found)


@pytest.mark.parametrize("size", base.SIZES)
@pytest.mark.parametrize("name", NAMES)
def test_every_run_of_every_study_is_checked_and_differs_from_the_others(name, size, tmp_path):
    study = study_of(name, tmp_path, size)
    assert study.name == name and study.size == size and study.minutes > 0
    assert all((study.claim, study.published, study.source))
    assert len({run.workdir for run in study.runs}) == len(study.runs)
    assert len({str(run.config) for run in study.runs}) == len(study.runs)
    if size == "small":
        assert study.minutes <= 25


@pytest.mark.parametrize("name", NAMES)
def test_a_run_of_every_study_trains_and_leaves_its_result(scripts, name, tmp_path):
    few = {
        "base.train.num_steps": 2, "base.train.eval_every": 2, "base.train.eval_batches": 1,
        "base.train.steps_per_dispatch": 1, "base.train.log_every": 1,
        "base.train.batch_size": 2, "base.train.sample_tokens": 3,
    }  # fmt: skip
    reads = TASKS[study_of(name, tmp_path).runs[0].config.task].reads
    if "corpus" in reads:  # a shorter text
        few |= {"base.data.corpus": "text_file", "base.data.path": str(scripts.corpus)}
    if config_of(name).base.data.context > 256:
        few |= {"base.data.context": 64}
    if "num_examples" in reads:
        few |= {"base.data.num_examples": 40}
    run = study_of(name, tmp_path, **few).runs[0]
    said = []
    assert study_training.train([run], jobs=1, say=said.append) == {}
    result = run.result()
    assert read_config(run.directory, char_lm.get_config()) == run.config  # the flags made it
    assert result.steps == 2 and "loss" in result.scores and result.parameters > 0
    assert run.name in said[0] and "after 2 steps" in said[0]
    # Once finished, it is not trained again.
    shutil.rmtree(run.workdir / "checkpoints")
    assert study_training.train([run], jobs=1, say=said.append) == {}
    assert not (run.workdir / "checkpoints").exists() and "1 of 1" in said[-1]
    other = dataclasses.replace(run, config=run.config.copy_and_resolve_references())
    other.config.seed = 5
    with pytest.raises(ValueError, match=rf"{run.workdir} holds the run of another config"):
        other.result()


def test_a_run_that_fails_is_named_with_its_reason(tmp_path):
    study = study_of("projections", tmp_path, **{"base.data.corpus": "text_file"})
    failed = study_training.train(study.runs[:1], jobs=1, say=lambda _: None)
    ((name, reason),) = failed.items()
    assert name == "Q, K, V, seed 0"
    assert "corpus 'text_file'" in reason and reason.endswith(".log")


def recalled(attention, others):
    def of_run(run):
        wide, far = run.fields["model.width"] > 64, run.fields["data.context"] // 64
        accuracy = attention if run.name.startswith("attention") else others(wide, far)
        return result_of(run, accuracy, state_size=10 * run.fields["model.width"])

    return of_run


@pytest.mark.parametrize(
    "of_run, holds, words",
    [
        (recalled(0.995, lambda wide, far: (0.4 + 0.2 * wide) / far), True, ["0.995"]),
        (recalled(0.98, lambda wide, far: (0.4 + 0.2 * wide) / far), False, ["0.980"]),
        (recalled(1.0, lambda wide, far: 0.3), False, ["lose 0.00", "gain 0.00"]),
        (recalled(1.0, lambda wide, far: 0.3 * far), False, ["lose -0.90"]),
        (recalled(1.0, lambda wide, far: 1.0), False, ["recall all at N = 256 too"]),
    ],
)
def test_recall_is_judged_by_attention_and_by_how_the_others_fall(tmp_path, of_run, holds, words):
    _, _, findings = judged("recall", tmp_path, of_run)
    assert findings.holds == holds
    assert all(word in findings.margin for word in words), findings.margin
    assert findings.ours.startswith("N = 64 / 128 / 256 at width 64: attention ")


def losses(**by_name):
    def of_run(run):
        shared = run.fields.get("model.share_kv", False)
        loss = 1.5 + by_name.get(run.name, 0) + 0.001 * run.seed
        return result_of(run, loss=loss, state_size=50 if shared else 100)

    return of_run


@pytest.mark.parametrize(
    "of_run, holds",
    [
        (losses(**{"K = V": 0.03, "Q = K": 0.08}), True),
        (losses(**{"K = V": 0.06, "Q = K": 0.08}), False),  # exp(0.06) - 1 > 5 %
        (losses(**{"K = V": 0.03, "Q = K": 0.02}), False),
    ],
)
def test_projections_are_judged_by_perplexity(tmp_path, of_run, holds):
    _, _, findings = judged("projections", tmp_path, of_run)
    assert findings.holds == holds
    assert "K = V: +" in findings.ours and "50% of the cache saved" in findings.ours


def by_size(heads, dims, layers):
    def of_run(run):
        number = int("".join(c for c in run.name.split(" of ")[0] if c.isdigit()))
        kind = heads if "heads" in run.name else dims if "d_k" in run.name else layers
        return result_of(run, loss=kind(number) + 0.001 * run.seed)

    return of_run


def falling(number):
    return 1.6 - number / 1e3


def valley(number):
    return 1.5 + 0.1 * abs(number - 4) / 4


@pytest.mark.parametrize(
    "of_run, holds, words",
    [
        (by_size(valley, falling, falling), True, "4 heads are best"),
        (by_size(falling, falling, falling), False, "32 heads are best"),
        (by_size(valley, lambda d: 1.4 + d / 1e3, falling), False, "d_k from 4 to 64"),
    ],
)  # fmt: skip
def test_heads_are_judged_by_a_valley_and_two_falls(tmp_path, of_run, holds, words):
    _, _, findings = judged("heads", tmp_path, of_run)
    assert findings.holds == holds and words in findings.margin, findings.margin
    # The run that all three rows share is in each.
    assert "d_k 4 / 8 / 16 / 32 / 64: " in findings.ours
    assert "layers 1 / 2 / 4 / 8: " in findings.ours
    assert "Of 6 heads of the deepest model" in findings.notes[0]
    assert "6 positional (the clearest in layer 1, head 0, 0.90), 0 structural" in findings.notes[0]


def extrapolated(none=1.5, masked=3.0, alibi=1.45):
    far = {"sinusoidal": 3.0, "rotary": 2.0, "T5": 1.6, "ALiBi": alibi, "none": 4.0}

    def of_run(run):
        kind, _, name = run.name.partition(", ")
        if kind == "masked":
            return result_of(run, loss=masked if name == "none" else 1.4)
        result = result_of(run, loss=none if name == "none" else 1.5)
        if name in far:
            result.scores.update({f"loss_{n}x": 1.5 + (far[name] - 1.5) * n / 8 for n in (2, 4, 8)})
        if name == "rotary":
            result.scores.update({f"interpolated_{n}x": 1.6 for n in (2, 4, 8)})
        return result

    return of_run


@pytest.mark.parametrize(
    "of_run, failed",
    [
        (extrapolated(), ""),
        (extrapolated(alibi=1.7), "the order; ALiBi's steadiness"),
        (extrapolated(none=1.6), "causal models' indifference"),
        (extrapolated(masked=1.5), "bidirectional models' collapse"),
    ],
)
def test_positions_are_judged_part_by_part(tmp_path, of_run, failed):
    _, _, findings = judged("positions", tmp_path, of_run)
    assert findings.holds == (not failed)
    assert (f"Not as claimed: {failed}." if failed else "times the best.") in findings.margin


def modelled(lstm=1.6, hybrid=1.5, softcap=-0.01):
    def of_run(run):
        kind, _, name = run.name.partition(": ")
        if kind == "mixer":
            return result_of(
                run, loss={"LSTM": lstm, lm.HYBRID: hybrid, "attention": 1.5}.get(name, 1.7)
            )
        rung = [other.name for other in ladder].index(run.name)
        return result_of(run, loss=1.9 - 0.01 * rung - (softcap + 0.01) * (name == "+ softcap"))

    ladder = [run for run in study_of("lm", ROOT / "runs").runs if run.name.startswith("recipe")]
    return of_run


@pytest.mark.parametrize(
    "of_run, failed",
    [
        (modelled(), ""),
        (modelled(lstm=1.49), "LSTM"),
        (modelled(hybrid=1.52), lm.HYBRID),
        (modelled(softcap=-0.04), "+ softcap"),
    ],
)
def test_language_models_are_judged_by_mixer_and_by_rung(tmp_path, of_run, failed):
    _, _, findings = judged("lm", tmp_path, of_run)
    assert findings.holds == (not failed), findings.margin
    assert not failed or f"Not as claimed: {failed}." in findings.margin, findings.margin
    assert "Muon -0.010" in findings.margin
    assert "bigrams 2.600, attention 1.500" in findings.ours
    assert "3.300 (unigram)" in findings.notes[0]


def test_the_floors_are_those_of_the_runs_text(scripts, tmp_path):
    few = {"base.data.corpus": "text_file", "base.data.path": str(scripts.corpus)}
    found = floors(study_of("lm", tmp_path, **few).runs[0])
    assert found["uniform"] > found["unigram"] > found["bigram"] > 0


def answered(attention, others):
    def of_run(run):
        result = result_of(run)
        accuracy = (lambda far: attention) if "attention" in run.name else others
        result.scores.update({f"accuracy_{far}": accuracy(far) for far in (8, 16, 32)})
        return result

    return of_run


def translated(plain=lambda top: 1 - top / 50, luong=0.9, transformer=1.0, bleu=False):
    """Results of `configs/translate.py`: exact matches by the top of each group of lengths."""

    def of_run(run):
        name = run.name.partition(": ")[2]
        rest = {"Luong": luong, "Transformer": transformer}
        by_length = plain if name == "no attention" else lambda top: rest.get(name, 0.95)
        result, tops = result_of(run), (10, 20, 30, 40)
        for kind, factor in [("exact_match", 1)] + [("bleu", 100)] * bleu:
            found = {f"{kind}_{top}": factor * by_length(top) for top in tops}
            result.scores.update(found, **{kind: sum(found.values()) / 4})
        return result

    return of_run


@pytest.mark.parametrize(
    "of_run, failed",
    [
        (translated(), ""),
        (translated(transformer=0.945), ""),  # so little is a tie
        (translated(transformer=0.9), "the ladder's order"),
        (translated(luong=0.5), "attention's lead"),
        (translated(plain=lambda top: 0.5), "that it is the greater the longer the source"),
        (translated(bleu=True), ""),
    ],
)
def test_translations_are_judged_by_lead_length_and_ladder(tmp_path, of_run, failed):
    _, _, findings = judged("translate", tmp_path, of_run)
    assert findings.holds == (not failed), findings.margin
    assert ("Not as claimed" in findings.margin) == bool(failed)
    assert not failed or f"Not as claimed: {failed}." in findings.margin, findings.margin
    assert "no attention 0.500, Luong" in findings.ours
    assert set(findings.figures) == {"length", "ladder"} == set(findings.captions)


@pytest.mark.slow
def test_the_alignments_of_runs_that_are_there_are_drawn(scripts, tmp_path):
    few = {
        "base.data.num_examples": 40, "base.train.num_steps": 1, "base.train.eval_batches": 1,
        "base.train.steps_per_dispatch": 1, "base.train.batch_size": 2, "base.model.width": 8,
    }  # fmt: skip
    study = study_of("translate", tmp_path, **few)
    bahdanau = next(run for run in study.runs if run.name.endswith("Bahdanau"))
    assert study_training.train([bahdanau], jobs=1, say=lambda _: None) == {}
    findings = STUDIES["translate"](by_run(map(translated(), study.runs)))
    assert findings.figures["alignment"].axes[0].get_title() == "Bahdanau"


def untrained(run):
    """Gradients that fall, and speed that does not depend on the length but for an LSTM's."""
    slow = "LSTM" in run.name
    speed = {length: 32.0 / length if slow else 1.0 for length in distance.LENGTHS}
    return distance.Look(1 / np.arange(1.0, 17.0), speed)


@pytest.mark.parametrize(
    "of_run, holds, words",
    [
        (answered(1.0, lambda far: 8 / far), True, "GRU (copy) 0.75"),
        (answered(0.9, lambda far: 8 / far), False, "0.900"),
        (answered(1.0, lambda far: 1.0), False, "Not as claimed: the fall of LSTM (cue)"),
    ],
)
def test_distance_is_judged_by_near_and_far(monkeypatch, tmp_path, of_run, holds, words):
    monkeypatch.setattr(distance, "look_at", untrained)
    _, _, findings = judged("distance", tmp_path, of_run)
    assert "attention 1.0, LSTM 64.0, GRU 1.0" in findings.margin
    assert len(findings.tables["speed"]) == 4 * len(distance.LENGTHS)
    assert findings.holds == holds and words in findings.margin, findings.margin


def test_gradients_tell_what_the_answer_can_see(tmp_path):
    few = {"base.data.context": 16, "base.model.width": 8, "base.model.num_heads": 2}
    runs = {run.name: run for run in study_of("distance", tmp_path, **few).runs}
    norms = {name: distance.gradient_norms(runs[f"cue, {name}"]) for name in
             ("attention", "LSTM", "gated convolution")}  # fmt: skip
    assert all(values.shape == (16,) and values[0] > 0 for values in norms.values())
    assert (norms["attention"] > 0).all() and (norms["LSTM"] > 0).all()
    assert norms["LSTM"][15] / norms["LSTM"][1] < norms["attention"][15] / norms["attention"][1]
    # Two layers that see four tokens each see seven.
    assert (norms["gated convolution"][:7] > 0).all()
    assert (norms["gated convolution"][7:] == 0).all()


def test_any_length_can_be_timed(tmp_path, monkeypatch):
    monkeypatch.setattr(distance, "CALLS", 1)
    monkeypatch.setattr(distance, "TOKENS", 64)
    few = {"base.data.context": 16, "base.model.width": 8, "base.model.num_heads": 2}
    runs = {run.name: run for run in study_of("distance", tmp_path, **few).runs}
    assert 0 < distance.steps_per_second(runs["cue, attention"], 32) < 1e6
    assert runs["cue, attention"].config.data.context == 16  # the run's own is left alone


def arena(listops=0.3, text=0.6, milliseconds=5.0, bytes_=10**8):
    """What efficient attention reaches and takes; exact attention: 0.36, 0.6, 10 ms, 2e8."""

    def of_run(run):
        task, _, name = run.name.partition(", ")
        if name == "Transformer":
            found = result_of(run, {"ListOps": 0.36, "Text": 0.6}.get(task, 0.5))
            return dataclasses.replace(
                found, milliseconds_per_step=10.0, peak_memory_bytes=2 * 10**8
            )
        found = result_of(run, {"ListOps": listops, "Text": text}.get(task, 0.5))
        return dataclasses.replace(
            found, milliseconds_per_step=milliseconds, peak_memory_bytes=bytes_
        )

    return of_run


@pytest.mark.parametrize(
    "of_run, failed",
    [
        (arena(), ""),
        (arena(listops=0.39), "exact attention's lead on ListOps"),
        (arena(listops=0.36), "exact attention's lead on ListOps"),  # all alike: nobody leads
        (arena(text=0.5), "nearness on text"),
        (arena(milliseconds=11.0), "less time (Linformer, Performer, Linear, Local)"),
        (arena(bytes_=3 * 10**8), "less memory (Linformer, Performer, Linear, Local)"),
    ],
)
def test_the_arena_is_judged_by_accuracy_time_and_memory(tmp_path, of_run, failed):
    _, _, findings = judged("long_range", tmp_path, of_run)
    assert findings.holds == (not failed)
    assert not failed or f"Not as claimed: {failed}." in findings.margin, findings.margin
    assert "Retrieval, ours" in findings.notes[0] and "| Local |" in findings.notes[0]


def estimated(slope=-1.0, orthogonal=0.8, small=0.1, rank=0.5):
    counts = approximation.COUNTS
    errors = {m: m**slope for m in counts}
    return approximation.Measured(
        {
            name: {"independent": errors, "orthogonal": {m: orthogonal * errors[m] for m in errors}}
            for name in (approximation.GAUSSIAN, approximation.TRAINED)
        },
        {"positive": {20.0: 5.0, 160.0: small}, "trigonometric": {20.0: 0.1, 160.0: 7.0}},
        {"Nystrom": {2: 1.0, 8: rank}},
    )


def blocks(both=0.5):
    def of_run(run):
        reached = {"random": 0.4, "window": 0.45, "random + window": both}
        return result_of(run, reached.get(run.name.partition(", ")[2], 0.6))

    return of_run


@pytest.mark.parametrize(
    "measured, of_run, failed",
    [
        (estimated(), blocks(), ""),
        (estimated(slope=-0.5), blocks(), "1 / m"),
        (estimated(orthogonal=1.1), blocks(), "the gain of orthogonal features"),
        (estimated(small=8.0), blocks(), "positive features' small weights"),
        (estimated(rank=1.5), blocks(), "the fall with the rank of Nystrom"),
        (
            estimated(), blocks(both=0.44),
            "random + window together (digits); random + window together (text)",
        ),
    ],
)  # fmt: skip
def test_approximations_are_judged_part_by_part(tmp_path, measured, of_run, failed):
    study = study_of("approximation", tmp_path)
    findings = approximation.find(by_run(of_run(run) for run in study.runs), measured)
    assert findings.holds == (not failed)
    assert (f"Not as claimed: {failed}." if failed else "alone.") in findings.margin
    assert set(findings.figures) == set(findings.captions)
    rows = findings.tables["errors"]
    assert len(rows) == 4 * len(approximation.COUNTS) + 4 + 2
    assert rows[-1]["by"] == "Nystrom" and rows[-1]["at"] == 8


def test_estimates_err_less_with_features_and_rank_and_by_kind_with_the_kernel():
    q, k, v = qkv = estimates.gaussian(16, 4)
    assert q.shape == k.shape == v.shape == (1, 16, 1, 4)
    few, many = estimates.performer_errors(qkv, "orthogonal", (4, 256), redraws=8).values()
    assert many < few / 8
    errors = estimates.kernel_errors(num_features=8, radius=1.5, dim=4, redraws=200, angles=2)
    assert list(errors["positive"]) == [60.0, 120.0]
    assert errors["positive"][120.0] < errors["positive"][60.0]
    assert errors["trigonometric"][120.0] > 3 * errors["trigonometric"][60.0]
    for name, by_rank in estimates.rank_errors(qkv, (2, 16)).items():
        assert by_rank[16] < (1e-3 if "Gaussian" not in name else by_rank[2]), name


def test_what_is_approximated_is_what_a_trained_run_attends_to(scripts, tmp_path):
    few = {
        "base.data.corpus": "text_file", "base.data.path": str(scripts.corpus),
        "base.data.context": 12, "base.train.num_steps": 2, "base.train.batch_size": 2,
        "base.train.eval_batches": 1, "base.train.sample_tokens": 3,
    }  # fmt: skip
    config = config_of("approximation")
    config.runs = tuple(run for run in config.runs if run[0] == "text, full")  # it reads a text
    config.update_from_flattened_dict(few)
    run = Study.from_config(config, tmp_path).runs[0]
    assert study_training.train([run], jobs=1, say=lambda _: None) == {}
    q, k, v = approximation.trained_inputs(run)
    assert q.shape == k.shape == v.shape == (2 * approximation.ROWS, 12, 2, 32)


@pytest.mark.parametrize("name, of_run", [
    ("long_range", arena()),
    ("recall", recalled(1.0, lambda wide, far: 0.5 / far)),
    ("projections", losses(**{"K = V": 0.03, "Q = K": 0.08})),
    ("heads", by_size(valley, falling, falling)),
    ("positions", extrapolated()),
    ("lm", modelled()),
    ("translate", translated()),
])  # fmt: skip
def test_a_report_says_claim_verdict_figures_and_every_run(tmp_path, name, of_run):
    study, lines, findings = judged(name, tmp_path, of_run)
    report.write(tmp_path / "out", study, lines, findings, "python -m experiments.compare --x")
    text = (tmp_path / "out/report.md").read_text()
    for words in (study.claim, findings.margin, f"Verdict: {findings.verdict}.", study.published,
                  study.source, "python -m experiments.compare --x"):  # fmt: skip
        assert words in text
    assert all(f"| {line.name} |" in text for line in lines)
    for picture in findings.figures:
        assert f"]({picture}.png)" in text and (tmp_path / f"out/{picture}.png").stat().st_size
    record = json.loads((tmp_path / "out/study.json").read_text())
    assert (record["verdict"], record["ours"]) == (findings.verdict, findings.ours)
    assert record["failed"] == findings.failed
    assert len(record["runs"]) == len(lines)
    header, names, *rows = (tmp_path / "out/runs.csv").read_text().splitlines()
    assert header == "# python -m experiments.compare --x" and names.startswith("run,seed,loss")
    assert len(rows) == len(study.runs)


def test_equal_runs_with_different_seeds_are_one_line_with_mean_and_spread(tmp_path):
    runs = study_of("projections", tmp_path).runs[:3]
    (line,) = by_run(result_of(run, loss=loss) for run, loss in zip(runs, (1, 2, 6), strict=True))
    assert (line.mean("loss"), line.spread("loss")) == (3, 2.5)
    assert line.mean(lambda result: result.seconds) == 2


def test_the_list_names_every_study_with_its_time_and_claim():
    told = listing()
    for name in NAMES:
        config = config_of(name)
        assert name in told and f"{config.minutes:3} min" in told and config.claim in told


@pytest.mark.parametrize(
    "flags, words",
    [
        ([], ["config: wanted a study", "--list"]),
        (["--config=configs/char_lm.py"], ["config.size is missing", "experiments.train"]),
        (["--config=configs/recall.py:huge"], ["'small', 'full'", "'huge'"]),
        (
            ["--config=configs/recall.py", "--config.base.model.num_heads=0"],
            ["run 'attention, N = 64", "model.num_heads"],
        ),
        (["--config=configs/recall.py", "--config.name=other"], ["config.name", "'recall'"]),
    ],
)
def test_what_is_no_study_ends_in_one_sentence(scripts, flags, words):
    assert_one_sentence(scripts.run("compare", *flags), *words)


def test_a_wrong_field_names_the_run(tmp_path):
    config = config_of("projections")
    config.runs = (*config.runs, base.run("mistaken", {"model.window": 3}))
    with pytest.raises(ValueError, match=r"run 'mistaken': model\.window: 3 was set"):
        Study.from_config(config, tmp_path)
    config.runs = (base.run("mistaken", {"model.windw": 3}),)
    with pytest.raises(ValueError, match=r"run 'mistaken': .*windw"):
        Study.from_config(config, tmp_path)
