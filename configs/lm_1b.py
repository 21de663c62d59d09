"""A decoder of 1.2 billion parameters, on the devices of a machine or of many.

    python -m experiments.prepare_tokens --input="web/*.parquet" --tokenizer=gpt2_bpe \
        --end_of_document="<|endoftext|>" --out=tokens/web
    python -m experiments.plan --config=configs/lm_1b.py --vocab_size=50257 --devices=8
    python -m experiments.train --config=configs/lm_1b.py --config.data.path=tokens/web

TinyLlama's sizes (Zhang et al. 2024, arxiv.org/abs/2401.02385) with heads of 128, four for keys and
values, normalised queries and keys, SwiGLU, RMS norms and rotary positions; 25 billion tokens, 20
for each parameter (Hoffmann et al. 2022, arxiv.org/abs/2203.15556). Parameters, gradients and the
optimizer's state lie cut over all devices there are (fsdp). docs/scaling.md shows what that takes
on eight H100s, and how to start it on more. Not yet measured on a GPU.
"""

from ml_collections import ConfigDict

from configs import char_lm


def get_config() -> ConfigDict:
    config = char_lm.get_config()
    config.name = "lm_1b"
    config.data.update(corpus="token_files", context=2048)
    config.model.update(
        num_layers=22, width=2048, num_heads=16, num_kv_heads=4, mlp_width=5632,
        activation="swiglu", zero_init_outputs=False, logit_softcap=0.0,
    )  # fmt: skip
    config.optimizer.update(
        name="adamw", learning_rate=4e-4, schedule="cosine", warmup_steps=1000, final_fraction=0.1,
        weight_decay=0.1, accumulate=16,
    )  # fmt: skip
    config.mesh.update(data=1, fsdp=-1)
    config.train.update(
        num_steps=12_000, batch_size=64, eval_every=500, save_every=500, compute_dtype="bfloat16",
        steps_per_dispatch=1,
    )  # fmt: skip
    return config
