"""How many heads, how wide, how deep? Attention's sizes one at a time.

    python -m experiments.compare --config=configs/heads.py
    python -m experiments.compare --config=configs/heads.py:full

Three rows of runs of the language model of configs/char_lm.py: the number of heads at a fixed width
of the model (so d_k falls), d_k at a fixed number of heads, and the number of layers.
"""

from ml_collections import ConfigDict

from configs import study

WIDTH, HEADS, LAYERS = 128, 4, 2  # of the run that all three rows share


def get_config(size: str = "small") -> ConfigDict:
    config = study.get_config("heads", size)
    config.claim = (
        "At a fixed width more heads help until each becomes too narrow, at a fixed number of "
        "heads a wider d_k helps, and so does depth."
    )
    config.published = (
        "perplexity with 1 / 4 / 8 / 16 / 32 heads: 5.29 / 5.00 / 4.92 / 4.91 / 5.01; with d_k of "
        "16 / 32 / 64: 5.16 / 5.01 / 4.92"
    )
    config.source = (
        "Vaswani et al. 2017, table 3, rows A, B and base, arxiv.org/abs/1706.03762 (English to "
        "German, newstest2013)"
    )
    base = config.base
    base.model.update(num_layers=LAYERS, width=WIDTH, num_heads=HEADS)
    if size == "small":
        config.minutes = 21
        config.differences = (
            "a causal character model instead of translation", "2 layers of width 128",
        )  # fmt: skip
        base.train.update(num_steps=300, eval_every=150)
        heads, dims, layers, width = (1, 2, 4, 8, 16, 32), (4, 8, 16, 32, 64), (1, 2, 4, 8), WIDTH
    else:
        config.minutes = 120
        config.differences = (
            "a causal character model instead of translation", "6 layers of width 512",
        )  # fmt: skip
        width = 512
        base.model.update(num_layers=6, width=width, num_heads=8, dropout_rate=0.1)
        base.data.context = 256
        base.train.update(num_steps=3000, batch_size=64, compute_dtype="bfloat16")
        heads, dims, layers = (1, 4, 8, 16, 32), (16, 32, 64), (1, 2, 4, 6, 8)
    config.runs = (
        *(study.run(f"{n} heads of {width // n}", {"model.num_heads": n}) for n in heads),
        *(
            study.run(f"d_k = {d}", {"model.head_dim": d})
            for d in dims
            if d * base.model.num_heads != width
        ),
        *(
            study.run(f"{n} layers", {"model.num_layers": n})
            for n in layers
            if n != base.model.num_layers
        ),
    )
    return config
