"""What should a model of text read: characters, bytes, or pieces that a text itself suggests?

    python -m experiments.compare --config=configs/tokens.py
    python -m experiments.compare --config=configs/tokens.py:full
    python -m experiments.compare --config=configs/tokens.py:japanese --config.base.data.path=ja.txt

The same model learns the same text in each of them, for as many tokens. `japanese` adds MeCab's
words; it needs a text file and `pip install fugashi ipadic`.
"""

from ml_collections import ConfigDict

from configs import study

SIZES = (*study.SIZES, "japanese")


def get_config(size: str = "small") -> ConfigDict:
    config = study.get_config("tokens", size, SIZES)
    config.claim = (
        "Pieces of words say a text in fewer tokens than characters or bytes, unigram's in no more "
        "than BPE's, and for the same number of tokens read a model of them spends fewer bits on a "
        "character."
    )
    config.published = (
        "Japanese tokens a sentence: unigram 25.05, BPE 25.43 (8,000 each); BLEU Japanese to "
        "English: unigram 21.6, BPE 21.7, MeCab's words 18.9, characters 9.2"
    )
    config.source = (
        "SentencePiece, doc/experiments.md (KFTT), github.com/google/sentencepiece; Kudo and "
        "Richardson 2018, arxiv.org/abs/1808.06226"
    )
    config.differences = ("bits per character of a language model instead of BLEU",)
    base = config.base
    vocabularies = (1024, 4096)
    if size == "full":
        config.minutes = 60
        base.model.update(num_layers=8, width=512, num_heads=8)
        base.data.context = 256
        base.train.update(num_steps=5000, batch_size=64, compute_dtype="bfloat16")
        vocabularies = (1024, 8192)
    else:
        config.minutes = 7
        config.seeds = (0,)
        base.model.num_layers = 2
        base.train.update(num_steps=600, eval_every=300)
    runs = [("characters", "char", None), ("bytes", "byte", None)]
    runs += [
        (f"{name} {number:,}", tokenizer, number)
        for number in vocabularies
        for name, tokenizer in (("BPE", "bpe"), ("unigram", "unigram"))
    ]
    if size == "japanese":
        base.data.corpus = "text_file"
        runs.append((f"words {vocabularies[-1]:,}", "mecab", vocabularies[-1]))
    config.runs = tuple(
        study.run(
            name,
            {"data.tokenizer": tokenizer} | ({"data.vocab_size": number} if number else {}),
        )
        for name, tokenizer, number in runs
    )
    return config
