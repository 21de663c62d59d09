"""When does a model understand what it has learnt by heart? Sums modulo p, over the steps.

    python -m experiments.compare --config=configs/grokking.py
    python -m experiments.compare --config=configs/grokking.py:full

One layer without norms is shown a part of all sums modulo a prime, the same in every step. It knows
these soon; those that it was never shown it gets right much later, where weight decay makes it give
up knowing each by heart.
"""

from ml_collections import ConfigDict

from configs import study


def get_config(size: str = "small") -> ConfigDict:
    config = study.get_config("grokking", size)
    config.claim = (
        "Accuracy on sums that were never shown rises long after that on those that were, at least "
        "5 times as many steps; without weight decay it does not in this time."
    )
    config.published = (
        "p = 113: known by heart within 1,400 epochs; a circuit of 5 frequencies forms until "
        "9,400; what was known by heart is given up until 14,000"
    )
    config.source = "Nanda et al. 2023, arxiv.org/abs/2301.05217, after Power et al. 2022"
    base = config.base
    base.task = "modular_addition"
    base.data.context = 3
    base.model.update(
        num_layers=1, num_heads=4, activation="relu", norm="none", position="learned",
        qk_norm=False, use_bias=True, zero_init_outputs=False, logit_softcap=0.0,
    )  # fmt: skip
    base.optimizer.update(
        name="adamw", schedule="constant", warmup_steps=10, b2=0.98, clip_norm=0.0
    )  # fmt: skip
    if size == "small":
        config.minutes = 7
        config.differences = (
            "p = 59 instead of 113", "40 % of all sums shown instead of 30 %",
            "width 64 instead of 128", "a learning rate of 0.003 instead of 0.001",
        )  # fmt: skip
        prime, held_out, base.model.width, base.optimizer.learning_rate = 59, 0.6, 64, 3e-3
        base.train.update(num_steps=4000, eval_every=25, eval_batches=2)
    else:
        config.minutes = 20
        config.differences = ("biases in attention too",)
        prime, held_out, base.model.width, base.optimizer.learning_rate = 113, 0.7, 128, 1e-3
        base.train.update(num_steps=50_000, eval_every=100, eval_batches=3)
    base.data.update(vocab_size=prime + 1, validation_fraction=held_out)
    base.train.batch_size = round(prime**2 * (1 - held_out))  # all that is shown
    base.model.init_std = base.model.width**-0.5
    config.runs = tuple(
        study.run(f"weight decay {decay:g}", {"optimizer.weight_decay": decay})
        for decay in (1.0, 0.0)
    )
    return config
