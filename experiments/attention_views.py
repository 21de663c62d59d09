"""What a trained run's heads look at in a text: weights, measures and tables, for a page."""

import dataclasses
from collections.abc import Mapping, Sequence

import jax
import numpy as np
from flax import nnx

from experiments import attention_tables
from experiments.pretrained import Pretrained
from experiments.setup import TrainedRun
from experiments.tasks import LabelledPair, MaskedLM, TextTask, Translation
from qkv_jax import models, nn
from qkv_jax.data import Tokenizer
from qkv_jax.models import Decoder, EncoderDecoder, MaskedLanguageModel, measures
from qkv_jax.viz import AttentionView, PageTable


@dataclasses.dataclass(frozen=True)
class Looked:
    """What a page shows of one run."""

    views: list[AttentionView]
    tables: list[PageTable]


def of_run(trained: TrainedRun, text: str | None, *, worst: int = 0) -> Looked:
    """The attention of a trained run to a text, or to its task's own example.

    Args:
      trained: the run.
      text: to read, or to translate; None: the example that the run's report shows.
      worst: how many of the tokens that a language model predicts worst are listed.

    Raises:
      ValueError: the text cannot be read by this model, or there is no example.
      NotImplementedError: the model has no attention weights.
    """
    model, task = nn.merge(trained.graphdef, trained.params), trained.task
    if isinstance(task, Translation):
        _no_worst(str(trained.run.path), worst)
        return Looked(_translation(model, _pair(trained, text)), [])
    tokens, labels = _read(trained, text)
    decodes = isinstance(task, TextTask) and task.continues_text
    if decodes:
        return _language_model(model, tokens, labels, task.tokenizer, worst)
    _no_worst(str(trained.run.path), worst)
    if isinstance(task, MaskedLM):
        return _masked_language_model(model, tokens, labels, task.tokenizer, task.mask_id)
    return _attention_alone(task.stack(model), tokens, labels)


def of_checkpoint(pretrained: Pretrained, text: str | None, *, worst: int = 0) -> Looked:
    """The attention of a model from Hugging Face's folder to a text; arguments as in `of_run`.

    Raises:
      ValueError: there is no text, or it is longer than the model reads.
    """
    if not text:
        raise ValueError("text: wanted at least one character, got none")
    model, tokenizer = pretrained.checkpoint.model, pretrained.tokenizer
    if isinstance(model, EncoderDecoder):
        _no_worst(str(pretrained.folder), worst)
        return Looked(_translation(model, pretrained.written(text)), [])
    tokens = tokenizer.encode_framed(text)
    _check_length(len(tokens), pretrained.checkpoint.config.context)
    labels = tokenizer.labels(tokens)
    if isinstance(model, Decoder):
        return _language_model(model, tokens, labels, tokenizer, worst)
    _no_worst(str(pretrained.folder), worst)
    if isinstance(model, MaskedLanguageModel):
        return _masked_language_model(model, tokens, labels, tokenizer, pretrained.mask_id)
    return _attention_alone(model, tokens, labels)


def _language_model(
    model: Decoder, tokens: np.ndarray, labels: list[str], tokenizer: Tokenizer, worst: int
) -> Looked:
    """Attention, what it did to the loss, the lens and the worst."""
    if len(tokens) < 2:  # nothing was predicted
        return _attention_alone(model, tokens, labels)
    importance = models.head_importance(model, tokens[None], _loss(tokens))
    maps, gradients = models.attention_gradients(model, tokens[None], _loss(tokens))
    attention, mixed = _views(model, maps, tokens, labels, {"importance": importance})
    tables = [attention_tables.lens(tokenizer, model, tokens, labels)]
    if worst:
        tables.insert(0, attention_tables.worst(tokenizer, model, tokens, labels, worst))
    return Looked([attention, _influence(maps, gradients, labels), mixed], tables)


def _masked_language_model(
    model: MaskedLanguageModel,
    tokens: np.ndarray,
    labels: list[str],
    tokenizer: Tokenizer,
    mask_id: int | None,
) -> Looked:
    """Attention, and what the model says stands behind each mask token."""
    looked = _attention_alone(model.encoder, tokens, labels)
    places = np.flatnonzero(tokens == mask_id)
    if len(places):
        looked.tables.append(attention_tables.guesses(tokenizer, model, tokens, labels, places))
    return looked


def _attention_alone(stack: nnx.Module, tokens: np.ndarray, labels: list[str]) -> Looked:
    """The attention of anything whose text costs nothing."""
    maps = models.attention_maps(stack, tokens[None])
    return Looked(list(_views(stack, maps, tokens, labels, {})), [])


def _views(
    stack: nnx.Module,
    maps: jax.Array,
    tokens: np.ndarray,
    labels: list[str],
    more: Mapping[str, jax.Array],
) -> tuple[AttentionView, AttentionView]:
    """The attention, with measures and `more` of them, and its rollout."""
    found = measures_of(maps, tokens, causal=isinstance(stack, Decoder)) | dict(more)
    return (
        AttentionView("attention", maps[:, 0], labels, measures=found, **_inputs(stack, tokens)),
        AttentionView("rollout, all heads and the layers so far", measures.rollout(maps), labels),
    )


