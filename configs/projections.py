"""Separate queries, keys and values against shared ones: what does sharing cost, what does it save?

    python -m experiments.compare --config=configs/projections.py
    python -m experiments.compare --config=configs/projections.py:full

The language model of configs/char_lm.py, trained for less long.
"""

from ml_collections import ConfigDict

from configs import study

VARIANTS = {
    "Q, K, V": {},
    "K = V": {"model.share_kv": True},
    "Q = K": {"model.share_qk": True},
    "Q = K = V": {"model.share_kv": True, "model.share_qk": True},
    "2 of 4 heads of K, V (GQA)": {"model.num_kv_heads": 2},
    "1 of 4 heads of K, V (MQA)": {"model.num_kv_heads": 1},
    "K = V, 1 of 4 heads": {"model.share_kv": True, "model.num_kv_heads": 1},
}


def get_config(size: str = "small") -> ConfigDict:
    config = study.get_config("projections", size)
    config.claim = (
        "One projection for keys and values costs a few per cent of perplexity (at most 5) and "
        "halves the cache, while one for queries and keys costs more."
    )
    config.published = (
        "K = V: +3.1 % perplexity for half of the cache; with GQA-4 an eighth of it, with MQA 3.1 %"
    )
    config.source = "arxiv.org/abs/2606.04032, abstract (300 M parameters, 10 B tokens)"
    base = config.base
    if size == "small":
        config.minutes = 20
        config.differences = (
            "a character model of 0.8 M parameters",
            "0.8 M characters to train on",
        )
        base.train.update(num_steps=400, eval_every=200)
    else:
        config.minutes = 60
        config.differences = ("a character model of 10 M parameters", "the default corpus")
        base.model.update(num_layers=6, width=384, num_heads=4, dropout_rate=0.1)
        base.data.context = 256
        base.train.update(num_steps=3000, batch_size=64, compute_dtype="bfloat16")
    config.runs = tuple(study.run(name, fields) for name, fields in VARIANTS.items())
    return config
