"""What a text costs a checkpoint's language model: all of its tokens, or those that are hidden.

A decoder's windows overlap by half, so that every token but the first window's has at least half a
context before it. The windows of a model of masked tokens lie side by side, each between what the
tokenizer puts around a text, and 15 % of each are hidden by the mask token, as BERT's authors did
(Devlin et al. 2018, https://arxiv.org/abs/1810.04805), but for their 10 % replaced and 10 % kept.
"""

import math
from collections.abc import Iterable, Iterator

import numpy as np

from experiments.pretrained import Pretrained
from qkv_jax import data, training
from qkv_jax.data.batches import Batch
from qkv_jax.models import Decoder, MaskedLanguageModel

MASK_RATE = 0.15


def describe(pretrained: Pretrained, text: str, *, name: str, batch_size: int) -> str:
    """The loss over a text, in a few lines of Markdown.

    Args:
      pretrained: a decoder, or a model of masked tokens.
      text: all of which is read.
      name: of the text.
      batch_size: windows at a time.

    Raises:
      ValueError: the text is too short, or the model is another.
    """
    checkpoint, tokens = pretrained.checkpoint, pretrained.tokenizer.encode(text)
    model, kind = checkpoint.architecture.model, checkpoint.architecture.model_type
    if model not in WAYS:
        raise ValueError(f"checkpoint: wanted a language model, got a {kind}")
    windows_of, unit, how = WAYS[model]
    windows = list(windows_of(pretrained, tokens, batch_size))
    step = training.make_eval_step(checkpoint.graphdef)
    scores = training.mean_metrics(step, checkpoint.params, windows)
    loss, count = scores["loss"], sum(batch["weights"].sum() for batch in windows)
    columns = {f"nats per {unit}": f"{loss:.4f}", f"perplexity per {unit}": f"{math.exp(loss):.3f}"}
    if model is Decoder:  # the others' losses do not add up to a text's
        bits = data.bits_per_character(loss, len(tokens) - 1, len(text))
        columns["bits per character"] = f"{bits:.4f}"
    columns |= {"accuracy": f"{scores['accuracy']:.4f}", f"{unit}s": f"{count:,.0f}"}
    context = windows[0]["inputs"].shape[1]
    return "\n".join([
        f"{kind}, on {name}: {len(tokens):,} tokens, in windows of {context:,} {how}", "",
        f"| {' | '.join(columns)} |",
        "|" + "---:|" * len(columns),
        f"| {' | '.join(columns.values())} |",
    ])  # fmt: skip


def decoder_windows(pretrained: Pretrained, tokens: np.ndarray, batch_size: int) -> Iterable[Batch]:
    """Batches in which every token but the first is a target once."""
    context = min(pretrained.checkpoint.config.context, max(len(tokens) - 1, 1))
    return data.sequential_windows(
        tokens, batch_size=batch_size, context=context, stride=-(-context // 2)
    )


def masked_windows(pretrained: Pretrained, tokens: np.ndarray, batch_size: int) -> Iterator[Batch]:
    """Batches of framed windows, in which 15 % of the text's tokens are hidden: the same each time.

    Raises:
      ValueError: there are no tokens, or no mask token.
    """
    tokenizer, config = pretrained.tokenizer, pretrained.checkpoint.config
    if pretrained.mask_id is None:
        raise ValueError(f"checkpoint: the tokenizer in {pretrained.folder} has no mask token")
    frame = tokenizer.encode_framed("")
    windows = data.sequential_masked_windows(
        tokens,
        batch_size=batch_size,
        context=config.context - len(frame),
        mask_id=tokenizer.vocab_size,  # the mask token's own stands among the others
        mask_rate=MASK_RATE,
    )
    for batch in windows:
        chosen = batch["weights"] == 1
        hidden = np.where(chosen, pretrained.mask_id, batch["targets"])
        yield {
            "inputs": _framed(hidden, frame),
            "targets": _framed(batch["targets"], frame),
            "weights": _framed(batch["weights"], np.zeros_like(frame)),
        }


def _framed(rows: np.ndarray, frame: np.ndarray) -> np.ndarray:
    """Rows [B, T], each after the first of the frame's ids and before the others."""
    edges = np.broadcast_to(frame.astype(rows.dtype), (len(rows), len(frame)))
    return np.concatenate([edges[:, :1], rows, edges[:, 1:]], axis=1)


# A model -> its batches, what is guessed, and what the windows are like.
WAYS = {
    Decoder: (decoder_windows, "token", "that overlap by half"),
    MaskedLanguageModel: (masked_windows, "hidden token", f"with {MASK_RATE:.0%} of them hidden"),
}
