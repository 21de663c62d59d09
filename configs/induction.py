"""How does a model learn to go on as before? Random tokens that repeat, over the steps.

    python -m experiments.compare --config=configs/induction.py
    python -m experiments.compare --config=configs/induction.py:full

Attention alone, without feed-forward networks. What comes next stands one place after the last
occurrence of the present token. One layer finds the present token, or a place at a fixed distance;
for what came after it, a head of one layer must have told each token which came before, so that one
of the next can look for it.
"""

from ml_collections import ConfigDict

from configs import study


def get_config(size: str = "small") -> ConfigDict:
    config = study.get_config("induction", size)
    config.claim = (
        "Two layers of attention learn to continue what repeats, suddenly, and at the same time "
        "heads come to look at what followed the present token before; one layer does neither."
    )
    config.published = (
        "models of at least 2 layers: tokens late in a text become cheaper than early ones by 0.4 "
        "nats instead of 0.15, in a short phase after 2.5 to 5 billion tokens in which "
        "prefix-matching heads appear; models of 1 layer: neither"
    )
    config.source = "Olsson et al. 2022, arxiv.org/abs/2209.11895"
    base = config.base
    base.task = "repeats"
    base.model.update(
        mlp_width=0, position="learned", norm="layer", qk_norm=False, zero_init_outputs=False,
        logit_softcap=0.0,
    )  # fmt: skip
    base.optimizer.update(
        name="adamw", learning_rate=1e-3, schedule="constant", warmup_steps=100, b2=0.98,
    )  # fmt: skip
    if size == "small":
        config.minutes = 5
        config.differences = (
            "random tokens that repeat instead of texts", "width 128, 64 tokens a row",
        )  # fmt: skip
        base.data.update(context=64, vocab_size=64)
        base.train.update(num_steps=1000, batch_size=32, eval_every=25, eval_batches=4)
    else:
        config.minutes = 60
        config.differences = ("random tokens that repeat instead of texts",)
        base.model.update(width=768, num_heads=12)
        base.data.update(context=512, vocab_size=4096)
        base.optimizer.learning_rate = 3e-4
        base.train.update(num_steps=10_000, batch_size=64, eval_every=50, eval_batches=4)
    config.runs = (
        study.run("two layers", {"model.num_layers": 2}),
        study.run("one layer", {"model.num_layers": 1}),
    )
    return config
