"""Hidden words of generated sentences; and what a model's vectors of ambiguous words tell."""

from __future__ import annotations

import dataclasses

import jax
import numpy as np
from flax import nnx

from experiments.tasks.generated import GeneratedTask
from experiments.tasks.task import Example
from qkv_jax import data, nn, training
from qkv_jax.data.grammar import CAT, IDS, SENSE_NAMES, SENSES, WORDS
from qkv_jax.data.senses import farthest
from qkv_jax.models import EncoderConfig, MaskedLanguageModel

SENTENCES = 4096  # in which vectors are looked at
SHOWN = 8  # sentences of the sample
BLANK = "□"


@dataclasses.dataclass(frozen=True)
class Occurrences:
    """A word in sentences.

    Args:
        vectors: float32 [L + 1, M, D], before the first block and after each.
        senses: that it has, integers [M].
        distances: to the nearer word that decides, integers [M].
    """

    vectors: np.ndarray
    senses: np.ndarray
    distances: np.ndarray

    @property
    def similarity(self) -> tuple[np.ndarray, np.ndarray]:
        """The mean cosine of two occurrences with the same sense, and with two: [L + 1] each."""
        units = self.vectors / np.linalg.norm(self.vectors, axis=-1, keepdims=True)
        cosines = units @ units.swapaxes(-1, -2)  # [L + 1, M, M]
        same = self.senses[:, None] == self.senses
        others = ~np.eye(len(same), dtype=bool)
        return cosines[:, same & others].mean(-1), cosines[:, ~same].mean(-1)

    def told_by(self, known: Occurrences) -> np.ndarray:
        """Whether the nearest mean of the known vectors of a sense is the right one's, [L + 1, M].

        As Peters et al. 2018 disambiguate words, section 5.3: arxiv.org/abs/1802.05365.
        """
        names = np.unique(known.senses)
        means = np.stack(
            [known.vectors[:, known.senses == name].mean(1) for name in names], axis=1
        )  # [L + 1, senses, D]
        between = np.linalg.norm(self.vectors[:, :, None] - means[:, None], axis=-1)
        return names[between.argmin(-1)] == self.senses


@dataclasses.dataclass(frozen=True)
class Told:
    """What a model's vectors of ambiguous words tell, before its first block and after each.

    Args:
        within: the mean cosine of two occurrences with the same sense, by word, [L + 1].
        between: with two senses.
        accuracy: how often the nearest mean of a sense is the right one's, in new sentences.
        by_distance: the same over all words, by the distance of the nearer word that decides.
    """

    within: dict[str, np.ndarray]
    between: dict[str, np.ndarray]
    accuracy: dict[str, np.ndarray]
    by_distance: dict[int, np.ndarray]


