"""The study of tokens: how it judges, and what it takes from a run."""

import pytest

from experiments.studies import config_of, tokens, training
from tests.experiments.studies import judged, result_of, study_of

LENGTHS = {
    "characters": 1.0, "bytes": 1.01, "BPE 1,024": 0.5, "unigram 1,024": 0.49, "BPE 4,096": 0.4,
    "unigram 4,096": 0.38,
}  # fmt: skip
BITS = {
    "characters": 2.0, "bytes": 2.01, "BPE 1,024": 1.8, "unigram 1,024": 1.8, "BPE 4,096": 1.7,
    "unigram 4,096": 1.7,
}  # fmt: skip


@pytest.mark.parametrize(
    "lengths, bits, failed",
    [
        ({}, {}, ""),
        ({"unigram 1,024": 0.51}, {}, "unigram's no more than BPE's"),
        ({}, {"BPE 4,096": 2.1}, "fewer bits"),
        ({"BPE 4,096": 1.2}, {}, "fewer tokens"),
    ],
)
def test_tokens_are_judged_by_number_and_by_bits(tmp_path, monkeypatch, lengths, bits, failed):
    counts = LENGTHS | lengths
    monkeypatch.setattr(tokens, "tokens_per_character", lambda result: counts[result.run.name])

    def of_run(run):
        result = result_of(run)
        result.scores["bits_per_character"] = (BITS | bits)[run.name]
        return result

    _, _, findings = judged("tokens", tmp_path, of_run)
    assert findings.holds == (not failed)
    assert (f"Not as claimed: {failed}." if failed else "0.950 with 4,096") in findings.margin


def test_a_run_says_how_many_tokens_its_text_has(scripts, tmp_path):
    few = {
        "base.train.num_steps": 2, "base.train.eval_every": 2, "base.train.eval_batches": 1,
        "base.train.batch_size": 2, "base.data.corpus": "text_file", "base.data.context": 16,
        "base.data.path": str(scripts.corpus), "base.model.width": 16,
        "base.train.sample_tokens": 3,
    }  # fmt: skip
    run = study_of("tokens", tmp_path, **few).runs[0]
    assert run.name == "characters"
    assert training.train([run], jobs=1, say=lambda _: None) == {}
    assert tokens.tokens_per_character(run.result()) == 1.0


def test_japanese_words_are_a_size_of_its_own():
    assert "words 4,096" in dict(config_of("tokens", "japanese").runs)
    assert "words 4,096" not in dict(config_of("tokens", "small").runs)
    with pytest.raises(ValueError, match="'small', 'full', 'japanese'"):
        config_of("tokens", "chinese")
