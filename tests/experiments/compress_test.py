"""A run's model with fewer heads is a run, and the table says what it costs."""

import dataclasses
import math
import re

import jax.numpy as jnp
import numpy as np
import pytest

from experiments import compression, setup
from experiments.compression_table import Row, decoding_rates, megabytes, table
from qkv_jax import nn
from qkv_jax.models import silence_heads
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
        "compress", f"--workdir={finished}", "--what=prune", "--heads=1", f"--out={out}"
    )
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
    assert (whole[3], last[3]) == (2 * 16 * 16, 2 * 16 * 8) and last[4] > 0
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
    (["--what=distill", "--alpha=2"], ["alpha: wanted a number in [0, 1], got 2.0"]),
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
    model = compression.pruned(trained, [1]).last
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
    rates = decoding_rates([model, compression.pruned(trained, [1]).last], batch=3, context=16)
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
    ]  # fmt: skip
    whole, by_column, by_group, small, small_by_group, both = sizes.values()
    assert small < by_column == both < by_group < whole and small < small_by_group < by_group
    assert [path.name for path in out.iterdir()] == ["compress.md"]
