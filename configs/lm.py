r"""Language models of one text: what mixes the tokens, and the ingredients of a recent Transformer.

    python -m experiments.compare --config=configs/lm.py
    python -m experiments.compare --config=configs/lm.py:full
    python -m experiments.compare --config=configs/lm.py --config.base.data.corpus=text_file \
        --config.base.data.path=tinyshakespeare.txt --runs=runs/lm_shakespeare \
        --out=results/lm_shakespeare

Two rows of runs on the default corpus: the model of configs/char_lm.py with other mixers, each
learning in the same way; and GPT-2's Transformer, to which one ingredient after another is added.
"""

from ml_collections import ConfigDict

from configs import study

# Those that know no order by themselves have the base's rotary positions.
MIXERS = {
    "attention": "attention",
    "sliding window": "sliding_window",
    "LSTM": "lstm",
    "GRU": "gru",
    "gated convolution": "gated_conv",
    "Hyena": "long_conv",
    "linear attention": "linear",
    "RetNet": "retention",
    "Mamba-2": "ssd",
    "gated DeltaNet": "gated_delta",
    "gated DeltaNet 3 : 1 attention": "gated_delta,gated_delta,gated_delta,attention",
}
GPT_2 = {
    "model.position": "learned", "model.norm": "layer", "model.activation": "gelu",
    "model.qk_norm": False, "model.tie_embeddings": True, "model.zero_init_outputs": False,
    "model.logit_softcap": 0.0, "optimizer.name": "adamw", "optimizer.learning_rate": 3e-3,
}  # fmt: skip
# Each is added to all before it, in the order of the speedrun's records.
LADDER = {
    "rotary": {"model.position": "rotary"},
    "Muon": {"optimizer.name": "muon"},
    "squared ReLU": {"model.activation": "relu_squared"},
    "zero-initialised outputs": {"model.zero_init_outputs": True},
    "QK-norm": {"model.qk_norm": True},
    "untied head": {"model.tie_embeddings": False, "optimizer.learning_rate": 2e-2},
    "softcap": {"model.logit_softcap": 15.0},
    "value residual": {"model.mixer": "value_residual"},
}


def get_config(size: str = "small") -> ConfigDict:
    config = study.get_config("lm", size)
    config.claim = (
        "At equal size attention predicts a text better than recurrences and convolutions, hybrids "
        "as well as attention, and each ingredient of the recent recipe lowers the loss."
    )
    config.published = (
        "the time to a fixed loss (GPT-2 small, FineWeb) fell from 45 min to 31.4 (rotary, tuned), "
        "24.9 (Muon), 15.2 (squared ReLU, zero init, QK-norm), 10.8 (untied head), 8.2 (value "
        "residual, softcap)"
    )
    config.source = "modded-nanogpt, README, github.com/KellerJordan/modded-nanogpt"
    config.differences = ("characters instead of pieces", "loss at a fixed step, not time")
    base = config.base
    if size == "small":
        config.minutes = 24
        base.train.update(num_steps=500, eval_every=250)
        config.seeds = (0,)
    else:
        config.minutes = 180
        base.model.update(num_layers=8, width=512, num_heads=8)
        base.data.context = 256
        base.train.update(num_steps=5000, batch_size=64, compute_dtype="bfloat16")
    runs = [study.run(f"mixer: {name}", {"model.mixer": mixer}) for name, mixer in MIXERS.items()]
    fields = dict(GPT_2)
    runs.append(study.run("recipe: GPT-2", fields))
    for name, more in LADDER.items():
        fields = fields | more
        runs.append(study.run(f"recipe: + {name}", fields))
    config.runs = tuple(runs)
    return config
