"""What is measured while training, and the studies that read it: scale, induction, grokking."""

import json

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from experiments import setup
from experiments.studies import STUDIES, by_run, grokking, induction, report, scale
from experiments.tasks.addition import power_spectrum
from qkv_jax import data, nn
from qkv_jax.models import attention_maps, measures
from qkv_jax.training.writers import read_metrics
from tests.experiments.runs import assert_one_sentence
from tests.experiments.studies import result_of, study_of
from tests.tolerances import assert_close

SMALL = {
    "base.model.width": 16, "base.model.num_heads": 2, "base.train.batch_size": 3,
    "base.train.eval_batches": 2,
}  # fmt: skip


def run_of(name, folder, number=0, **fields):
    """A study's run, its task, its model and its initial parameters."""
    run = study_of(name, folder, **(SMALL | fields)).runs[number]
    settings = setup.resolve(run.config)
    task = settings.task(settings)
    return run, task, *setup.make_model(settings, task.vocab_size)


def test_the_probe_of_repeats_splits_the_loss_and_scores_each_head(tmp_path):
    _, task, graphdef, params = run_of("induction", tmp_path, **{"base.data.context": 12})
    found = task.make_probe(graphdef)(params)
    heads = {f"{layer}.{head}" for layer in (1, 2) for head in (1, 2)}
    assert set(found) == {"loss_new", "loss_repeated"} | {
        f"{what}_{head}" for what in ("prefix_matching", "previous_token") for head in heads
    }
    batches = list(task.eval_batches())
    logits = np.concatenate([nn.merge(graphdef, params)(batch["inputs"]) for batch in batches])
    targets, distances = (
        np.concatenate([batch[name] for batch in batches]) for name in ("targets", "distances")
    )
    log_probabilities = np.asarray(jax.nn.log_softmax(logits))
    losses = -np.take_along_axis(log_probabilities, targets[..., None], -1)[..., 0]
    assert_close(found["loss_new"], losses[distances == 0].mean())
    assert_close(found["loss_repeated"], losses[distances > 0].mean())
    maps = attention_maps(nn.merge(graphdef, params), batches[0]["inputs"])
    scores = measures.prefix_matching(maps, batches[0]["inputs"])
    assert_close(found["prefix_matching_2.1"], scores[1, 0])


def test_the_probe_of_sums_looks_at_what_was_shown(tmp_path):
    fields = {"base.data.vocab_size": 8, "base.train.batch_size": 20}
    _, task, graphdef, params = run_of("grokking", tmp_path, **fields)
    found = task.make_probe(graphdef)(params)
    batch = data.modular_addition(
        seed=0, step=0, batch_size=20, context=3, vocab_size=8, validation_fraction=0.6
    )
    answers = nn.merge(graphdef, params)(batch["inputs"])[:, -1].argmax(-1)
    assert_close(found["train_accuracy"], (answers == batch["targets"][:, -1]).mean())
    scores = task.measure(graphdef, params)
    assert scores["train_loss"] == found["train_loss"] != scores["loss"]
    assert "29 sums that were held out" in task.validation  # 49 - 20


def test_circles_have_few_frequencies_and_a_table_has_all():
    angles = 2 * np.pi * np.arange(11)[:, None] * np.array([2, 5]) / 11
    circles = np.concatenate([np.cos(angles), np.sin(angles), np.ones((11, 1))], axis=-1)
    power = power_spectrum(jnp.asarray(circles))
    np.testing.assert_allclose(power / power.sum(), [0, 0.5, 0, 0, 0.5], atol=1e-6)
    table = power_spectrum(jnp.eye(11))
    np.testing.assert_allclose(table / table.sum(), np.full(5, 0.2), atol=1e-6)


def test_what_a_probe_finds_stands_in_the_metrics_of_a_run(scripts, tmp_path):
    fields = {"base.train.num_steps": 4, "base.train.eval_every": 2, "base.data.context": 8,
              "base.train.steps_per_dispatch": 2}  # fmt: skip
    run = study_of("induction", tmp_path, **(SMALL | fields)).runs[1]
    done = scripts.run("train", f"--workdir={run.workdir}", *run.flags)
    assert done.returncode == 0, done.stderr
    rows = read_metrics(run.directory.metrics)
    assert run.result().evaluations() == [row for row in rows if "loss_repeated" in row]
    assert [row["step"] for row in run.result().evaluations()] == [2, 4]
    assert {"prefix_matching_1.1", "previous_token_1.2"} <= run.result().scores.keys()
    assert "over 6 random windows" in run.directory.report.read_text()


def test_more_rows_than_are_shown_end_in_one_sentence(scripts, tmp_path):
    flags = study_of("grokking", tmp_path).runs[0].flags
    done = scripts.run(
        "train", f"--workdir={tmp_path / 'run'}", *flags, "--config.train.batch_size=1393"
    )
    assert_one_sentence(done, "batch_size is 1393", "1392")


# The judges, on curves that are made up


def with_curve(run, scores, rows):
    """A result whose run has these evaluations."""
    run.workdir.mkdir(parents=True)
    lines = ({"step": step, "validation_loss": 1.0} | row for step, row in rows)
    run.directory.metrics.write_text("".join(json.dumps(line) + "\n" for line in lines))
    result = result_of(run)
    result.scores.update(scores)
    return result


def judged(name, folder, of_run):
    study = study_of(name, folder)
    lines = by_run(of_run(run) for run in study.runs)
    return study, lines, STUDIES[name](lines)


