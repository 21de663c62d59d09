"""GPT-2's smallest model, 124,439,808 parameters: the shapes that `benchmark decode` times.

    python -m experiments.train --config=configs/gpt2_124m.py --config.data.path=my.txt \
        --config.data.tokenizer_path=gpt2_bpe

GPT-2's tokenizer is loaded, not trained: `data.tokenizer_path` is a tokenizer.json, or a folder
with encoder.json and vocab.bpe. Not trained here: that takes days on a GPU.
"""

from ml_collections import ConfigDict

from configs import char_lm


def get_config() -> ConfigDict:
    config = char_lm.get_config()
    config.name = "gpt2_124m"
    config.data.update(corpus="text_file", tokenizer="bpe", context=1024)
    config.model.update(
        num_layers=12, width=768, num_heads=12, activation="gelu_tanh", norm="layer",
        position="learned", qk_norm=False, use_bias=True, tie_embeddings=True,
        zero_init_outputs=False, logit_softcap=0.0,
    )  # fmt: skip
    config.optimizer.update(
        name="adamw", learning_rate=6e-4, schedule="cosine", warmup_steps=2000, final_fraction=0.1,
        weight_decay=0.1,
    )  # fmt: skip
    config.train.update(
        num_steps=600_000, batch_size=8, eval_every=1000, save_every=1000, compute_dtype="bfloat16",
        steps_per_dispatch=1,
    )  # fmt: skip
    config.optimizer.accumulate = 60
    return config
