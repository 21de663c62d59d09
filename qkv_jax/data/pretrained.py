"""The tokenizer of a pretrained model: what the files in a folder of Hugging Face's say."""

import json
import os
from collections.abc import Callable, Iterable, Mapping
from pathlib import Path
from typing import Any

from qkv_jax.data.files import read_text
from qkv_jax.data.japanese_bert import JapaneseBertTokenizer
from qkv_jax.data.special_tokens import FramedTokenizer
from qkv_jax.data.tokenizer_json import JsonTokenizer, byte_level, library
from qkv_jax.data.tokenizers import Tokenizer, read_json
from qkv_jax.data.unigram import UnigramTokenizer

BERT = {
    "unk_token": "[UNK]", "sep_token": "[SEP]", "pad_token": "[PAD]", "cls_token": "[CLS]",
    "mask_token": "[MASK]",
}  # fmt: skip
ROBERTA = {
    "bos_token": "<s>", "eos_token": "</s>", "unk_token": "<unk>", "sep_token": "</s>",
    "pad_token": "<pad>", "cls_token": "<s>",
    "mask_token": {"content": "<mask>", "lstrip": True},
}  # fmt: skip
GPT2 = dict.fromkeys(("bos_token", "eos_token", "unk_token"), "<|endoftext|>")
LLAMA = {"bos_token": "<s>", "eos_token": "</s>", "unk_token": "<unk>"}
GEMMA = {"bos_token": "<bos>", "eos_token": "<eos>", "unk_token": "<unk>", "pad_token": "<pad>"}
T5 = {"eos_token": "</s>", "unk_token": "<unk>", "pad_token": "<pad>"}

BPE_FILES = (("vocab.json", "merges.txt"), ("encoder.json", "vocab.bpe"))
PIECE_FILES = ("spiece.model", "tokenizer.model")
TOKENIZER_FILES = (
    "tokenizer.json", "tokenizer_config.json", "special_tokens_map.json", "added_tokens.json",
    "chat_template.jinja", "vocab.txt", *(name for pair in BPE_FILES for name in pair),
    *PIECE_FILES,
)  # fmt: skip


def pretrained_tokenizer(folder: str | os.PathLike) -> Tokenizer:
    """The tokenizer of a model, from a folder of Hugging Face's; it runs no code from there.

    A tokenizer.json says everything. Without one, tokenizer_config.json names the class of
    transformers, or else config.json the kind of model, and the vocabulary is in

        vocab.txt                           BERT; Japanese BERT, whose words are MeCab's
        vocab.json, merges.txt              GPT-2 and RoBERTa; or encoder.json, vocab.bpe
        spiece.model or tokenizer.model     T5, Llama, Mistral, Gemma, by SentencePiece

    The ids are those of transformers, special tokens in a text included; where it differs from
    SentencePiece, those of SentencePiece, with which the models were trained.

    Raises:
        ValueError: a file is missing or damaged, or the kind of tokenizer is another.
        ImportError: naming the package that the tokenizer needs.
    """
    folder = Path(folder).expanduser()
    if (folder / "tokenizer.json").exists():
        return JsonTokenizer.from_file(folder / "tokenizer.json")
    config = _json(folder / "special_tokens_map.json") | _json(folder / "tokenizer_config.json")
    model = _json(folder / "config.json")
    said = config.get("tokenizer_class") or model.get("tokenizer_class") or model.get("model_type")
    kind = str(said).removesuffix("Fast").removesuffix("Tokenizer").lower()
    if kind not in KINDS:
        raise ValueError(
            f"folder: {str(folder)!r} has no tokenizer.json, and its tokenizer is called {said!r}; "
            f"wanted one of: {', '.join(KINDS)}"
        )
    if "added_tokens_decoder" not in config:
        added = _json(folder / "added_tokens.json")
        config["added_tokens_decoder"] = {id: token for token, id in added.items()}
    return KINDS[kind](folder, config)