def measures_of(maps: jax.Array, tokens: np.ndarray, *, causal: bool) -> dict[str, np.ndarray]:
    """The measures of heads that weights alone tell, [L, N], by their names on the page."""
    found = {
        "entropy, nats": measures.entropy(maps),
        "mean distance, tokens": measures.mean_distance(maps),
        "to the token before": measures.previous_token(maps),
        "to the first token": measures.first_token(maps),
    }
    if causal:
        found["induction (prefix matching)"] = measures.prefix_matching(maps, tokens[None])
    return {name: np.asarray(values) for name, values in found.items()}


def _no_worst(where: str, worst: int) -> None:
    if worst:
        raise ValueError(f"worst: wanted a model that continues a text, got another in {where}")


def _check_length(length: int, context: int) -> None:
    if length > context:
        raise ValueError(
            f"text: the model reads {context} tokens at a time, this text has {length:,}; "
            "wanted a shorter one, such as its beginning by --num_tokens"
        )


def _read(trained: TrainedRun, text: str | None) -> tuple[np.ndarray, list[str]]:
    """Ids [T] of a text or of the task's example, and what they say."""
    task, context = trained.task, trained.settings.data.context
    if text is None:
        example = task.example()
        if example is None:
            raise ValueError(f"workdir: the task of {trained.run.path} has no example to look at")
        return np.asarray(example.tokens, np.int32), list(example.labels)
    if not isinstance(task, TextTask):
        raise ValueError(
            f"text: {trained.run.path} holds a model of {task.source}, which reads no text; leave "
            "it out to see the task's own example"
        )
    if not text:
        raise ValueError("text: wanted at least one character, got none")
    read = task.read(text)
    _check_length(len(read.tokens), context)
    return read.tokens, list(read.labels)


def cut(tokenizer: Tokenizer | None, text: str, num_tokens: int) -> str:
    """The beginning of a text: its first tokens, so many, where there is a tokenizer.

    Not every tokenizer decodes to what it has read: then it is the beginning that has these tokens,
    or where none has, because a character is cut, the longest with no more.
    """
    if tokenizer is None:
        return text
    wanted = tokenizer.encode(text)[:num_tokens]
    if text.startswith(beginning := tokenizer.decode(wanted)):
        return beginning
    longest = ""
    for end in range(len(text)):
        tokens = tokenizer.encode(text[:end])
        if np.array_equal(tokens, wanted):
            return text[:end]
        if len(tokens) <= num_tokens:
            longest = text[:end]
        elif len(tokens) > 2 * num_tokens + 9:  # half a [MASK] is more tokens than all of it
            break
    return longest


def _inputs(stack: nnx.Module, tokens: np.ndarray) -> dict[str, jax.Array]:
    """Queries and keys of all layers, where they have one shape."""
    try:
        q, k, _ = models.attention_inputs(stack, tokens[None])
    except (NotImplementedError, ValueError):
        return {}
    return {"q": q[:, 0], "k": k[:, 0]}


def _loss(tokens: np.ndarray):
    """Of logits [1, T, V]: the sum, in nats, of what each token costs after those before it."""

    def loss(logits: jax.Array) -> jax.Array:
        return attention_tables.costs(logits, tokens).sum()

    return loss


def _influence(maps: jax.Array, gradients: jax.Array, labels: Sequence[str]) -> AttentionView:
    """By how much the text would cost more without each weight, to first order."""
    helped = np.maximum(-np.asarray(maps * gradients), 0)[:, 0]
    largest = helped.max() or 1.0
    return AttentionView("gradient x attention: what lowered the loss", helped / largest, labels)


def _pair(trained: TrainedRun, text: str | None) -> LabelledPair:
    """A sentence and what the model makes of it; or the task's own example."""
    if text is None:
        return trained.task.example_pair()
    if not text.strip():
        raise ValueError("text: wanted a sentence to translate, got none")
    return trained.task.translated_pair(trained.graphdef, trained.params, text)


def _translation(model: nnx.Module, pair: LabelledPair) -> list[AttentionView]:
    """The decoder's attention to the source, and both stacks' to themselves where they have one."""
    maps = models.alignment_maps(model, pair.source, pair.target_in)[:, 0]
    views = [AttentionView("decoder to source", maps, pair.target_labels, pair.source_labels)]
    if isinstance(model, EncoderDecoder):
        found = models.encoder_decoder_maps(model, pair.source, pair.target_in)
        for name, labels in (("encoder", pair.source_labels), ("decoder", pair.read_labels)):
            measured = measures_of(found[name], pair.target_in[0], causal=False)
            views.append(AttentionView(name, found[name][:, 0], labels, measures=measured))
    return views
