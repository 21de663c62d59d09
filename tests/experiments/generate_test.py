"""Text from a run: the prompt, what the model adds, and the same again for the same seed."""

import json
import shutil

import pytest

from tests.experiments.runs import assert_one_sentence, files_of

PROMPT = "the cat sat on a mat and "  # longer than the context


@pytest.fixture(scope="module")
def generate(scripts, finished):
    def generate(*flags):
        return scripts.run(
            "generate", f"--workdir={finished}", f"--prompt={PROMPT}", "--num_tokens=31", *flags
        )

    return generate


def written(done):
    """The samples that a script printed."""
    assert done.returncode == 0 and done.stderr == "", done.stderr
    return done.stdout.removesuffix("\n").split("\n" + "-" * 80 + "\n")


def test_the_same_seed_writes_the_same_text_and_another_another(generate, finished):
    before = files_of(finished)
    three, again, four = (written(generate(f"--seed={seed}")) for seed in (3, 3, 4))
    assert three == again != four
    for (text,) in (three, four):
        assert text.startswith(PROMPT) and len(text) == len(PROMPT) + 31
    assert files_of(finished) == before


def test_samples_of_one_seed_differ_unless_only_the_likeliest_token_is_kept(generate):
    samples = written(generate("--num_samples=3", "--top_p=0.9"))
    assert len(samples) == 3 and len(set(samples)) == 3
    samples = written(generate("--num_samples=3", "--top_k=1"))
    assert len(samples) == 3 and len(set(samples)) == 1


def test_beams_print_the_best_texts_which_no_seed_changes(generate):
    best = written(generate("--beams=3", "--num_samples=2", "--length_penalty=0.5"))
    assert len(set(best)) == 2
    assert all(text.startswith(PROMPT) and len(text) == len(PROMPT) + 31 for text in best)


def test_a_draft_changes_no_likeliest_text_and_the_run_s_own_are_all_accepted(generate, finished):
    flags = ("--num_samples=3", "--top_k=1")
    done = generate(*flags, f"--draft={finished}", "--num_drafted=3")
    assert done.returncode == 0 and done.stdout == generate(*flags).stdout
    assert "accepted, 100%; 3." in done.stderr and done.stderr.count("\n") == 1


def test_a_draft_of_other_tokens_ends_in_one_sentence(generate, finished, tmp_path):
    other = shutil.copytree(finished, tmp_path / "other")
    state = json.loads((other / "tokenizer.json").read_text())
    state["characters"] = state["characters"].replace("c", "C")
    (other / "tokenizer.json").write_text(json.dumps(state))
    assert_one_sentence(generate(f"--draft={other}"), "draft", str(other), "tokenizer")


@pytest.mark.parametrize(
    "flags, words",
    [
        (["--prompt=The cat"], ["'T'", "position 0"]),
        (["--prompt="], ["prompt", "at least one character"]),
        (["--temperature=0"], ["temperature", "> 0", "got 0.0"]),
        (["--temperature=nan"], ["temperature", "got nan"]),
        (["--top_p=0"], ["top_p", "got 0.0"]),
        (["--top_k=0"], ["top_k", "got 0"]),
        (["--num_tokens=0"], ["num_tokens"]),
        (["--beams=2", "--top_p=0.9"], ["top_p", "beams draws nothing"]),
        (["--beams=2", "--num_samples=3"], ["num_samples", "at most beams = 2", "got 3"]),
        (["--length_penalty=2"], ["length_penalty", "only a search with beams"]),
        (["--num_drafted=3"], ["num_drafted", "no --draft"]),
        (["--seed=99999999999999999999"], ["seed"]),
        (["the cat"], ["unexpected argument 'the cat'"]),
    ],
    ids=str,
)
def test_what_cannot_be_generated_ends_in_one_sentence(generate, flags, words):
    assert_one_sentence(generate(*flags), *words)


def test_a_run_that_is_not_there_ends_in_one_sentence(scripts, tmp_path):
    done = scripts.run("generate", f"--workdir={tmp_path}")
    assert_one_sentence(done, str(tmp_path), "holds no run", "train one there first")
