"""Has the same word the same vector in two sentences? Ambiguous words before and after mixing.

    python -m experiments.compare --config=configs/senses.py
    python -m experiments.compare --config=configs/senses.py:full

Encoders guess hidden words of English and Japanese sentences in which the bank of a river and that
of a loan, the はし (hashi) over a river and the one beside a bowl, are the same word; two other
words, 1 to 6 words away, say which is meant. Then others answer questions about passages by the
span that says it. A convolution over one word mixes nothing: all that such a model knows of a word
is its embedding.
"""

from ml_collections import ConfigDict

from configs import study

MODELS = {
    "attention": {"model.mixer": "attention"},
    "convolution over 5": {"model.mixer": "gated_conv", "model.conv_width": 5},
    "convolution over 3": {"model.mixer": "gated_conv", "model.conv_width": 3},
    "embedding only": {"model.mixer": "gated_conv", "model.conv_width": 1},
}
WORDS, ANSWERS = tuple(MODELS), ("attention", "convolution over 3", "embedding only")


def get_config(size: str = "small") -> ConfigDict:
    config = study.get_config("senses", size)
    config.claim = (
        "The vector of an ambiguous word depends on its sentence after attention and not before; "
        "a convolution tells senses apart only where the deciding word is within its reach, an "
        "embedding nowhere, and only attention finds an answer's span."
    )
    config.published = (
        "F1 of the nearest mean vector on all-words sense disambiguation: two-layer biLM 67.4 "
        "after layer 1, 69.0 after layer 2; always the most frequent sense 65.9 (no figure of this "
        "setting is published)"
    )
    config.source = (
        "Peters et al. 2018, table 5, arxiv.org/abs/1802.05365; static vectors explain under 5 % "
        "of the variance in ELMo, BERT and GPT-2: Ethayarajh 2019, arxiv.org/abs/1909.00512"
    )
    config.differences = (
        "words of a small grammar, six of them ambiguous and as often in each sense, instead of "
        "WordNet's senses in running text",
        "encoders that guess hidden and replaced words instead of recurrent language models",
        "accuracy, with a mean vector for each sense, instead of F1",
    )
    base = config.base
    base.task = "senses"
    base.data.mask_rate = 0.3
    if size == "small":
        config.minutes = 10
        config.seeds = (0, 1)
        base.model.update(num_layers=2, width=64)
        base.data.context = 16
        base.train.update(num_steps=2000, batch_size=128, eval_every=500, eval_batches=8)
        spans = {"data.context": 32, "train.num_steps": 3000, "train.batch_size": 64}
    else:
        config.minutes = 30
        base.model.update(num_layers=4, width=256, num_heads=8)
        base.data.context = 48
        base.train.update(
            num_steps=5000, batch_size=512, eval_every=1000, eval_batches=8,
            compute_dtype="bfloat16",
        )  # fmt: skip
        spans = {"data.context": 48}
    spans |= {"task": "spans", "data.mask_rate": 0.15}  # the default: nothing is hidden there
    config.runs = tuple(
        study.run(f"{kind}: {name}", {**MODELS[name], **more})
        for kind, names, more in (("words", WORDS, {}), ("answers", ANSWERS, spans))
        for name in names
    )
    return config
