"""Text in, batches out: corpora, tokenizers, windows, and the floors that counting reaches.

    corpus = data.load_corpus("python_docs")
    tokenizer = data.build_tokenizer("char", corpus.text)
    tokens = data.pack_tokens(tokenizer.encode(corpus.text), tokenizer.vocab_size)
    train, validation = data.split(tokens, 0.1, context=128)
    batch = data.random_windows(train, seed=0, step=7, batch_size=16, context=128)

All of it is deterministic and runs on the host: NumPy, no JAX.
"""

from qkv_jax.data.aozora import aozora_text
from qkv_jax.data.arithmetic import modular_addition, split_pairs
from qkv_jax.data.array_file import ArrayFile
from qkv_jax.data.associations import recall
from qkv_jax.data.batches import (
    check_token_ids,
    pack_tokens,
    random_windows,
    sequential_windows,
    split,
    stacked_windows,
)
from qkv_jax.data.corpora import (
    CORPORA,
    Corpus,
    documents,
    load_corpus,
    python_docs,
    text_file,
)
from qkv_jax.data.digits import digits
from qkv_jax.data.distance import copying, cue
from qkv_jax.data.draws import EVALUATION, TEST, TRAINING
from qkv_jax.data.floors import bits_per_character, ngram_floors
from qkv_jax.data.japanese_bert import JapaneseBertTokenizer
from qkv_jax.data.listops import listops
from qkv_jax.data.masking import (
    mask_windows,
    masked_windows,
    sequential_masked_windows,
    stacked_masked_windows,
)
from qkv_jax.data.mecab import MecabTokenizer
from qkv_jax.data.pair_batches import TokenPairs, encode_pairs, random_pairs, sequential_pairs
from qkv_jax.data.pairs import PAIRS, Pairs, load_pairs, read_pairs
from qkv_jax.data.passages import same_document, which_document
from qkv_jax.data.pretrained import TOKENIZER_FILES, pretrained_tokenizer
from qkv_jax.data.repetition import repeats
from qkv_jax.data.senses import masked_sentences, sentences
from qkv_jax.data.shuffled import (
    EVERY_ROW,
    sequential_documents,
    shuffled_windows,
)
from qkv_jax.data.spans import passages
from qkv_jax.data.special_tokens import FramedTokenizer
from qkv_jax.data.token_files import TokenFiles
from qkv_jax.data.token_writing import Reading, write_token_files
from qkv_jax.data.tokenizer_json import BpeTokenizer, JsonTokenizer
from qkv_jax.data.tokenizers import (
    TOKENIZERS,
    ByteTokenizer,
    CharTokenizer,
    Tokenizer,
    build_tokenizer,
)
from qkv_jax.data.unigram import UnigramTokenizer

__all__ = [
    "CORPORA",
    "EVALUATION",
    "EVERY_ROW",
    "PAIRS",
    "TEST",
    "TOKENIZERS",
    "TOKENIZER_FILES",
    "TRAINING",
    "ArrayFile",
    "BpeTokenizer",
    "ByteTokenizer",
    "CharTokenizer",
    "Corpus",
    "FramedTokenizer",
    "JapaneseBertTokenizer",
    "JsonTokenizer",
    "MecabTokenizer",
    "Pairs",
    "Reading",
    "TokenFiles",
    "TokenPairs",
    "Tokenizer",
    "UnigramTokenizer",
    "aozora_text",
    "bits_per_character",
    "build_tokenizer",
    "check_token_ids",
    "copying",
    "cue",
    "digits",
    "documents",
    "encode_pairs",
    "listops",
    "load_corpus",
    "load_pairs",
    "mask_windows",
    "masked_sentences",
    "masked_windows",
    "modular_addition",
    "ngram_floors",
    "pack_tokens",
    "passages",
    "pretrained_tokenizer",
    "python_docs",
    "random_pairs",
    "random_windows",
    "read_pairs",
    "recall",
    "repeats",
    "same_document",
    "sentences",
    "sequential_documents",
    "sequential_masked_windows",
    "sequential_pairs",
    "sequential_windows",
    "shuffled_windows",
    "split",
    "split_pairs",
    "stacked_masked_windows",
    "stacked_windows",
    "text_file",
    "which_document",
    "write_token_files",
]
