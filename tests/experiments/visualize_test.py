"""A page of a run's attention: what it says, and what cannot be shown."""

import pytest

from tests.experiments.runs import assert_one_sentence, files_of
from tests.pages import data_of


@pytest.fixture(scope="module")
def visualize(scripts, finished, tmp_path_factory):
    def visualize(*flags, workdir=finished):
        out = tmp_path_factory.mktemp("page") / "page.html"
        return out, scripts.run("visualize", f"--workdir={workdir}", f"--out={out}", *flags)

    return visualize


def test_a_language_models_page_has_heads_measures_lens_and_the_worst(visualize, finished):
    before = files_of(finished)
    page, done = visualize("--text=the cat", "--worst=3", f"--figures={finished.parent}/maps")
    assert done.returncode == 0, done.stderr
    assert str(page) in done.stdout and files_of(finished) == before
    data = data_of(page.read_text(encoding="utf-8"))
    first, *others = data["views"]
    layers, heads, T, _ = first["shape"]
    assert first["name"] == "attention" and T == 7 and "".join(first["queries"]) == "the cat"
    assert first["q"] and {"entropy, nats", "importance"} <= set(first["measures"])
    assert [view["name"].split()[0] for view in others] == ["gradient", "rollout,"]
    worst, lens = data["tables"]
    assert len(worst["rows"]) == 3 == len(worst["tokens"])
    costs = [float(row[3]) for row in worst["rows"]]
    assert costs == sorted(costs, reverse=True)
    assert len(lens["rows"]) == T and len(lens["columns"]) == layers + 2
    assert len(list((finished.parent / "maps").glob("layer_*.png"))) == layers
    assert f"{layers} layers of {heads} heads" in data["about"]


def test_two_runs_are_compared_on_one_text_of_a_file(visualize, finished, tmp_path):
    text = tmp_path / "text.txt"
    text.write_text("the dog and the cat sat on a mat " * 9, encoding="utf-8")
    page, done = visualize(f"--other={finished}", f"--text_file={text}", "--num_tokens=6")
    assert done.returncode == 0, done.stderr
    names = [view["name"] for view in data_of(page.read_text(encoding="utf-8"))["views"]]
    assert len(names) == 6 and names[0] == names[3] == f"{finished.name}: attention"
    assert all(view["shape"][2] == 6 for view in data_of(page.read_text(encoding="utf-8"))["views"])


def test_without_a_text_it_shows_what_the_report_shows_in_as_many_bytes_as_one_wants(visualize):
    page, done = visualize("--vector_mb=0")
    assert done.returncode == 0, done.stderr
    view = data_of(page.read_text(encoding="utf-8"))["views"][0]
    assert len(view["queries"]) > 1
    assert view["q"] is None and "more than the 0 MB" in view["why_no_product"]


@pytest.mark.parametrize(("flags", "words"), [
    (["--text="], ["text", "at least one character"]),
    (["--text=The cat"], ["'T'", "position 0"]),
    (["--text=" + "the cat " * 200], ["text", "tokens at a time", "--num_tokens"]),
    (["--text=a", "--text_file=b"], ["text_file", "got both"]),
    (["--text_file=missing.txt"], ["missing.txt", "cannot be read"]),
    (["--num_tokens=0"], ["num_tokens"]),
], ids=str)  # fmt: skip
def test_what_cannot_be_shown_ends_in_one_sentence(visualize, flags, words):
    assert_one_sentence(visualize(*flags)[1], *words)
