"""A run's model with fewer heads is a run, and the table says what it costs."""

import dataclasses
import math
import re

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from experiments import compression, head_gates, outliers, setup
from experiments.compression_table import (
    Row,
    cache_bytes,
    decoding_rates,
    loss_from_cache,
    megabytes,
    table,
)
from qkv_jax import nn
from qkv_jax.inference import quantize
from qkv_jax.models import closed_heads, scale_heads, settled_gates, silence_heads
from qkv_jax.models.outliers import activations
from qkv_jax.ops.cache import Cache, QuantizedCache
from tests.experiments.evaluate_test import table as evaluated
from tests.experiments.runs import assert_one_sentence, files_of, saved_steps


def rows_of(out):
    """{model: [MB, nats, perplexity, cache, tokens/s]} of what was written."""
    lines = re.findall(r"^\| (.*) \|$", (out / "compress.md").read_text(), re.M)
    cells = [[cell.strip() for cell in line.split("|")] for line in lines[1:]]
    return {
        name: [float(x.replace(",", "")) for x in (size, loss, *rest)]
        for name, size, loss, _, *rest in cells
    }


def assert_is_a_run(scripts, out, loss):
    """Other scripts read it, and find the loss that the table has."""
    done = scripts.run("evaluate", f"--workdir={out}")
    assert done.returncode == 0, done.stderr
    np.testing.assert_allclose(evaluated(done.stdout)["model"][0], loss, rtol=0, atol=2e-4)
    done = scripts.run("generate", f"--workdir={out}", "--prompt=the cat", "--num_tokens=3")
    assert done.returncode == 0 and done.stdout.startswith("the cat"), done.stderr


def test_a_pruned_model_is_a_smaller_run_with_the_loss_of_its_row(scripts, finished, tmp_path):
    before, out = files_of(finished), tmp_path / "out"
    done = scripts.run(
        "compress", f"--workdir={finished}", "--what=prune", "--heads=1", "--steps=0",
        f"--out={out}",
    )  # fmt: skip
    assert done.returncode == 0 and done.stderr == "", done.stderr
    assert (out / "compress.md").read_text() in done.stdout
    rows = rows_of(out)
    assert list(rows) == [
        "all 2 heads", "1 of 2 gone, ranked at once", "1 of 2 gone, ranked one by one",
    ]  # fmt: skip
    whole, *_, last = rows.values()
    # Four projections of 16 x 16 floats lose a half each.
    assert whole[0] - last[0] == pytest.approx(4 * 16 * 8 * 4 / 1e6, abs=1e-5)
    assert last[2] == pytest.approx(math.exp(last[1]), rel=1e-3)
    assert (whole[3], last[3]) == (2 * 16 * 16 * 4, 2 * 16 * 8 * 4) and last[4] > 0
    assert_is_a_run(scripts, out, last[1])
    assert setup.load_run(out).settings.model["heads_per_layer"] == ((1, 1),)
    assert files_of(finished) == before and saved_steps(out) == [20]


def test_a_grouped_model_recovers_by_training_on(scripts, finished, tmp_path):
    out = tmp_path / "out"
    done = scripts.run(
        "compress", f"--workdir={finished}", "--what=gqa", "--kv_heads=1", "--steps=8",
        f"--out={out}",
    )  # fmt: skip
    assert done.returncode == 0 and done.stderr == "", done.stderr
    rows = rows_of(out)
    assert list(rows) == [
        "2 key/value heads", "2 key/value heads, 8 steps more", "pooled to 1",
        "pooled to 1, 8 steps more",
    ]  # fmt: skip
    whole, whole_after, pooled, recovered = rows.values()
    assert whole_after[1] < whole[1] and recovered[1] < pooled[1]
    assert recovered[3] == whole[3] / 2
    assert_is_a_run(scripts, out, recovered[1])
    assert saved_steps(out) == [28]


