"""Translating sentences: pairs of a source and a target, from files or generated."""

from __future__ import annotations

import dataclasses
import functools
from collections.abc import Iterator
from typing import TYPE_CHECKING, Any, ClassVar, Self

import jax
import numpy as np
from flax import nnx

from experiments.tasks.task import Task
from experiments.tasks.translation_scores import score, table
from experiments.text import keep_corpus
from qkv_jax import data, inference, nn, training, viz
from qkv_jax.data.batches import Batch
from qkv_jax.models import (
    ConvSeq2Seq,
    ConvSeq2SeqConfig,
    EncoderDecoder,
    EncoderDecoderConfig,
    RecurrentSeq2Seq,
    RecurrentSeq2SeqConfig,
    alignment_maps,
)
from qkv_jax.training.run_directory import RunDirectory

if TYPE_CHECKING:
    from matplotlib.figure import Figure

    from experiments.setup import Settings

SHOWN = 8  # pairs in the sample
LONGEST_EXAMPLE = 24  # tokens of the sentences whose alignment is drawn


@dataclasses.dataclass(frozen=True)
class LabelledPair:
    """A sentence and its translation, as a model reads them.

    Args:
      source: integers [1, S].
      target_in: integers [1, T]: the target, moved on by one.
      source_labels, read_labels, target_labels: what the source, `target_in` and the target say.
    """

    source: np.ndarray
    target_in: np.ndarray
    source_labels: list[str]
    read_labels: list[str]
    target_labels: list[str]


def predict_targets(model: nnx.Module, batch: Batch, rng: jax.Array | None) -> jax.Array:
    """The logits, [B, T, V], of the batch's targets, each from those before it and the source."""
    return model(
        batch["sources"], batch["target_in"], source_lengths=batch["source_lengths"], rng=rng
    )