class Senses(GeneratedTask):
    """Hidden words of `qkv_jax.data.sentences`, from those on both sides; no sense is ever told."""

    config, model = EncoderConfig, MaskedLanguageModel
    predict = staticmethod(training.predict_padded_tokens)
    rows = staticmethod(data.masked_sentences)
    reads = ("mask_rate",)
    kind = "An encoder"
    unit = "masked word"
    rule = (
        "Each row is a sentence of a small grammar, English or Japanese; some words are hidden, as "
        "BERT does."
    )

    def count_ids(self) -> int:
        return len(WORDS) + 1

    @property
    def sizes(self) -> str:
        return f"sentences of at most {self.settings.data.context} words"

    def measure(self, graphdef: nnx.GraphDef, params: nn.Params) -> dict[str, float]:
        """Also `sense_0`, `within_0` and `between_0`, and so on by depth: means over the words."""
        scores, told = super().measure(graphdef, params), self.told(graphdef, params)
        for name, by_word in (
            ("sense", told.accuracy), ("within", told.within), ("between", told.between),
        ):  # fmt: skip
            means = np.mean(list(by_word.values()), axis=0)
            scores |= {f"{name}_{depth}": float(mean) for depth, mean in enumerate(means)}
        return scores

    def told(self, graphdef: nnx.GraphDef, params: nn.Params) -> Told:
        """What the vectors tell in sentences that the means of the senses do not come from."""
        known = self.occurrences(graphdef, params, data.EVALUATION)
        new = self.occurrences(graphdef, params, data.TEST)
        right = {word: new[word].told_by(known[word]) for word in SENSES}
        similarity = {word: new[word].similarity for word in SENSES}
        distances = np.concatenate([new[word].distances for word in SENSES])
        all_right = np.concatenate([right[word] for word in SENSES], axis=1)
        return Told(
            within={word: same for word, (same, _) in similarity.items()},
            between={word: other for word, (_, other) in similarity.items()},
            accuracy={word: found.mean(1) for word, found in right.items()},
            by_distance={
                distance: all_right[:, distances == distance].mean(1)
                for distance in range(1, farthest(self.settings.data.context) + 1)
            },
        )

    def occurrences(
        self, graphdef: nnx.GraphDef, params: nn.Params, stream: int
    ) -> dict[str, Occurrences]:
        """Every ambiguous word in many sentences, none of which has a hidden word."""
        rows = self._sentences(SENTENCES, stream)

        @jax.jit
        def at_places(params: nn.Params, rows: data.batches.Batch) -> jax.Array:
            encoder = nn.merge(graphdef, params).encoder
            found = encoder.states(rows["tokens"], lengths=rows["lengths"])  # [L + 1, B, T, D]
            return found[:, np.arange(SENTENCES), rows["places"]].astype(np.float32)

        vectors = np.asarray(at_places(params, rows))
        found = {}
        for word in SENSES:
            of_word = [i for i, (name, _) in enumerate(SENSE_NAMES) if name == word]
            here = np.isin(rows["senses"], of_word)
            found[word] = Occurrences(
                vectors[:, here], rows["senses"][here], rows["distances"][here]
            )
        return found

    def _sentences(self, number: int, stream: int) -> data.batches.Batch:
        return data.sentences(
            seed=self.settings.seed, step=0, batch_size=number, stream=stream,
            context=self.settings.data.context,
        )  # fmt: skip

    def describe(self, scores: dict[str, float]) -> list[str]:
        depths = sum(name.startswith("sense_") for name in scores)
        rows = [
            f"| {'before the first block' if depth == 0 else f'after block {depth}'} | "
            + " | ".join(f"{scores[f'{name}_{depth}']:.4f}" for name in ("within", "between"))
            + f" | {scores[f'sense_{depth}']:.4f} |"
            for depth in range(depths)
        ]
        return [
            "## Hidden words, and the vectors of ambiguous ones",
            "",
            f"{scores['loss']:.4f} nats per masked word, {scores['accuracy']:.1%} of them right, "
            f"over {self.validation}. {self.rule}",
            "",
            "| vectors of an ambiguous word | cosine in a sense | between senses | sense told |",
            "|---|---:|---:|---:|",
            *rows,
            "",
            f"The means over {', '.join(SENSES)}, in {SENTENCES:,} new sentences; a sense is told "
            "where the nearest mean vector of a sense, in as many other sentences, is the right "
            "one's.",
        ]

    def sample(self, graphdef: nnx.GraphDef, params: nn.Params) -> tuple[str, str]:
        """Sentences with blanks, and the model's words."""
        batch = {name: array[:SHOWN] for name, array in self._batch(0, data.TEST).items()}
        hidden = batch["weights"] == 1
        inputs = np.where(hidden, len(WORDS), batch["targets"])
        logits = self.predict(nn.merge(graphdef, params), batch | {"inputs": inputs}, None)
        logits = logits[..., : len(WORDS)]
        answers = np.where(hidden, logits.argmax(-1), batch["targets"])
        lines = []
        for row, blank, length, target in zip(
            answers, hidden, batch["lengths"], batch["targets"], strict=True
        ):
            words = [
                WORDS[word] if not gap else _filled(WORDS[word], WORDS[wanted])
                for word, gap, wanted in zip(row, blank, target, strict=True)
            ]
            lines.append(" ".join(words[:length]))
        return "\n".join(lines), f"New sentences; {BLANK} is a hidden word, with the model's guess."

    def example(self) -> Example:
        """A sentence of the source texts."""
        return Example(np.array([IDS[word] for word in CAT], np.int32), CAT)

    def stack(self, model: nnx.Module) -> nnx.Module:
        return model.encoder


def _filled(word: str, wanted: str) -> str:
    return f"{BLANK}[{word}]" if word == wanted else f"{BLANK}[{word}, not {wanted}]"
