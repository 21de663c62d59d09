"""Multi-query associative recall: who can look up what was said before?

    python -m experiments.compare --config=configs/recall.py          # or configs/recall.py:small
    python -m experiments.compare --config=configs/recall.py:full     # for an accelerator

Two blocks that only mix tokens, with one head and no feed-forward network, read pairs of a key and
a value, and are asked for the values. Attention can look at any pair; a recurrence must keep all of
them in its state, a convolution must have a filter for each distance.

The small setting begins with rows of four pairs, to which more are added while it trains: with all
16 from the first step on, not even attention learns to look one up in so few steps.
"""

from ml_collections import ConfigDict

from configs import study

# name -> (mixer, what else it needs). Learned positions for those that know no order by themselves.
MIXERS = {
    "attention": {"model.mixer": "attention", "model.position": "learned"},
    "linear attention": {"model.mixer": "linear", "model.position": "learned"},
    "gated DeltaNet": {"model.mixer": "gated_delta"},
    "LSTM": {"model.mixer": "lstm"},
    "GRU": {"model.mixer": "gru"},
    "gated convolution": {"model.mixer": "gated_conv"},
    "Hyena": {"model.mixer": "long_conv"},
}


def get_config(size: str = "small") -> ConfigDict:
    config = study.get_config("recall", size)
    config.claim = (
        "Attention recalls any pair at any length, while models with a fixed state or filter "
        "recall less the longer the text, and more the wider they are."
    )
    config.published = (
        "N = 64 / 128 / 256 at width 64: attention 1.00 / 1.00 / 1.00, Hyena 0.52 / 0.18 / 0.05, "
        "BaseConv 0.70 / 0.37 / 0.14"
    )
    config.source = "Arora et al. 2023, Zoology, figure 2, arxiv.org/abs/2312.04927"

    base = config.base
    base.task = "recall"
    base.model.update(
        num_layers=2, num_heads=1, mlp_width=0, position="none", norm="layer", qk_norm=False,
        tie_embeddings=True, zero_init_outputs=False, logit_softcap=0.0,
    )  # fmt: skip
    base.optimizer.update(learning_rate=1e-2, muon_learning_rate=2e-2)  # by Muon
    base.train.update(stop_accuracy=0.997)  # more than is wanted: it is measured anew at the end
    if size == "small":
        config.minutes = 23
        config.differences = (
            "256 ids instead of 8,192", "new sequences each step instead of 100,000 in epochs",
            "Muon, one learning rate, instead of AdamW with the best of four", "no dropout",
            "rows of 4 pairs in the first steps, of up to all from half of the steps on "
            "(N = 256: two thirds)", "width 64 alone for N = 256",
        )  # fmt: skip
        config.seeds = (0,)
        base.data.update(vocab_size=256, min_pairs=4, ramp_steps=225)
        base.train.update(num_steps=450, batch_size=64, eval_every=50, eval_batches=4)
        widths, more = {64: (64, 128), 128: (64, 128), 256: (64,)}, {256: {"data.ramp_steps": 300}}
    else:
        config.minutes = 600
        config.differences = (
            "new sequences each step instead of 100,000 in epochs",
            "Muon, one learning rate, instead of AdamW with the best of four",
        )
        base.data.vocab_size = 8192
        base.model.dropout_rate = 0.1
        base.train.update(num_steps=12_800, batch_size=512, eval_every=200, eval_batches=6)
        widths, more = dict.fromkeys((64, 128, 256), (64, 128, 256, 512)), {}
    config.runs = tuple(
        study.run(
            f"{name}, N = {context}, width {width}",
            {
                **fields, "data.context": context, "data.num_pairs": context // 16,
                "model.width": width, **more.get(context, {}),
            },
        )
        for context, of_context in widths.items()
        for width in of_context
        for name, fields in MIXERS.items()
    )  # fmt: skip
    return config