def repeating(deep=0.1, shallow=3.0, loss_turns=200, head_turns=250, deep_head=0.9, other_head=0.1):
    def of_run(run):
        is_deep = run.name == induction.DEEP
        loss, head = (deep, deep_head) if is_deep else (shallow, other_head)
        layers = (1, 2) if is_deep else (1,)

        def row(step):
            values = {
                "loss_new": 4.0,
                "loss_repeated": loss if step >= loss_turns else 4.0,
            }
            for layer in layers:
                final = head if layer == layers[-1] else 0.05
                values[f"prefix_matching_{layer}.1"] = final if step >= head_turns else 0.05
                values[f"previous_token_{layer}.1"] = 0.5
            return values

        steps = range(50, 1050, 50)
        return with_curve(run, row(1000), [(step, row(step)) for step in steps])

    return of_run


@pytest.mark.parametrize(
    "of_run, failed",
    [
        (repeating(), ""),
        (repeating(deep=1.5), "two layers' loss"),
        (repeating(deep_head=0.3), "two layers' heads"),
        (repeating(head_turns=400), "at the same time"),
        (repeating(shallow=1.0), "one layer's loss"),
        (repeating(other_head=0.7), "one layer's heads"),
    ],
)
def test_induction_is_judged_by_loss_heads_and_when_they_turn(tmp_path, of_run, failed):
    _, _, findings = judged("induction", tmp_path, of_run)
    assert findings.holds == (not failed), findings.margin
    assert not failed or f"Not as claimed: {failed}." in findings.margin
    assert "two layers 4.00 / " in findings.ours


def test_half_way_is_where_a_curve_first_passes_the_middle_of_its_ends():
    assert induction.halfway([(1, 4.0), (2, 2.1), (3, 1.9), (4, 2.2), (5, 0.0)]) == 3
    assert induction.halfway([(1, 0.0), (2, 0.4), (3, 1.0)]) == 3


def added(shown=100, held_out=2000, without=None, by_heart=100):
    def of_run(run):
        decays = run.name == grokking.DECAY
        first, then = (shown, held_out) if decays else (by_heart, without)

        def row(step):
            return {
                "train_accuracy": 1.0 if step >= first else 0.3,
                "validation_accuracy": 1.0 if then is not None and step >= then else 0.4,
                "frequencies": 0.9 if decays else 0.3,
            }

        rows = [(step, row(step)) for step in range(100, 4100, 100)]
        return with_curve(run, {"frequencies": row(4000)["frequencies"]}, rows)

    return of_run


@pytest.mark.parametrize(
    "of_run, failed",
    [
        (added(), ""),
        (added(held_out=None), "understanding"),
        (added(held_out=400), "the delay"),
        (added(without=3000), "the need of weight decay"),
        (added(by_heart=5000), "learning by heart"),
    ],
)
def test_grokking_is_judged_by_the_delay_and_by_what_decay_does(tmp_path, of_run, failed):
    _, _, findings = judged("grokking", tmp_path, of_run)
    assert findings.holds == (not failed), findings.margin
    assert not failed or f"Not as claimed: {failed}." in findings.margin


def trained(cost=lambda dim: dim / 1e3):
    def of_run(run):
        worse = cost(run.fields["model.head_dim"]) if run.name.startswith("unscaled") else 0
        return result_of(run, loss=1.5 + worse + 0.001 * run.seed)

    return of_run


@pytest.mark.parametrize(
    "of_run, failed",
    [
        (trained(), ""),
        (trained(lambda dim: 0.1), "the loss"),
        (trained(lambda dim: dim / 1e6), "the loss"),
    ],
)
def test_the_scale_is_judged_by_what_it_costs_wide_heads(tmp_path, of_run, failed):
    _, _, findings = judged("scale", tmp_path, of_run)
    assert findings.holds == (not failed), findings.margin
    assert not failed or f"Not as claimed: {failed}." in findings.margin


def test_what_the_scale_does_at_first_is_what_the_formulas_say():
    dim = 8
    found = scale.at_initialisation(dim, 0.5)
    rngs = jax.random.split(jax.random.key(0), 4)
    q, k = (jax.random.normal(rng, (scale.KEYS, dim)) for rng in rngs[:2])
    v, g = (jax.random.normal(rng, (scale.KEYS, scale.WIDTH)) for rng in rngs[2:])
    logits = np.asarray(q @ k.T, np.float64) / 2
    weights = np.exp(logits) / np.exp(logits).sum(-1, keepdims=True)
    pull = np.asarray(g @ v.T, np.float64)  # d loss / d weights
    gradient = weights * (pull - (weights * pull).sum(-1, keepdims=True))
    for name, wanted in {
        "variance": logits.var(),
        "entropy": -(weights * np.log(weights)).sum(-1).mean() / np.log(scale.KEYS),
        "largest": weights.max(-1).mean(),
        "gradient": np.median(np.linalg.norm(gradient, axis=-1)),
    }.items():
        assert found[name] == pytest.approx(wanted, rel=1e-4), name


@pytest.mark.parametrize(
    "name, of_run", [("induction", repeating()), ("grokking", added()), ("scale", trained())]
)
def test_a_report_has_the_curves_as_a_table(tmp_path, name, of_run):
    study, lines, findings = judged(name, tmp_path, of_run)
    report.write(tmp_path / "out", study, lines, findings, "python -m experiments.compare --x")
    text = (tmp_path / "out/report.md").read_text()
    ((table, rows),) = findings.tables.items()
    header, names, *written = (tmp_path / f"out/{table}.csv").read_text().splitlines()
    assert f"[{table}.csv]({table}.csv)" in text and header.endswith("--x")
    assert len(written) == len(rows) and set(names.split(",")) == set().union(*rows)
    for picture in findings.figures:
        assert f"]({picture}.png)" in text and (tmp_path / f"out/{picture}.png").stat().st_size
