r"""Translation from no attention to the Transformer, and what long sentences do to each.

    python -m experiments.compare --config=configs/translate.py         # generated pairs
    python -m experiments.compare --config=configs/translate.py:full    # Multi30k, de-en

The small setting says numbers in German and Japanese words, and writes dates of many formats as ISO
8601 does. The full one reads data/multi30k/train.de, train.en, test_2016_flickr.de and .en: from
github.com/multi30k/dataset, data/task1/raw, unpacked. Any other pairs in two files, a line each:

    python -m experiments.compare --config=configs/translate.py:full \
        --config.base.data.path=train.en --config.base.data.target_path=train.ja \
        --config.base.data.test_path=test.en --config.base.data.test_target_path=test.ja
"""

from ml_collections import ConfigDict

from configs import study

RECURRENT = {"model.kind": "recurrent", "model.cell": "gru"}
LADDER = {
    "no attention": {**RECURRENT, "model.attention": "none"},
    "Luong": {**RECURRENT, "model.attention": "luong"},
    "Bahdanau": {**RECURRENT, "model.attention": "bahdanau"},
    "convolution": {"model.kind": "convolutional", "model.conv_width": 3},
    "Transformer": {"model.kind": "transformer"},
}


def get_config(size: str = "small") -> ConfigDict:
    config = study.get_config("translate", size)
    config.claim = (
        "A decoder that attends to the source translates better than one that is given a vector, "
        "most so where sentences are long; and from no attention over Luong's, Bahdanau's and "
        "convolutions to the Transformer, each is better than the one before."
    )
    config.published = (
        "Multi30k, German to English, BLEU: no attention 20.6 (GRU; LSTM 13.8), Bahdanau 28.3, "
        "convolution 34.1, Transformer 36.5; English to French, trained on up to 30 / 50 words: "
        "no attention 13.9 / 17.8, Bahdanau 21.5 / 26.8"
    )
    config.source = (
        "B. Trevett's notebooks, test set, github.com/bentrevett/pytorch-seq2seq; Bahdanau et al. "
        "2014, table 1, arxiv.org/abs/1409.0473"
    )
    base = config.base
    base.task = "translation"
    base.data.tokenizer = "bpe"
    if size == "small":
        config.minutes = 6
        config.differences = (
            "generated pairs, exact matches instead of BLEU", "10,000 pairs",
            "one layer of GRU, two of the others, 64 wide", "Muon instead of Adam",
        )  # fmt: skip
        config.seeds = (0,)
        base.data.update(vocab_size=384, context=64, validation_fraction=0.05)
        base.model.width = 64
        base.optimizer.update(learning_rate=1e-2, warmup_steps=100)
        base.train.update(num_steps=600, batch_size=64, eval_every=200, eval_batches=4)
        layers, heads = {"convolution": 2, "Transformer": 2}, 2
        corpora = {
            "German numbers": {"data.pairs": "numbers_de"},
            "Japanese numbers": {"data.pairs": "numbers_ja"},
            "dates": {"data.pairs": "dates", "data.tokenizer": "char"},
        }
    else:
        config.minutes = 60
        config.differences = (
            "8,000 joint byte pairs instead of words seen twice", "sacrebleu (13a) on sentences",
            "one width for all, 256", "rotary positions, RMS norm before each branch",
        )  # fmt: skip
        base.data.update(
            pairs="file", path="data/multi30k/train.de", target_path="data/multi30k/train.en",
            test_path="data/multi30k/test_2016_flickr.de",
            test_target_path="data/multi30k/test_2016_flickr.en",
            vocab_size=8000, context=64, validation_fraction=0.03,
        )  # fmt: skip
        base.model.update(width=256, dropout_rate=0.3)
        base.optimizer.update(name="adamw", learning_rate=1e-3, warmup_steps=100)
        base.train.update(num_steps=2200, batch_size=128, eval_every=220, eval_batches=6)
        layers, heads = {"convolution": 8, "Transformer": 3}, 8
        corpora = {"files": {}}
    sizes = {name: {"model.num_layers": layers.get(name, 1)} for name in LADDER}
    sizes["Transformer"]["model.num_heads"] = heads
    config.runs = tuple(
        study.run(f"{corpus}: {name}", {**pairs, **model, **sizes[name]})
        for corpus, pairs in corpora.items()
        for name, model in LADDER.items()
    )
    return config