class Translation(Task):
    """Pairs of sentences; one tokenizer and one embedding for sources and targets.

    Args:
      settings: of the run.
      tokenizer: of a run that has been trained; None: built from the pairs.
    """

    config, model = EncoderDecoderConfig, EncoderDecoder
    other_models: ClassVar = {
        "recurrent": (RecurrentSeq2SeqConfig, RecurrentSeq2Seq),
        "convolutional": (ConvSeq2SeqConfig, ConvSeq2Seq),
    }
    reads = (
        "pairs", "num_examples", "path", "target_path", "test_path", "test_target_path",
        "tokenizer", "vocab_size", "tokenizer_path", "validation_fraction", "bleu_tokenizer",
    )  # fmt: skip
    kind = "An encoder-decoder"
    unit = "target token"
    predict: ClassVar[training.Predict] = staticmethod(predict_targets)

    def __init__(self, settings: Settings, tokenizer: data.Tokenizer | None = None):
        super().__init__(settings)
        if tokenizer is None:
            tokenizer = data.build_tokenizer(
                settings.data.tokenizer, self.pairs.text, vocab_size=settings.data.vocab_size,
                path=settings.data.tokenizer_path,
            )  # fmt: skip
        self.tokenizer = tokenizer
        self.begin, self.end = tokenizer.vocab_size, tokenizer.vocab_size + 1
        self.vocab_size = tokenizer.vocab_size + 2

    @classmethod
    def of_run(cls, settings: Settings, run: RunDirectory) -> Self:
        return cls(settings, data.Tokenizer.load(run.tokenizer))

    @functools.cached_property
    def pairs(self) -> data.Pairs:
        """Read where it is asked for: a trained model needs its tokenizer alone."""
        config = self.settings.data
        return data.load_pairs(
            config.pairs, config.path, config.target_path, number=config.num_examples,
            seed=self.settings.seed,
        )  # fmt: skip

    @functools.cached_property
    def _parts(self) -> tuple[data.TokenPairs, data.TokenPairs, data.TokenPairs]:
        """To train on, to look at while training, and to measure at the end."""
        config = self.settings.data
        train, validation = map(self._encode, self.pairs.split(config.validation_fraction))
        if config.test_path is None:
            if config.test_target_path is not None:
                raise ValueError("data.test_target_path: was set, but no data.test_path")
            return train, validation, validation
        test = data.read_pairs(config.test_path, config.test_target_path)
        return train, validation, self._encode(test)

    def _encode(self, pairs: data.Pairs) -> data.TokenPairs:
        return data.encode_pairs(pairs, self.tokenizer, context=self.settings.data.context)

    @property
    def source(self) -> str:
        train, *_ = self._parts
        return f"pairs: {self.pairs.origin}; {len(train):,} to train on{_left_out(train)}"

    @property
    def validation(self) -> str:
        *_, test = self._parts
        return f"{len(test):,} pairs that were not trained on{_left_out(test)}"

    def keep(self, run: RunDirectory) -> None:
        now = {
            "name": self.pairs.name,
            "source": self.pairs.origin,
            "sha256": self.pairs.sha256,
            "pairs": len(self.pairs),
            "vocab_size": self.tokenizer.vocab_size,
        }
        keep_corpus(run, now, self.tokenizer, what="pairs of sentences")

    def trained_on(self, steps: int) -> str:
        number, context = self.settings.windows["batch_size"], self.settings.data.context
        return f"{steps:,} steps of {number} pairs of sentences of at most {context} tokens"

    # --- While training ---

    @property
    def watched(self) -> str:
        number = self.settings.train.eval_batches * self.settings.windows["batch_size"]
        return f"{number} random pairs"

    def train_batches(self, step: int) -> Batch:
        number = self.settings.train.steps_per_dispatch
        steps = [self._random(self._parts[0], step + i, data.TRAINING) for i in range(number)]
        return {name: np.stack([batch[name] for batch in steps]) for name in steps[0]}

    def eval_batches(self) -> Iterator[Batch]:
        for step in range(self.settings.train.eval_batches):
            yield self._random(self._parts[1], step, data.EVALUATION)

    def _random(self, pairs: data.TokenPairs, step: int, stream: int) -> Batch:
        size = self.settings.windows["batch_size"]
        return data.random_pairs(
            pairs, seed=self.settings.seed, step=step, batch_size=size, stream=stream
        )

    # --- At the end ---

    def measure(self, graphdef: nnx.GraphDef, params: nn.Params) -> dict[str, float]:
        """Loss and accuracy of tokens, given those before; and what the model writes by itself.

        `exact_match`, and of files `bleu`, of all test pairs and by length: `translation_scores`.
        """
        *_, test = self._parts
        size = self.settings.windows["batch_size"]
        batches = data.sequential_pairs(test, batch_size=size)
        eval_step = training.make_eval_step(graphdef, self.predict)
        scores = training.mean_metrics(eval_step, params, batches)
        written = self._written(graphdef, params, test)
        bleu = self.settings.data.bleu_tokenizer if test.pairs.name == "file" else None
        return scores | score(written, test.pairs.targets, test.source_lengths - 1, bleu)

    def _written(
        self, graphdef: nnx.GraphDef, params: nn.Params, pairs: data.TokenPairs
    ) -> list[str]:
        """What the model makes of each source."""
        found: list[str] = []
        size = self.settings.windows["batch_size"]
        for batch in data.sequential_pairs(pairs, batch_size=size):
            tokens = inference.translate(
                graphdef, params, batch["sources"], batch["source_lengths"], begin=self.begin,
                end=self.end, num_tokens=pairs.targets.shape[1],
            )  # fmt: skip
            found += map(self._sentence, np.asarray(tokens))
        return found[: len(pairs)]

    def _sentence(self, tokens: np.ndarray) -> str:
        """The text of tokens up to the end."""
        ends = np.flatnonzero(tokens == self.end)
        tokens = tokens[: ends[0]] if len(ends) else tokens
        return self.tokenizer.decode(tokens[tokens < self.begin])

    def translate(
        self, graphdef: nnx.GraphDef, params: nn.Params, sentence: str, **settings: Any
    ) -> list[str]:
        """What a trained model makes of a sentence.

        Args:
          graphdef, params: the model.
          sentence: to translate.
          **settings: draws or beams, and how many translations: see `inference.translate`.

        Raises:
          ValueError: it is empty or too long, or holds what the tokenizer does not know.
        """
        _, tokens = self._translated(graphdef, params, sentence, **settings)
        return [self._sentence(row) for row in tokens]

    def _translated(
        self, graphdef: nnx.GraphDef, params: nn.Params, sentence: str, **settings: Any
    ) -> tuple[data.TokenPairs, np.ndarray]:
        """A sentence in tokens, and the tokens of its translations."""
        if not sentence.strip():
            raise ValueError("prompt: wanted a sentence to translate, got none")
        one = self._encode(data.Pairs("prompt", (sentence,), (sentence,), "the prompt"))
        tokens = inference.translate(
            graphdef, params, one.sources, one.source_lengths, begin=self.begin, end=self.end,
            num_tokens=self.settings.data.context, **settings,
        )  # fmt: skip
        return one, np.asarray(tokens)

    def describe(self, scores: dict[str, float]) -> list[str]:
        about = (
            "The model writes each token after its own (greedily); an exact match is the target to "
            "the letter."
        )
        if "bleu" in scores:
            about += f" BLEU by sacrebleu, tokenizer {self.settings.data.bleu_tokenizer}."
        return [
            "## Translations",
            "",
            *table(scores),
            "",
            f"{about} Given the target's tokens before it, a token costs {scores['loss']:.4f} nats "
            f"and the likeliest is right {scores['accuracy']:.1%} of the time. Over "
            f"{self.validation}.",
        ]

    def sample(self, graphdef: nnx.GraphDef, params: nn.Params) -> tuple[str, str]:
        *_, test = self._parts
        few = self._encode(test.pairs[:SHOWN])
        lines = []
        for source, target, said in zip(
            few.pairs.sources, few.pairs.targets, self._written(graphdef, params, few), strict=True
        ):
            right = said == target
            lines += [source, f"    {said}" if right else f"    {said}   [wanted: {target}]"]
        return "\n".join(lines), "Sentences that were not trained on, and the model's translations."

    def attention_figures(self, model: nnx.Module) -> dict[str, Figure]:
        """The alignment of a pair, a picture a layer, as in Bahdanau et al. 2014, figure 3."""
        maps, target, source = self.alignment(model)
        return {
            f"Alignment of layer {layer}": viz.heads_figure(
                weights, target, key_tokens=source, title=f"Alignment of layer {layer}"
            )
            for layer, weights in enumerate(maps, start=1)
        }

    def alignment(self, model: nnx.Module) -> tuple[np.ndarray, list[str], list[str]]:
        """Weights [L, N, T, S] for `example_pair`, and labels of targets and sources.

        Row t is what the model looks at as it is to write target token t.

        Raises:
          NotImplementedError: the model has no attention to the source.
        """
        pair = self.example_pair()
        maps = alignment_maps(model, pair.source, pair.target_in)
        return np.asarray(maps)[:, 0], pair.target_labels, pair.source_labels

    def example_pair(self) -> LabelledPair:
        """The longest pair to test on that is not too long to be read."""
        *_, test = self._parts
        both = np.maximum(test.source_lengths, test.target_lengths)
        row = int(np.argmax(np.where(both <= LONGEST_EXAMPLE, test.source_lengths, 0)))
        batch = test.batch(np.array([row]))
        S, T = test.source_lengths[row], test.target_lengths[row]
        return self._labelled(batch["sources"][:, :S], batch["targets"][:, :T])

    def translated_pair(
        self, graphdef: nnx.GraphDef, params: nn.Params, sentence: str
    ) -> LabelledPair:
        """A sentence and what a trained model makes of it; errors as in `translate`."""
        one, (tokens,) = self._translated(graphdef, params, sentence)
        length = int(np.flatnonzero(tokens == self.end)[0]) + 1 if self.end in tokens else None
        return self._labelled(one.sources[:, : one.source_lengths[0]], tokens[None, :length])

    def _labelled(self, source: np.ndarray, target: np.ndarray) -> LabelledPair:
        target_in = np.concatenate([[[self.begin]], target[:, :-1]], axis=1)
        return LabelledPair(source, target_in, *(
            self._labels(row[0]) for row in (source, target_in, target)
        ))  # fmt: skip

    def _labels(self, tokens: np.ndarray) -> list[str]:
        named = {self.begin: "begin", self.end: "end"}
        words = iter(self.tokenizer.labels(tokens[tokens < self.begin]))
        return [named[token] if token in named else next(words) for token in tokens.tolist()]

    def state_size(self, model: nnx.Module) -> int:
        train, *_ = self._parts
        if not hasattr(model, "state_size"):
            raise NotImplementedError(f"{type(model).__name__} does not say its state's size")
        return model.state_size(train.targets.shape[1], train.sources.shape[1])

    def about_data(self) -> list[str]:
        train, validation, test = self._parts
        return [
            f"- pairs: {self.pairs.origin}; {len(self.pairs):,}, sha256 `{self.pairs.sha256}`",
            f"- tokens: {self.tokenizer.name}, vocabulary {self.tokenizer.vocab_size}; "
            f"{len(train):,} pairs to train on, {len(validation):,} to validate, {len(test):,} to "
            "test",
        ]


def _left_out(pairs: data.TokenPairs) -> str:
    return f" ({pairs.left_out:,} too long ones are left out)" if pairs.left_out else ""
