"""The study of long documents: loss by position, and how it judges."""

import numpy as np
import pytest

from experiments.studies import long_documents, training
from tests.experiments.studies import judged, result_of, study_of


def curves(full, memory, segment=1.95, state=1.9):
    late = {
        "full": full, "window": 2.0, "window and memory": memory, "carried segment": segment,
        "carried state": state,
    }  # fmt: skip
    return lambda run: np.concatenate([np.full(128, 2.5), np.full(128, late[run.name])])


@pytest.mark.parametrize(
    "look, holds, words",
    [
        (curves(1.8, 1.9), True, "window and memory recovers 50%"),
        (curves(1.8, 2.1), False, "Not as claimed: the gain of window and memory."),
        (curves(2.1, 1.9), False, "beside it: full +0.100"),
        (curves(2.0, 1.9), False, "full +0.000, window and memory -0.100"),
    ],
)
def test_long_documents_are_judged_by_their_second_half(tmp_path, monkeypatch, look, holds, words):
    monkeypatch.setattr(long_documents, "losses_by_position", look)
    _, _, findings = judged("long_documents", tmp_path, result_of)
    assert findings.holds == holds and words in findings.margin, findings.margin
    assert "window 2.500 / 2.000" in findings.ours
    assert ("recovers" in findings.margin) == ("beside it: full -" in findings.margin)
    assert "full attention is +0.000 from the window" in findings.margin


def test_the_mean_over_positions_is_the_loss(scripts, tmp_path):
    few = {
        "base.train.num_steps": 2, "base.train.eval_every": 2, "base.train.eval_batches": 1,
        "base.train.batch_size": 2, "base.data.corpus": "text_file", "base.data.context": 16,
        "base.data.path": str(scripts.corpus), "base.data.tokenizer": "char",
        "base.data.vocab_size": 4096, "base.model.width": 16, "base.train.sample_tokens": 3,
    }  # fmt: skip
    run = study_of("long_documents", tmp_path, **few).runs[0]
    assert training.train([run], jobs=1, say=lambda _: None) == {}
    losses = long_documents.losses_by_position(run)
    assert losses.shape == (16,) and (losses > 0).all()
    assert losses.mean() == pytest.approx(run.result().scores["loss"], abs=0.05)
