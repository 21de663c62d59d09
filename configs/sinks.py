"""What does a model that streams lose when the first tokens leave its cache?

    python -m experiments.compare --config=configs/sinks.py
    python -m experiments.compare --config=configs/sinks.py:full

Models are trained on windows of text, with every token in sight. Then they read texts of many times
that length with a cache of the training's size: the newest tokens alone, or some of the first as
well. One kind of model has a learned sink in each head and so needs no token for it.
"""

from ml_collections import ConfigDict

from configs import study


def get_config(size: str = "small") -> ConfigDict:
    config = study.get_config("sinks", size)
    config.claim = (
        "A model that reads on with a cache of the training's length fails once the first tokens "
        "have left it; keeping four of them restores it, and a trained sink makes it unnecessary."
    )
    config.published = (
        "perplexity of Llama-2-13B with the newest 1,024 tokens 5,158, with 4 first and 1,020 "
        "newest 5.40; 160 M parameters with 1 first token: 18.49, with a trained sink: 18.01"
    )
    config.source = (
        "Xiao et al. 2024, tables 1-3, arxiv.org/abs/2309.17453 (PG-19; a held-out text)"
    )
    base = config.base
    base.model.update(qk_norm=False, logit_softcap=0.0)
    shared = ("characters instead of words", "the trained sink is a logit of each head, no token")
    if size == "small":
        config.minutes = 5
        config.differences = (*shared, "0.4 M parameters, 128 tokens a window")
        base.model.num_layers = 2
        base.train.update(num_steps=600, batch_size=16, eval_every=300)
    else:
        config.minutes = 60
        config.differences = (*shared, "25 M parameters, 512 tokens a window")
        base.data.context = 512
        base.model.update(num_layers=8, width=512, num_heads=8, dropout_rate=0.1)
        base.train.update(num_steps=5000, batch_size=64, compute_dtype="bfloat16")
    config.runs = (
        study.run("softmax", {"model.mixer": "attention"}),
        study.run("trained sink", {"model.mixer": "sink"}),
    )
    return config