def _bert(folder: Path, config: dict[str, Any]) -> Tokenizer:
    parts, unknown = library(), _text(config.get("unk_token") or BERT["unk_token"])
    ids = {piece: id for id, piece in enumerate(_vocabulary(folder))}
    tokenizer = parts.Tokenizer(parts.models.WordPiece(ids, unk_token=unknown))
    tokenizer.normalizer = parts.normalizers.BertNormalizer(
        clean_text=True,
        handle_chinese_chars=config.get("tokenize_chinese_chars", True),
        strip_accents=config.get("strip_accents"),
        lowercase=config.get("do_lower_case", True),
    )
    tokenizer.pre_tokenizer = parts.pre_tokenizers.BertPreTokenizer()
    tokenizer.decoder = parts.decoders.WordPiece()
    return _framed_json(tokenizer, config, BERT, ["cls_token"], ["sep_token"])


def _gpt2(folder: Path, config: dict[str, Any]) -> Tokenizer:
    before = ["bos_token"] if config.get("add_bos_token") else []
    return _framed_json(_byte_pairs(folder, config), config, GPT2, before, [])


def _roberta(folder: Path, config: dict[str, Any]) -> Tokenizer:
    pairs = _byte_pairs(folder, config)
    return _framed_json(pairs, config, ROBERTA, ["cls_token"], ["sep_token"])


def _japanese_bert(folder: Path, config: dict[str, Any]) -> Tokenizer:
    """As transformers' BertJapaneseTokenizer, whose arguments the config has."""
    named = {role: _text(config.get(role) or default) for role, default in BERT.items()}
    words = config.get("word_tokenizer_type", "basic")
    pieces = config.get("subword_tokenizer_type", "wordpiece")
    words = words if config.get("do_word_tokenize", True) else "none"
    pieces = pieces if config.get("do_subword_tokenize", True) else "none"
    mecab = config.get("mecab_kwargs") or {}
    if words == "mecab" and not mecab.get("mecab_dic"):
        raise ValueError(
            f"folder: tokenizer_config.json in {str(folder)!r} names no dictionary for MeCab, and "
            "transformers took ipadic before 4.45, unidic_lite since; wanted the one that the "
            'model was trained with, as "mecab_kwargs": {"mecab_dic": "ipadic"}'
        )
    inner = JapaneseBertTokenizer(
        _vocabulary(folder),
        words=words,
        dictionary=mecab.get("mecab_dic", "unidic_lite"),
        options=mecab.get("mecab_option") or "",
        normalize=mecab.get("normalize_text", True),
        lowercase=config.get("do_lower_case", False),
        never_split=[*(config.get("never_split") or []), *named.values()],
        pieces=pieces,
        unknown=named["unk_token"],
    )
    ids = {piece: id for id, piece in enumerate(inner.vocabulary)}
    special = _special(config, named.values(), ids, inner.vocab_size)
    return FramedTokenizer(inner, special, before=[named["cls_token"]], after=[named["sep_token"]])


def _t5(folder: Path, config: dict[str, Any]) -> Tokenizer:
    count = config.get("extra_ids", 100)  # which follow the pieces, the last one first
    return _sentencepiece(
        folder, config, T5, [], ["eos_token"], (f"<extra_id_{i}>" for i in reversed(range(count)))
    )


def _llama(
    folder: Path, config: dict[str, Any], tokens: Mapping[str, Any] = LLAMA
) -> FramedTokenizer:
    before = ["bos_token"] if config.get("add_bos_token", True) else []
    after = ["eos_token"] if config.get("add_eos_token", False) else []
    return _sentencepiece(folder, config, tokens, before, after)


def _gemma(folder: Path, config: dict[str, Any]) -> Tokenizer:
    return _llama(folder, config, GEMMA)


KINDS: dict[str, Callable[[Path, dict[str, Any]], Tokenizer]] = {
    "bert": _bert, "distilbert": _bert, "bertjapanese": _japanese_bert, "gpt2": _gpt2,
    "roberta": _roberta, "t5": _t5, "llama": _llama, "mistral": _llama, "gemma": _gemma,
}  # fmt: skip


def _byte_pairs(folder: Path, config: dict[str, Any]) -> Any:
    """The library's byte-level tokenizer of a vocabulary and its merges."""
    found = next((pair for pair in BPE_FILES if (folder / pair[0]).exists()), None)
    if found is None:
        raise ValueError(
            f"folder: {str(folder)!r} has none of: tokenizer.json, vocab.json, encoder.json"
        )
    try:
        model = library().models.BPE.from_file(*(str(folder / name) for name in found))
    except Exception as error:  # the library raises plain Exception
        raise ValueError(f"folder: {found} in {str(folder)!r} cannot be read: {error}") from error
    return byte_level(model, prefix_space=config.get("add_prefix_space", False))


