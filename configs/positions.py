"""How should a model know positions? Loss at the training's length, and on longer texts.

    python -m experiments.compare --config=configs/positions.py
    python -m experiments.compare --config=configs/positions.py:full

A causal model could count without being told; a bidirectional one cannot. What is told as an
address (learned, sinusoidal) need not mean anything where training has never been.
"""

from ml_collections import ConfigDict

from configs import study

CAUSAL = ("none", "learned", "sinusoidal", "rotary", "relative", "alibi")
MASKED = ("none", "learned", "sinusoidal", "alibi")
NAMES = {"relative": "T5", "alibi": "ALiBi"}


def get_config(size: str = "small") -> ConfigDict:
    config = study.get_config("positions", size)
    config.claim = (
        "On longer texts than trained on, sinusoidal positions fail most, then rotary, T5's less, "
        "ALiBi not at all; without any, a causal model loses little and a bidirectional one "
        "collapses."
    )
    config.published = (
        "perplexity at 1x / 2x / 5x of the length: sinusoidal 20.1 / 43.5 / 132, rotary 20.1 / "
        "21.4 / 31.6, T5 19.7 / 18.8 / 20.4, ALiBi 19.7 / 18.7 / 18.4; none 21.0 against 20.2 "
        "(causal), 147 against 4.1 (masked)"
    )
    config.source = (
        "Press et al. 2022, tables 2-4, arxiv.org/abs/2108.12409; Haviv et al. 2022, tables 1 and "
        "4, arxiv.org/abs/2203.16634 (WikiText-103)"
    )
    base = config.base
    longer = (2, 4, 8)
    if size == "small":
        config.minutes = 19
        config.differences = ("characters instead of words", "0.4 M parameters, 64 tokens a window")
        base.model.num_layers = 2
        base.data.context = 64
        base.train.update(num_steps=600, batch_size=32, eval_every=300)
        t5 = {"model.relative_distance": 32}  # farther away all is one bucket, one that was trained
    else:
        config.minutes = 120
        config.differences = ("characters instead of words", "25 M parameters, 512 tokens a window")
        base.model.update(num_layers=8, width=512, num_heads=8, dropout_rate=0.1)
        base.data.context = 512
        base.train.update(num_steps=5000, batch_size=64, compute_dtype="bfloat16")
        t5 = {}
    config.runs = tuple(
        study.run(
            f"{kind}, {NAMES.get(position, position)}",
            {
                "model.position": position, "task": task, **more,
                **(t5 if position == "relative" else {}),
            },
        )
        for kind, task, positions, more in (
            ("causal", "causal_lm", CAUSAL, {"data.longer": longer}),
            ("masked", "masked_lm", MASKED, {}),
        )
        for position in positions
    )  # fmt: skip
    return config
