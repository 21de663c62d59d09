"""A model that fills in hidden words of a Japanese novel, in the words that MeCab finds.

    mkdir -p data && curl -o data/wagahaiwa_nekodearu.txt \
        https://raw.githubusercontent.com/google/sentencepiece/master/data/wagahaiwa_nekodearu.txt
    make train ARGS="--config=configs/mecab_mlm.py"
    .venv/bin/python -m experiments.visualize --workdir=runs/mecab_mlm \
        --text="吾輩は猫である。名前はまだ[MASK]。"

The tokenizer needs two packages: .venv/bin/pip install fugashi ipadic
BERT's masked tokens, activation, norms, biases and tied embeddings; the rest is char_lm.py's. All
of BERT's choices (norms after the blocks, learned positions, queries and keys without norms, no
blocks that begin as the identity) are slow to learn anything but frequencies: 1,000 steps, with
Muon at 1e-2, ended at 6.01.
Reached on two CPU cores: 4.3475 nats per masked word over the full validation text, a perplexity of
77.3 (counting words: 6.3633, 580), 34.8 % of the words right; in 554 s beside other work, at 2,700
tokens/s; 4,600 to 6,700 where there was less of it, which makes about four minutes.
"""

from ml_collections import ConfigDict

from configs import char_lm


def get_config() -> ConfigDict:
    config = char_lm.get_config()
    config.name = "mecab_mlm"
    config.task = "masked_lm"

    config.data.corpus = "aozora"
    config.data.path = "data/wagahaiwa_nekodearu.txt"
    config.data.tokenizer = "mecab"
    config.data.vocab_size = 16_384  # more than it has: no word is spelt in bytes
    config.data.context = 64

    config.model.update(
        activation="gelu",
        norm="layer",
        use_bias=True,
        tie_embeddings=True,
        logit_softcap=0.0,
        dropout_rate=0.1,
    )
    config.optimizer.learning_rate = 5e-3
    config.train.num_steps = 1200
    config.train.sample_tokens = 192
    return config
