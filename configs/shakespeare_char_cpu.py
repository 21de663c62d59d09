"""nanoGPT's character model of Shakespeare in its CPU setting, exactly.

    mkdir -p data && curl -o data/tinyshakespeare.txt \
        https://raw.githubusercontent.com/karpathy/char-rnn/master/data/tinyshakespeare/input.txt
    make train ARGS="--config=configs/shakespeare_char_cpu.py"

The model, optimizer, schedule, batch and loss estimate of

    python train.py config/train_shakespeare_char.py --device=cpu --compile=False --eval_iters=20
        --block_size=64 --batch_size=12 --n_layer=4 --n_head=4 --n_embd=128 --max_iters=2000
        --lr_decay_iters=2000 --dropout=0.0

for which nanoGPT's README gives a validation loss of 1.88. Reached on two CPU cores in 95 s: 1.9018
over the full validation text (nanoGPT beside it: 1.8983), 1.9345 over 20 batches (1.8857).
"""

from ml_collections import ConfigDict

from configs import char_lm


def get_config() -> ConfigDict:
    config = char_lm.get_config()
    config.name = "shakespeare_char_cpu"
    config.seed = 1337

    config.data.corpus = "text_file"
    config.data.path = "data/tinyshakespeare.txt"
    config.data.context = 64

    config.model.update(
        num_layers=4,
        width=128,
        num_heads=4,
        activation="gelu",
        norm="layer",
        position="learned",
        qk_norm=False,
        tie_embeddings=True,
        zero_init_outputs=False,
        logit_softcap=0.0,
    )
    config.optimizer.update(
        name="adamw",
        learning_rate=1e-3,
        schedule="cosine",
        warmup_steps=100,
        final_fraction=0.1,
        b1=0.9,
        b2=0.99,
        weight_decay=0.1,
        clip_norm=1.0,
    )
    config.train.update(num_steps=2000, batch_size=12, eval_every=250, eval_batches=20)
    return config