def _framed_json(
    tokenizer: Any,
    config: dict[str, Any],
    defaults: Mapping[str, Any],
    before: list[str],
    after: list[str],
) -> JsonTokenizer:
    """The library's tokenizer with special tokens: `before` and `after` are roles of them."""
    named = {role: config.get(role) or default for role, default in defaults.items()}
    added = sorted(config["added_tokens_decoder"].items(), key=lambda item: int(item[0]))
    tokenizer.add_tokens([_added(token) for token in (*(t for _, t in added), *named.values())])
    for id, token in added:
        _check_id(_text(token), int(id), tokenizer.token_to_id(_text(token)))
    frame = [_text(named[role]) for role in (*before, *after)]
    if frame:
        tokenizer.post_processor = library().processors.TemplateProcessing(
            single=[*frame[: len(before)], "$A", *frame[len(before) :]],
            special_tokens=[(token, tokenizer.token_to_id(token)) for token in frame],
        )
    return JsonTokenizer(tokenizer.to_str())


def _sentencepiece(
    folder: Path,
    config: dict[str, Any],
    defaults: Mapping[str, Any],
    before: list[str],
    after: list[str],
    more: Iterable[str] = (),
) -> FramedTokenizer:
    """SentencePiece's tokenizer with special tokens: `more` follow its own pieces."""
    found = next((name for name in PIECE_FILES if (folder / name).exists()), None)
    if found is None:
        raise ValueError(
            f"folder: {str(folder)!r} has none of: tokenizer.json, {', '.join(PIECE_FILES)}"
        )
    inner = UnigramTokenizer.from_file(folder / found)
    named = {role: _text(config.get(role) or default) for role, default in defaults.items()}
    special = _special(config, [*more, *named.values()], inner.symbols, inner.vocab_size)
    return FramedTokenizer(
        inner,
        inner.symbols | special,
        before=[named[role] for role in before],
        after=[named[role] for role in after],
    )


def _special(
    config: dict[str, Any], tokens: Iterable[str], ids: Mapping[str, int], size: int
) -> dict[str, int]:
    """The ids of special tokens: those that the folder says, the vocabulary's, or new ones."""
    special = {_text(token): int(id) for id, token in config["added_tokens_decoder"].items()}
    for token, id in special.items():
        _check_id(token, id, ids.get(token, id))
    for token in tokens:
        if token not in special:
            special[token] = ids.get(token, max([size, *(id + 1 for id in special.values())]))
    return special


def _check_id(token: str, said: int, found: int) -> None:
    if said != found:
        raise ValueError(
            f"folder: the token {token!r} is {said} for added_tokens_decoder, {found} for the "
            "vocabulary; wanted the same"
        )


def _text(token: str | dict[str, Any]) -> str:
    """What a special token looks like, which a folder says in either of two ways."""
    return token if isinstance(token, str) else token["content"]


def _added(token: str | dict[str, Any]) -> Any:
    """A special token as the library has it."""
    said = {} if isinstance(token, str) else token
    ways = {name: said[name] for name in ("lstrip", "rstrip", "single_word") if name in said}
    return library().AddedToken(
        _text(token),
        **ways,
        normalized=said.get("normalized", False),
        special=said.get("special", True),
    )


def _json(path: Path) -> dict[str, Any]:
    """The object in a JSON file; empty where there is none."""
    if not path.exists():
        return {}
    try:
        found = json.loads(read_json(path))
    except (ValueError, RecursionError) as error:
        raise ValueError(f"folder: {str(path)!r} cannot be parsed: {error}") from error
    if not isinstance(found, dict):
        raise ValueError(f"folder: {str(path)!r} holds no JSON object")
    return found


def _vocabulary(folder: Path) -> list[str]:
    """The pieces of a vocab.txt, one a line."""
    text = read_text(folder / "vocab.txt", what="the vocabulary")
    return text.removesuffix("\n").split("\n")