@pytest.mark.parametrize("flags, words", [
    ([], ["what: wanted one of", "prune"]),
    (["--what=prune", "--heads=2"], ["number: wanted", "from 0 to 1", "got 2"]),
    (["--what=prune", "--heads=one"], ["heads: wanted integers", "got one"]),
    (["--what=gqa", "--kv_heads=3"], ["num_kv_heads", "2 key/value heads", "got 3"]),
    (["--what=distill", "--steps=0"], ["steps: wanted at least 1", "got 0"]),
    (["--what=distill", "--alpha=2"], ["alpha: wanted a number in [0, 1], got 2.0"]),
    (["--what=gqa", "--steps=0"], ["steps: wanted at least 1", "got 0"]),
    (["--what=gates", "--steps=0"], ["steps: wanted at least 1", "got 0"]),
    (["--what=gates", "--heads=2"], ["number: wanted", "from 0 to 1", "got 2"]),
    (["--what=gates", "--penalty=0"], ["penalty: wanted a finite number > 0", "got 0"]),
    (["--what=outliers", "--beside=nowhere"], ["workdir: nowhere holds no run"]),
    (["--what=gqa", "--out={corpus}"], ["out: wanted a new folder", "corpus"]),
])  # fmt: skip
def test_what_cannot_be_done_ends_in_one_sentence(scripts, finished, tmp_path, flags, words):
    flags = [flag.format(corpus=scripts.corpus) for flag in [f"--out={tmp_path / 'o'}", *flags]]
    assert_one_sentence(scripts.run("compress", f"--workdir={finished}", *flags), *words)
    assert not (tmp_path / "o").exists()


def test_the_head_that_does_nothing_goes_first(finished):
    trained = setup.load_run(finished)
    model = nn.merge(trained.graphdef, trained.params)
    for idle in (0, 1):
        _, params = nn.split(silence_heads(model, {0: [idle]}))
        orders = compression.heads_to_prune(dataclasses.replace(trained, params=params), [1])
        assert orders == {"at once": {1: {0: [idle]}}, "one by one": {1: {0: [idle]}}}


def test_a_pruned_models_heads_are_not_ranked_again(finished):
    trained = setup.load_run(finished)
    model = compression.pruned(trained, [1], 0, 1.0).last
    graphdef, params = nn.split(model)
    pruned = dataclasses.replace(trained, graphdef=graphdef, params=params)
    with pytest.raises(ValueError, match="a pruned model; prune the whole one"):
        compression.heads_to_prune(pruned, [1])


def test_two_numbers_of_four_bits_share_a_byte():
    params = {"a": jnp.zeros((1000, 50)), "b": jnp.zeros((1000, 30), jnp.int8)}
    assert megabytes(params) == pytest.approx(0.23)
    assert megabytes(params | {"c": jnp.zeros((1000, 40), jnp.int4)}) == pytest.approx(0.25)


def test_every_model_has_a_rate(finished):
    trained = setup.load_run(finished)
    model = nn.merge(trained.graphdef, trained.params)
    rates = decoding_rates(
        [model, compression.pruned(trained, [1], 0, 1.0).last],
        batch=3,
        context=16,
        kinds=[Cache] * 2,
    )
    assert len(rates) == 2 and min(rates) > 0


def test_a_row_says_what_changed_from_the_first():
    rows = [Row("whole", 3.25, 1.5, 131072, 5343.4), Row("less", 2.9, 1.625, 32768, 7413.0)]
    assert table(rows).splitlines()[2:] == [
        "| whole | 3.250 | 1.5000 |  | 4.482 | 131,072 | 5,343 |",
        "| less | 2.900 | 1.6250 | +0.1250 | 5.078 | 32,768 | 7,413 |",
    ]


def test_quantized_models_are_measured_and_not_saved(scripts, finished, tmp_path):
    out = tmp_path / "out"
    done = scripts.run(
        "compress", f"--workdir={finished}", "--what=quantize", "--group=8", f"--out={out}"
    )
    assert done.returncode == 0 and done.stderr == "", done.stderr
    sizes = {name: row[0] for name, row in rows_of(out).items()}
    assert list(sizes) == [
        "float32", "int8, a scale for each column", "int8, for 8 numbers",
        "int4, a scale for each column", "int4, for 8 numbers", "int8, and activations in int8",
        "float32, and an int8 cache",
    ]  # fmt: skip
    whole, by_column, by_group, small, small_by_group, both, cached = sizes.values()
    assert cached == whole
    assert small < by_column == both < by_group < whole and small < small_by_group < by_group
    assert [path.name for path in out.iterdir()] == ["compress.md"]


