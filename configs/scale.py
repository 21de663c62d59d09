"""Why are logits divided by sqrt(d_k)? Attention with and without it, by the width of a head.

    python -m experiments.compare --config=configs/scale.py
    python -m experiments.compare --config=configs/scale.py:full

A dot product of d_k components of mean 0 and variance 1 has variance d_k. What that does to the
softmax and to its gradient is computed directly; what it does to training is a language model as in
configs/char_lm.py, whose queries and keys have variance 1 in the beginning.
"""

from ml_collections import ConfigDict

from configs import study

SCALES = {"scaled": {}, "unscaled": {"model.attention_scale": 1.0}}


def get_config(size: str = "small") -> ConfigDict:
    config = study.get_config("scale", size)
    config.claim = (
        "Without the factor 1 / sqrt(d_k) logits have variance d_k: in wide heads the softmax "
        "saturates, its gradient vanishes and training suffers; with it, none of this depends on "
        "d_k."
    )
    config.published = (
        "q . k has variance d_k where components are independent of variance 1; for large d_k dot "
        "products push the softmax into regions where it has extremely small gradients (an "
        "argument; no figure)"
    )
    config.source = "Vaswani et al. 2017, section 3.2.1, arxiv.org/abs/1706.03762"
    base = config.base
    base.model.update(qk_norm=False, zero_init_outputs=False, logit_softcap=0.0)
    base.optimizer.update(name="adamw", learning_rate=2e-3)
    if size == "small":
        config.minutes = 5
        config.differences = ("a causal character model of 2 layers instead of translation",)
        base.model.update(num_layers=2, width=64, num_heads=2)
        base.data.context = 64
        base.train.update(num_steps=500, eval_every=250)
        dims = (4, 16, 64, 256)
    else:
        config.minutes = 90
        config.differences = ("a causal character model of 6 layers instead of translation",)
        base.model.update(num_layers=6, width=512, num_heads=8, dropout_rate=0.1)
        base.data.context = 256
        base.optimizer.learning_rate = 1e-3
        base.train.update(num_steps=3000, batch_size=64, compute_dtype="bfloat16")
        dims = (16, 64, 256, 1024)
    base.model.init_std = base.model.width**-0.5  # a normalised input then gives variance 1
    config.runs = tuple(
        study.run(f"{name}, d_k = {dim}", {**fields, "model.head_dim": dim})
        for dim in dims
        for name, fields in SCALES.items()
    )
    return config
