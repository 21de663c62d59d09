"""The study of sinks: what it reads off a trained model, and how it judges."""

import dataclasses
import math

import numpy as np
import pytest

from experiments import setup
from experiments.studies import sinks, training
from experiments.studies.sinks import Stream
from tests.experiments.studies import judged, result_of, study_of


def streams(without, with_, sink):
    def look(run):
        if run.name == "softmax":
            kept = {0: 1.0 + math.log(without), **{n: 1.0 + math.log(with_) for n in (1, 2, 4)}}
        else:
            kept = {0: 1.0 + math.log(sink)}
        return Stream(kept, whole=2.0, first=(0.1, 0.4))

    return look


@pytest.mark.parametrize(
    "look, holds",
    [
        (streams(1.5, 1.01, 1.0), True),
        (streams(1.03, 1.01, 1.0), False),  # evicting does no harm
        (streams(1.5, 1.4, 1.0), False),  # keeping does not help
        (streams(1.5, 1.0, 1.3), False),  # nor does a sink
    ],
)
def test_sinks_are_judged_by_what_eviction_costs(tmp_path, monkeypatch, look, holds):
    monkeypatch.setattr(sinks, "stream", look)
    _, _, findings = judged("sinks", tmp_path, lambda run: result_of(run, loss=1.0))
    assert findings.holds == holds, findings.margin
    assert "40.0% of its attention" in findings.margin
    assert "trained sink: 2.718 at the training's length" in findings.ours


def test_a_model_without_attention_to_the_first_tokens_loses_nothing(scripts, tmp_path):
    """Within the training's length every cache holds everything, and says what `measure` said."""
    few = {
        "base.train.num_steps": 2, "base.train.eval_every": 2, "base.train.eval_batches": 1,
        "base.train.batch_size": 2, "base.data.corpus": "text_file", "base.data.context": 24,
        "base.data.path": str(scripts.corpus), "base.model.num_layers": 1,
        "base.model.width": 16, "base.model.num_heads": 2, "base.train.sample_tokens": 3,
    }  # fmt: skip
    soft, sink = (r for r in study_of("sinks", tmp_path, **few).runs if r.seed == 0)
    assert training.train([soft, sink], jobs=1, say=lambda _: None) == {}
    found = sinks.stream(soft)
    assert found.kept.keys() == set(sinks.KEPT) and sinks.stream(sink).kept.keys() == {0}
    losses = [*found.kept.values(), found.whole]
    assert np.isfinite(losses).all() and len(set(losses)) == len(losses)
    assert all(0 < share < 1 for share in found.first) and len(found.first) == 1
    trained = setup.load_run(soft.workdir)
    batches = list(sinks._late(trained))
    assert all((batch["weights"][:, :24] == 0).all() for batch in batches)
    everything = dataclasses.replace(found, kept={})  # an op that sees all is the model's own
    assert sinks._loss(trained, sinks.Streaming(24 * sinks.LONGER, 1, 1e4)) == pytest.approx(
        everything.whole, rel=1e-5
    )