def test_a_pruned_model_recovers_by_training_on(finished):
    found = compression.pruned(setup.load_run(finished), [1], 3, 0.5)
    assert list(found.models) == [
        "all 2 heads", "all 2 heads, 3 steps more", "1 of 2 gone, ranked at once",
        "1 of 2 gone, ranked one by one", "1 of 2 gone, ranked one by one, 3 steps more",
    ]  # fmt: skip
    whole, more, _, pruned, recovered = map(nn.split, found.models.values())
    assert recovered[0] == pruned[0] and found.state.step == 23
    for before, after in ((whole, more), (pruned, recovered)):
        moved = jax.tree.map(lambda x, y: np.abs(x - y).max(), before[1], after[1])
        assert min(jax.tree.leaves(moved)) > 0
    jax.tree.map(np.testing.assert_array_equal, found.state.params, recovered[1])


def test_the_head_that_does_harm_is_the_one_that_the_gates_close(finished, tmp_path):
    trained = setup.load_run(finished)
    model = scale_heads(nn.merge(trained.graphdef, trained.params), {0: np.array([1.0, 300.0])})
    trained = dataclasses.replace(trained, params=nn.split(model)[1])
    found = head_gates.pruned_by_gates(trained, [1], 1e-3, 40, 1e-3)
    assert list(found.models) == [
        "all 2 heads", "all 2 heads, 80 steps more", "1 of 2 gone, by 40 steps with gates",
        "1 of 2 gone, by 40 steps with gates, 40 steps more",
    ]  # fmt: skip
    pruned = list(found.models.values())[2]
    queries = [m.blocks[0].mixer.query.kernel[...] for m in (model, pruned)]
    assert np.abs(queries[0][:, :8] - queries[1]).max() < 1e-3
    run = compression.save_run(tmp_path / "run", trained, found)
    again = setup.load_run(str(run.path))
    assert again.step == 20 + 80 == found.state.step
    jax.tree.map(np.testing.assert_array_equal, again.params, nn.split(found.last)[1])


def test_a_penalty_that_nothing_is_worth_closes_all_gates(finished, monkeypatch):
    monkeypatch.setattr(head_gates, "RATE", 0.5)
    trained = setup.load_run(finished)
    model = nn.merge(trained.graphdef, trained.params)
    model, log_alpha = head_gates.trained_with_gates(trained, model, None, 10.0, 15, 1e-3)
    np.testing.assert_array_equal(settled_gates(log_alpha[0]), 0)
    assert sorted(map(len, closed_heads(model, log_alpha).values())) == [1]  # one must stay


def test_the_loss_from_a_cache_is_the_loss_and_from_an_int8_one_nearly(finished):
    trained = setup.load_run(finished)
    model = nn.merge(trained.graphdef, trained.params)
    loss = trained.task.measure(*nn.split(model))["loss"]
    np.testing.assert_allclose(loss_from_cache(trained, model, Cache), loss, rtol=1e-5)
    rounded = loss_from_cache(trained, model, QuantizedCache)
    assert rounded != loss_from_cache(trained, model, Cache) and abs(rounded / loss - 1) < 0.005
    # 16 tokens of 2 heads of 8 numbers, keys and values: in 4 bytes, or in 1 and a scale of 4
    assert cache_bytes(model, 16) == 16 * 2 * 2 * 8 * 4
    assert cache_bytes(model, 16, QuantizedCache) == 16 * 2 * 2 * (8 + 4)


def test_the_report_of_outliers_has_their_statistics_and_what_8_bits_cost(finished):
    trained = setup.load_run(finished)
    model = nn.merge(trained.graphdef, trained.params)
    text = outliers.report([trained, trained])
    cells = [line.strip("| ").split(" | ") for line in text.splitlines()[2:4]]
    assert cells[0] == cells[1] and cells[0][1] == "`attention`"
    found = outliers.outliers(trained, model)
    assert cells[0][2:4] == [f"{found.inf_norm:.1f}", f"{found.tails:.2f}"]
    for cell, kind in zip(cells[0][5:7], ("int8", "int8_tensor"), strict=True):
        small = quantize(model, activations=kind)
        assert cell.startswith(f"{trained.task.measure(*nn.split(small))['loss']:.4f}")
    assert "| OPT-125m, gated | 8.7 | 18.9 | 15.55 | 16.02 |" in text

    batches = [batch["inputs"] for batch in trained.task.all_batches()]
    residual = np.concatenate([activations(model, batch)["residual"][0] for batch in batches])
    by_hand = np.abs(residual).reshape(len(residual), -1).max(1).mean()
    np.testing.assert_allclose(found.largest["residual"][0], by_hand, rtol=1e-4)
