"""Special tokens around and within the text of a tokenizer that knows none."""

import itertools
import json
import re
from collections.abc import Iterator, Mapping, Sequence
from typing import Any

import numpy as np

from qkv_jax.data.tokenizers import Tokenizer, checked_ids


class FramedTokenizer(Tokenizer):
    """Another tokenizer, with special tokens: each that stands in a text is one id.

    Args:
        inner: for what stands between them.
        special: their ids, of `inner` or beyond, by how they are written.
        before: those that `encode_framed` puts before a text.
        after: and after it.

    Raises:
        ValueError: `before` or `after` has what is not in `special`.
    """

    name = "framed"

    def __init__(
        self,
        inner: Tokenizer,
        special: Mapping[str, int],
        *,
        before: Sequence[str] = (),
        after: Sequence[str] = (),
    ):
        if missing := [token for token in (*before, *after) if token not in special]:
            raise ValueError(f"special: has no {missing[0]!r}, which is to stand around a text")
        self.inner, self.special = inner, dict(special)
        self.before, self.after = tuple(before), tuple(after)
        self._names = {id: token for token, id in self.special.items()}
        longest_first = map(re.escape, sorted(self.special, key=len, reverse=True))
        self._pattern = re.compile(f"({'|'.join(longest_first) or '(?!)'})")

    @property
    def vocab_size(self) -> int:
        return max([self.inner.vocab_size, *(id + 1 for id in self._names)])

    def encode(self, text: str) -> np.ndarray:
        return np.concatenate([  # every other part is a special token
            np.array([self.special[part]], np.int32) if i % 2 else self.inner.encode(part)
            for i, part in enumerate(self._pattern.split(text))
        ])  # fmt: skip

    def encode_framed(self, text: str) -> np.ndarray:
        before, after = ([self.special[t] for t in side] for side in (self.before, self.after))
        return np.concatenate([before, self.encode(text), after]).astype(np.int32)

    def decode(self, ids: np.ndarray) -> str:
        return "".join(
            "".join(run) if special else self.inner.decode(run) for special, run in self._runs(ids)
        )

    def labels(self, ids: np.ndarray) -> list[str]:
        return [
            label
            for special, run in self._runs(ids)
            for label in (run if special else self.inner.labels(run))
        ]

    def _runs(self, ids: np.ndarray) -> Iterator[tuple[bool, list]]:
        """(True, the names of special tokens) and (False, ids of the others), in order."""
        ids = checked_ids(ids, self.vocab_size).tolist()
        for special, run in itertools.groupby(ids, self._names.__contains__):
            found = list(run)
            yield special, [self._names[id] for id in found] if special else found

    def _state(self) -> dict[str, Any]:
        return {
            "inner": json.loads(self.inner.to_json()),
            "special": self.special, "before": self.before, "after": self.after,
        }  # fmt: skip

    @classmethod
    def _from_state(cls, state: dict[str, Any]) -> "FramedTokenizer":
        try:
            special, sides = state["special"], (state["before"], state["after"])
            right = all(isinstance(id, int) for id in special.values())
            right &= all(isinstance(token, str) for side in sides for token in side)
        except (KeyError, TypeError, AttributeError):
            right = False
        if not right:
            raise ValueError("tokenizer JSON of 'framed' has no 'special', 'before' and 'after'")
        inner = Tokenizer.from_state(state.get("inner"))
        return cls(inner, special, before=sides[0], after=sides[1])
