"""A plan reads no corpus and needs no device; and the configs that are made for many of them."""

import json

import jax
import numpy as np
import pytest

from configs import gpt2_124m_modern, lm_1b
from experiments import benchmark_steps, setup
from experiments.abstract_step import AbstractStep, vocab_size_of
from experiments.plan_tables import planned
from qkv_jax import data, nn, training
from tests.experiments.runs import ROOT, assert_one_sentence
from tests.experiments.setup_test import SMALL, make_config

FEW = {
    "model.num_layers": 2, "model.width": 32, "model.num_heads": 4, "model.head_dim": 8,
    "model.mlp_width": 48, "data.context": 16, "optimizer.accumulate": 2, "train.batch_size": 2,
    "train.num_steps": 4, "train.eval_every": 4, "train.eval_batches": 1, "train.save_every": 4,
    "train.sample_tokens": 3, "train.log_every": 1, "train.figures": False,
}  # fmt: skip


def resolved(get_config, **fields):
    config = get_config()
    config.update_from_flattened_dict(fields)
    return setup.resolve(config)


def cells(text):
    """The rows of a text's tables, by their first cell."""
    rows = [[c.strip() for c in line.strip("|").split("|")] for line in text.splitlines()
            if line.startswith("|")]  # fmt: skip
    return {row[0]: row[1:] for row in rows}


def parameters(get_config, vocab_size):
    settings = resolved(get_config)
    return nn.count(setup.abstract_state(settings, vocab_size)[1].params)


def test_the_configs_have_the_sizes_that_they_say():
    assert round(parameters(gpt2_124m_modern.get_config, 50_304) / 1e6) == 162
    assert round(parameters(lm_1b.get_config, 50_257) / 1e9, 1) == 1.2


def test_the_flops_of_the_published_shape_are_those_of_the_published_figure():
    """854.7 M a token: 6 (84.9 M + 38.6 M) + 12 L T D."""
    step = AbstractStep.of(
        resolved(gpt2_124m_modern.get_config, **{"train.batch_size": 1, "optimizer.accumulate": 1}),
        vocab_size=50_304,
    )
    flops = training.model_flops(step.loss, step.state.params, step.batch)
    assert flops / 1024 == pytest.approx(854.7e6, rel=1e-4)


def test_a_plan_for_devices_that_are_not_there():
    settings = resolved(
        lm_1b.get_config, **{"model.num_layers": 2, "mesh.tensor": 4, "optimizer.accumulate": 1}
    )
    text = planned(settings, 50_257, 256, ["h100", "v5e"])
    assert "data=1, fsdp=64, tensor=4, context=1, 256 devices" in text
    rows = cells(text)
    step = AbstractStep.of(settings, 50_257)
    assert float(rows["parameters"][0]) == pytest.approx(
        4 * nn.count(step.state.params) / 256 / 1e9, rel=0.15
    )
    total = sum(float(rows[name][0]) for name in (
        "parameters", "optimizer", "batch", "activations and gradients, at most"
    ))  # fmt: skip
    assert float(rows["all of these"][0]) == pytest.approx(total, abs=2e-3)
    assert "| fsdp | all-gather |" in text and "| tensor | all-gather |" in text
    # Between machines of eight, an H100 is as fast as its network.
    assert float(rows["h100"][2]) > float(rows["v5e"][2])


@pytest.mark.slow
def test_the_guide_shows_what_the_plan_prints():
    guide = (ROOT / "docs/scaling.md").read_text()
    printed = planned(resolved(lm_1b.get_config), 50_257, 8, ["h100"])
    assert printed.partition("\n\n")[2] in guide
    assert all(line.split(maxsplit=1)[1] in guide for line in printed.splitlines()[:3])


def test_a_plan_says_where_a_model_does_not_fit():
    settings = resolved(lm_1b.get_config, **{"model.num_layers": 1, "train.batch_size": 1024})
    rows = cells(planned(settings, 50_257, 1, ["v5e"]))
    assert "too much" in rows["v5e"][0]


def test_how_many_ids_there_are_is_known_or_asked_for(tmp_path):
    def ids(given=None, **fields):
        return vocab_size_of(resolved(lm_1b.get_config, **fields).data, given)

    assert ids(7) == 7
    text = {"data.corpus": "python_docs"}
    assert ids(**text | {"data.tokenizer": "byte"}) == 256
    assert ids(**text | {"data.tokenizer": "bpe", "data.vocab_size": 999}) == 999
    for fields in ({}, text | {"data.tokenizer": "char"}):
        with pytest.raises(ValueError, match="--vocab_size"):
            ids(**fields)
    (tmp_path / "a.txt").write_text("abcab")
    data.write_token_files(
        [tmp_path / "a.txt"], tmp_path / "t", lambda _: data.CharTokenizer("abc\n"), named="t"
    )
    assert ids(**{"data.path": str(tmp_path / "t")}) == 4


