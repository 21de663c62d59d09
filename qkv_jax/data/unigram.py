"""Unigram tokens: the most probable cut of a text into pieces of a trained vocabulary."""

import base64
import io
import os
from pathlib import Path
from typing import Any

import numpy as np

from qkv_jax.data.tokenizers import Tokenizer, checked_ids, needed


class UnigramTokenizer(Tokenizer):
    """A unigram model of pieces, by SentencePiece; what no piece covers is its UTF-8 bytes.

    Made by `UnigramTokenizer.train` or `UnigramTokenizer.from_file`. U+2581 decodes as a space,
    which it stands for within the model.
    Source: Kudo 2018 (https://arxiv.org/abs/1804.10959).

    Args:
        model: the content of a SentencePiece `.model` file.
    """

    name = "unigram"

    def __init__(self, model: bytes):
        library = needed(self.name, "sentencepiece")
        if not model:
            raise ValueError("not a SentencePiece model: it is empty")
        try:
            self._processor = library.SentencePieceProcessor(model_proto=model)
        except RuntimeError as error:
            raise ValueError(f"not a SentencePiece model: {error}") from error
        self._model = model

    @classmethod
    def build(cls, text, vocab_size, path):
        return cls.from_file(path) if path else cls.train(text, vocab_size)

    @classmethod
    def train(cls, text: str, vocab_size: int) -> "UnigramTokenizer":
        """The pieces with which `text` is most probable; fewer where it has no more.

        Nothing is normalised, and every space is kept, so that decoding undoes encoding.
        """
        if vocab_size < 512:
            raise ValueError(
                f"unigram: vocab_size is {vocab_size}; wanted >= 512, of which 256 are the bytes"
            )
        library, model = needed(cls.name, "sentencepiece"), io.BytesIO()
        try:
            library.SentencePieceTrainer.train(
                sentence_iterator=iter(text.splitlines()), model_writer=model,
                vocab_size=vocab_size, hard_vocab_limit=False, model_type="unigram",
                byte_fallback=True, character_coverage=0.9999, normalization_rule_name="identity",
                remove_extra_whitespaces=False, add_dummy_prefix=False,
                allow_whitespace_only_pieces=True, max_sentence_length=2**16, num_threads=1,
                bos_id=-1, eos_id=-1, pad_id=-1, minloglevel=2,
            )  # fmt: skip
        except RuntimeError as error:
            raise ValueError(f"unigram: the text cannot be learnt from: {error}") from error
        return cls(model.getvalue())

    @classmethod
    def from_file(cls, path: str | os.PathLike) -> "UnigramTokenizer":
        """The tokenizer of a SentencePiece `.model` file, such as T5's.

        Whether it decodes to the very same text is up to the file: normalisation loses something.
        """
        try:
            return cls(Path(path).expanduser().read_bytes())
        except (OSError, ValueError) as error:
            raise ValueError(
                f"unigram: {str(path)!r} cannot be loaded ({error}); wanted a SentencePiece .model"
            ) from error

    @property
    def vocab_size(self) -> int:
        return self._processor.get_piece_size()

    @property
    def symbols(self) -> dict[str, int]:
        """The ids of what stands for no text, such as </s> and <unk>."""
        model = self._processor
        ids = (id for id in range(self.vocab_size) if model.is_control(id) or model.is_unknown(id))
        return {model.id_to_piece(id): id for id in ids}

    def encode(self, text: str) -> np.ndarray:
        return np.asarray(self._processor.encode(text), np.int32)

    def decode(self, ids: np.ndarray) -> str:
        return self._processor.decode(checked_ids(ids, self.vocab_size).tolist())

    def _pieces(self, ids: np.ndarray) -> list[bytes]:
        pieces = []
        for id in checked_ids(ids, self.vocab_size).tolist():
            piece = self._processor.id_to_piece(id)
            if self._processor.is_byte(id):  # called <0xE3>
                pieces.append(bytes.fromhex(piece[3:5]))
            else:
                pieces.append(piece.replace("▁", " ").encode())
        return pieces

    def _state(self) -> dict[str, Any]:
        return {"model": base64.b64encode(self._model).decode("ascii")}

    @classmethod
    def _from_state(cls, state: dict[str, Any]) -> "UnigramTokenizer":
        model = state.get("model")
        if not isinstance(model, str):
            raise ValueError("tokenizer JSON of 'unigram' has no string 'model'")
        return cls(base64.b64decode(model))
