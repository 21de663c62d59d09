"""GPT-2's smallest model, 124,439,808 parameters: the shapes that `benchmark decode` times.

    python -m experiments.prepare_tokens --input=web.jsonl --tokenizer=gpt2_bpe \
        --end_of_document="<|endoftext|>" --out=tokens/web
    python -m experiments.train --config=configs/gpt2_124m.py --config.data.path=tokens/web
    python -m experiments.plan --config=configs/gpt2_124m.py --vocab_size=50257 --devices=8
    python -m experiments.benchmark train --config=configs/gpt2_124m.py

GPT-2's tokenizer is loaded, not trained: a tokenizer.json, or a folder with encoder.json and
vocab.bpe. Not trained here: that takes days on a GPU. configs/gpt2_124m_modern.py has what decoders
have learned since.
"""

from ml_collections import ConfigDict

from configs import char_lm


def get_config() -> ConfigDict:
    config = char_lm.get_config()
    config.name = "gpt2_124m"
    config.data.update(corpus="token_files", context=1024)
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
