"""How far back can a model look? One cue in noise, and a copy of all, by distance.

    python -m experiments.compare --config=configs/distance.py
    python -m experiments.compare --config=configs/distance.py:full

Attention is a direct bridge from an answer to what it rests on, however far; a recurrence carries
it through every step between; a convolution sees a few tokens, and a few more with each layer.
"""

from ml_collections import ConfigDict

from configs import study

MIXERS = {
    "attention": {"model.mixer": "attention", "model.position": "learned"},
    "LSTM": {"model.mixer": "lstm"},
    "GRU": {"model.mixer": "gru"},
    "gated convolution": {"model.mixer": "gated_conv"},
}
TASKS = {"cue": "cue", "copy": "copying"}


def get_config(size: str = "small") -> ConfigDict:
    config = study.get_config("distance", size)
    config.claim = (
        "Attention answers as well from far back as from near, in one step; a recurrence forgets, "
        "and a convolution does not see, what is far."
    )
    config.published = (
        "a Transformer copies any length, a state of fixed size no more than it holds (theory); an "
        "LSTM language model uses about 200 tokens, the order of the nearest 50"
    )
    config.source = (
        "Jelassi et al. 2024, arxiv.org/abs/2402.01032; Khandelwal et al. 2018, "
        "arxiv.org/abs/1805.04623"
    )
    base = config.base
    base.model.update(
        num_layers=2, num_heads=4, position="none", norm="layer", qk_norm=False,
        zero_init_outputs=False, logit_softcap=0.0,
    )  # fmt: skip
    # By AdamW, in as many steps, an LSTM does not learn the cue, nor attention the last of copying.
    base.optimizer.update(learning_rate=1e-2, muon_learning_rate=2e-2)
    base.data.vocab_size = 32
    base.train.update(stop_accuracy=0.999)
    if size == "small":
        config.minutes = 20
        config.differences = ("two layers of width 64", "rows of 128 tokens, 2,000 steps")
        base.data.context = 128
        base.model.width = 64
        base.train.update(num_steps=2000, batch_size=32, eval_every=100, eval_batches=16)
    else:
        config.minutes = 240
        config.differences = ("rows of 512 tokens", "two layers of width 512 instead of twelve")
        base.data.context = 512
        base.model.width = 512
        base.optimizer.update(learning_rate=3e-3, muon_learning_rate=1e-2)
        base.train.update(num_steps=20_000, batch_size=64, eval_every=500, eval_batches=16)
    config.runs = tuple(
        study.run(f"{task}, {name}", {**fields, "task": field})
        for task, field in TASKS.items()
        for name, fields in MIXERS.items()
    )
    return config
