"""How much does a model that reads a long document gain from what lies beyond its window?

    python -m experiments.compare --config=configs/long_documents.py
    python -m experiments.compare --config=configs/long_documents.py:full

All read the same long windows of text. One attends to the last tokens alone; one also to the
nearest of all older keys; one carries a segment's keys into the next, as Transformer-XL does; one
carries a matrix, by the gated delta rule; one attends to everything.
"""

from ml_collections import ConfigDict

from configs import study


def get_config(size: str = "small") -> ConfigDict:
    config = study.get_config("long_documents", size)
    config.claim = (
        "What lies beyond a window still tells what comes next: full attention predicts a long "
        "document's later parts best, and retrieval or a carried state recovers part of what a "
        "window alone loses."
    )
    config.published = (
        "RoBERTa with 512 tokens -> Longformer with 4,096: WikiHop 72.4 -> 75.0, TriviaQA 74.3 -> "
        "75.2, HotpotQA 63.5 -> 64.4, Hyperpartisan 87.4 -> 94.8; bits per character 1.846 -> 1.705"
    )
    config.source = "Beltagy et al. 2020, tables 5 and 7, arxiv.org/abs/2004.05150"
    base = config.base
    base.data.tokenizer = "bpe"
    shared = (
        "a causal model's loss instead of questions answered",
        "windows of Python's documentation, which may begin or end within a document",
        "gradients reach back through a carried segment",
    )
    if size == "small":
        config.minutes = 19
        config.differences = (*shared, "0.7 M parameters, 3,072 tokens: some 9,000 characters")
        config.seeds = (0,)
        base.data.update(vocab_size=1024, context=3072)
        base.model.update(num_layers=2, num_heads=2)
        base.train.update(num_steps=300, batch_size=4, eval_every=300, eval_batches=4)
        window, keys = 64, 16
    else:
        config.minutes = 120
        config.differences = (*shared, "30 M parameters, 8,192 tokens: some 28,000 characters")
        base.data.update(vocab_size=8192, context=8192)
        base.model.update(num_layers=8, width=512, num_heads=8)
        base.train.update(num_steps=3000, batch_size=8, eval_batches=4, compute_dtype="bfloat16")
        window, keys = 256, 64
    local = {"model.window": window}
    config.runs = (
        study.run("full", {"model.mixer": "attention"}),
        study.run("window", {"model.mixer": "sliding_window", **local}),
        study.run("window and memory", {"model.mixer": "memory", "model.top_k": keys, **local}),
        study.run("carried segment", {"model.mixer": "chunked", **local}),
        study.run("carried state", {"model.mixer": "gated_delta,sliding_window", **local}),
    )
    return config
