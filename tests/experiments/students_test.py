"""A run's model teaches smaller ones, which differ by it alone from those that learn alone."""

import jax
import numpy as np
import pytest

from experiments import compression, setup, students
from qkv_jax import nn
from qkv_jax.training import DistillationConfig
from tests.experiments.runs import saved_steps


@pytest.fixture(scope="module")
def run(finished):
    return setup.load_run(finished)


def params_of(model):
    return jax.tree.leaves(nn.split(model)[1])


def test_without_a_lesson_both_are_the_same_from_the_same_start_and_windows(run):
    student, config = "num_heads=1,head_dim=4", DistillationConfig(alpha=0.0)
    models = students.distilled(run, [student], 5, config).models
    assert list(models) == [
        f"{model}{bits}"
        for model in ("the teacher", f"{student}, alone", f"{student}, taught")
        for bits in ("", ", int8", ", int4")
    ]
    alone, taught = (models[f"{student}, {how}"] for how in ("alone", "taught"))
    assert (taught.config.num_heads, taught.config.head_dim) == (1, 4)
    jax.tree.map(np.testing.assert_array_equal, params_of(alone), params_of(taught))


def test_a_taught_student_is_a_run_with_the_loss_that_is_told(run, tmp_path, capsys):
    student, out = "mlp_width=24,width=8", tmp_path / "out"
    config = DistillationConfig(alpha=0.9, relation_weight=0.1, hidden_weight=0.1)
    before = [np.array(leaf) for leaf in jax.tree.leaves(run.params)]
    found = students.distilled(run, [student], 5, config, num_seeds=2)
    told = [line.rpartition(", seed ")[::2] for line in capsys.readouterr().out.splitlines()]
    assert [name for name, _ in told] == [f"{student}, alone", f"{student}, taught"] * 2
    losses = [rest.split(" ")[1] for _, rest in told]
    assert len(set(losses)) == 4  # a seed of its own, and a lesson that changes something
    assert "mean of seeds 0, 1" in found.about and found.about.count(f"| {student} |") == 1

    compression.save_run(out, run, found)
    kept = setup.load_run(out)
    assert saved_steps(out) == [5] and kept.settings.train.num_steps == 5
    assert (kept.settings.model["mlp_width"], kept.settings.model["width"]) == (24, 8)
    taught = found.models[f"{student}, taught"]
    jax.tree.map(np.testing.assert_array_equal, jax.tree.leaves(kept.params), params_of(taught))
    assert f"{kept.task.measure(kept.graphdef, kept.params)['loss']:.4f}" == losses[1]
    jax.tree.map(np.testing.assert_array_equal, jax.tree.leaves(run.params), before)


def test_a_student_is_told_by_fields_of_the_config(run):
    def model(student):
        return students.student_settings(run, student).model

    assert model("mixer=gated_delta,attention,num_layers=3")["mixer"] == "gated_delta,attention"
    assert model("num_kv_heads=1,qk_norm=False")["num_kv_heads"] == 1
    teacher = run.settings.model
    assert model("width=8") == {**teacher, "width": 8}


@pytest.mark.parametrize("student, words", [
    ("heads=2", "wanted fields of config.model and their values, .* got 'heads=2'"),
    ("num_heads", "wanted fields"),
    ("num_heads=many", "student: config.model.num_heads: "),
    ("num_heads=3", "model.head_dim: .*|model.num_heads: .*"),
    ("num_heads=0", "model.num_heads: wanted a positive integer, got 0"),
    ("num_heads=1,head_dim=6", "num_relations: wanted a divisor of 1 heads x 6, got 4"),
    ("mixer=lstm", "student: attention_inputs: layer 0, LSTM, has no queries and keys"),
    ("mixer=latent", "model: wanted one without the mixer 'latent'"),
])  # fmt: skip
def test_what_is_no_model_is_refused_before_anything_is_trained(run, student, words, capsys):
    config = DistillationConfig(relation_weight=1.0)
    with pytest.raises(ValueError, match=words):
        students.distilled(run, ["width=8", student], 5, config)
    assert not capsys.readouterr().out


def test_equal_students_are_refused(run):
    with pytest.raises(ValueError, match="student: wanted different ones"):
        students.distilled(run, ["width=8", "width=8"], 5, DistillationConfig())