def test_what_cannot_be_planned_is_one_sentence(scripts):
    said = assert_one_sentence
    config = "--config=configs/lm_1b.py"
    said(scripts.run("plan", config), "vocab_size", "--vocab_size=50257")
    said(scripts.run("plan", config, "--vocab_size=9", "--devices=3"), "train.batch_size", "3")
    said(
        scripts.run("plan", "--config.task=digits", "--vocab_size=9"), "config.task", "causal_lm"
    )  # fmt: skip


@pytest.mark.slow
@pytest.mark.parametrize("name", ["gpt2_124m", "gpt2_124m_modern", "lm_1b"])
def test_a_cut_down_size_trains_on_token_files(name, scripts, tmp_path):
    (tmp_path / "a.txt").write_text("the cat sat on the mat, and looked at its own tail. " * 50)
    data.write_token_files(
        [tmp_path / "a.txt"], tmp_path / "t", lambda _: data.ByteTokenizer(), named="t"
    )
    flags = [f"--config.{field}={value}" for field, value in FEW.items()]
    done = scripts.run(
        "train", f"--config=configs/{name}.py", f"--config.data.path={tmp_path / 't'}", *flags,
        f"--workdir={tmp_path / 'run'}",
    )  # fmt: skip
    assert done.returncode == 0, done.stderr
    rows = [json.loads(line) for line in (tmp_path / "run/metrics.jsonl").read_text().splitlines()]
    assert [row["step"] for row in rows if "loss" in row] == [1, 2, 3, 4]


@pytest.mark.slow
@pytest.mark.parametrize("mesh", ["1,1,1", "2,2,2", "1,8,1"])
@pytest.mark.parametrize("name", ["char_lm", "gpt2_124m"])
def test_the_check_agrees_within_fifteen_percent(name, mesh, scripts):
    cut = {
        "model.num_layers": 4, "model.width": 256, "model.num_heads": 8, "data.context": 512,
        "optimizer.accumulate": 1,
    } if name == "gpt2_124m" else {}  # fmt: skip
    sizes = dict(zip(("data", "fsdp", "tensor"), mesh.split(","), strict=True))
    cut |= {f"mesh.{axis}": size for axis, size in sizes.items()}
    done = scripts.run(
        "plan", f"--config=configs/{name}.py", "--check",
        f"--vocab_size={96 if name == 'char_lm' else 8192}",
        f"--devices={np.prod([int(size) for size in sizes.values()])}",
        *(f"--config.{field}={value}" for field, value in cut.items()),
    )  # fmt: skip
    assert done.returncode == 0, done.stderr
    rows = cells(done.stdout)
    assert rows["parameters, optimizer, batch"][2] in ("+0.0%", "-0.0%")
    for row in ("activations and gradients, at most", "all of these"):
        assert abs(float(rows[row][2].rstrip("%"))) <= 15, done.stdout


# The benchmark of a config's steps


class Flag:
    def __init__(self, value):
        self.value = value


def test_steps_of_a_config_are_timed_with_and_without_a_mesh(tmp_path, monkeypatch, capsys):
    for name, value in (("STEPS", 2), ("VOCAB_SIZE", 31), ("WITHOUT_MESH", True)):
        monkeypatch.setattr(benchmark_steps, name, Flag(value))
    fields = SMALL | {"mesh.data": 1, "train.steps_per_dispatch": 2}
    benchmark_steps.benchmark_steps(make_config(tmp_path, fields), tmp_path / "made/steps")
    rows = cells(capsys.readouterr().out)
    for side in ("mesh", "no mesh"):
        step, tokens, mfu, memory = rows[side]
        assert float(tokens.replace(",", "")) == pytest.approx(
            16 * 13 / float(step.replace(",", "")) * 1e3, rel=0.1
        )
        assert mfu == "chip not known" and float(memory) > 0
    text = (tmp_path / "made/steps.md").read_text()
    assert "mesh / no mesh" in text and f"- jax: {jax.__version__}" in text
    record = json.loads((tmp_path / "made/steps.json").read_text())
    assert [len(side["seconds"]) for side in record["steps"]] == [2, 2]
    assert record["steps"][0]["peak_steps"] is None
