"""Text from a trained run of a causal model, or the translation of a sentence.

python -m experiments.generate --workdir=runs/char_lm --prompt="The attention " --temperature=0.8
python -m experiments.generate --workdir=runs/char_lm --prompt="The attention " --beams=5
python -m experiments.generate --workdir=runs/char_lm --num_tokens=100 --draft=runs/small
python -m experiments.generate --workdir=runs/translate --prompt="two hundred and thirty-four"

A text is drawn. A translation takes the likeliest token each time, unless a flag about draws or
beams is set.
"""

import sys
from collections.abc import Iterator
from typing import Any

import jax
import numpy as np
from absl import flags

from experiments import cli, setup
from experiments.tasks import TextTask, Translation
from qkv_jax import inference
from qkv_jax.data import Tokenizer

WORKDIR = flags.DEFINE_string("workdir", "runs/char_lm", "the run to sample from")
PROMPT = flags.DEFINE_string("prompt", "\n", "the text to continue, or to translate")
NUM_TOKENS = flags.DEFINE_integer("num_tokens", 400, "tokens to add", lower_bound=1)
NUM_SAMPLES = flags.DEFINE_integer(
    "num_samples", 1, "continuations or translations of the prompt", lower_bound=1
)
BEAMS = flags.DEFINE_integer(
    "beams", 1, "more than 1: search with so many beams, and draw nothing", lower_bound=1
)
LENGTH_PENALTY = flags.DEFINE_float(
    "length_penalty", 1.0, "of beams: more prefers longer texts, 0 compares sums"
)
TEMPERATURE = flags.DEFINE_float("temperature", 0.8, "divides the logits; > 0")
TOP_K = flags.DEFINE_integer("top_k", None, "keep the k likeliest tokens")
TOP_P = flags.DEFINE_float("top_p", None, "keep the likeliest tokens that reach p together")
MIN_P = flags.DEFINE_float("min_p", None, "keep tokens at least p times as likely as the likeliest")
REPETITION_PENALTY = flags.DEFINE_float(
    "repetition_penalty", 1.0, "more than 1 makes tokens that came before less likely"
)
DRAFT = flags.DEFINE_string(
    "draft", None, "a smaller run of the same tokenizer, whose tokens the model only checks"
)
NUM_DRAFTED = flags.DEFINE_integer("num_drafted", 4, "tokens that it drafts at once", lower_bound=1)
STOP = flags.DEFINE_string("stop", None, "end with this text, one token of the run's tokenizer")
SEED = flags.DEFINE_integer(
    "seed", 0, "the same seed gives the same text", lower_bound=0, upper_bound=2**31 - 1
)
DRAWING = TEMPERATURE, TOP_K, TOP_P, MIN_P, REPETITION_PENALTY, SEED


def main(_) -> None:
    with cli.one_sentence():
        trained = setup.load_run(WORKDIR.value)
        task = trained.task
        if isinstance(task, Translation):
            texts = translations(task, trained)
        elif isinstance(task, TextTask) and task.continues_text:
            texts = continuations(task, trained)
        else:
            raise ValueError(
                f"workdir: {WORKDIR.value} holds a model that predicts {task.unit}s and cannot "
                "continue a text; its report.md shows what it can do"
            )
    for i, text in enumerate(texts):
        if i:
            print("-" * 80)
        print(text)


def continuations(task: TextTask, trained: setup.TrainedRun) -> list[str]:
    """The prompt and what the model adds; a single draw is printed as it comes, and not returned.

    Raises:
      ValueError: flags that do not go together, or a prompt that cannot be read.
    """
    if not PROMPT.value:
        raise ValueError("prompt: wanted at least one character, got none")
    prompt = task.tokenizer.encode(PROMPT.value).astype(np.int32)[None]
    stop = _stop(task.tokenizer)
    model = trained.graphdef, trained.params
    settings = {
        "num_tokens": NUM_TOKENS.value, "context": trained.settings.data.context, "stop": stop,
        **choice(draws=True),
    }  # fmt: skip
    number = settings.pop("num_samples")
    if NUM_DRAFTED.present and DRAFT.value is None:
        raise ValueError("num_drafted: was set, but no --draft")
    if DRAFT.value is not None:
        if "beams" in settings:
            raise ValueError("draft: was set, but a search with beams takes no drafts")
        tokens = speculated(trained, np.repeat(prompt, number, axis=0), settings)
    elif "beams" in settings:
        tokens = inference.beam_search(*model, prompt, num_results=number, **settings).tokens[0]
    elif number > 1:
        tokens = inference.generate(*model, prompt, num_samples=number, **settings)
    else:
        write(task.tokenizer, inference.stream(*model, prompt, **settings))
        return []
    texts = []
    for row in np.asarray(tokens):
        ends = np.flatnonzero(np.isin(row, stop))
        row = row[: ends[0] + 1] if len(ends) else row
        texts.append(PROMPT.value + task.tokenizer.decode(row))
    return texts


def translations(task: Translation, trained: setup.TrainedRun) -> list[str]:
    """The prompt's translations.

    Raises:
      ValueError: flags that do not go together, or a prompt that cannot be translated.
    """
    for flag, why in (
        (NUM_TOKENS, "ends by itself"), (STOP, "ends by itself"), (DRAFT, "takes no drafts"),
    ):  # fmt: skip
        if flag.present:
            raise ValueError(f"{flag.name}: was set, but a translation {why}")
    draws = any(flag.present for flag in (NUM_SAMPLES, *DRAWING))
    return task.translate(trained.graphdef, trained.params, PROMPT.value, **choice(draws))


def choice(draws: bool) -> dict[str, Any]:
    """How tokens are chosen, by the flags: by beams, by draws, or, without either, the likeliest.

    Raises:
      ValueError: flags that do not go together.
    """
    settings: dict[str, Any] = {"num_samples": NUM_SAMPLES.value}
    if BEAMS.value > 1:
        for flag in DRAWING:
            if flag.present:
                raise ValueError(f"{flag.name}: was set, but a search with beams draws nothing")
        if NUM_SAMPLES.value > BEAMS.value:
            raise ValueError(
                f"num_samples: wanted at most beams = {BEAMS.value}, got {NUM_SAMPLES.value}"
            )
        return settings | {"beams": BEAMS.value, "length_penalty": LENGTH_PENALTY.value}
    if LENGTH_PENALTY.present:
        raise ValueError("length_penalty: was set, but only a search with beams has one")
    if not draws:
        return settings
    return settings | {
        "rng": jax.random.key(SEED.value), "temperature": TEMPERATURE.value, "top_k": TOP_K.value,
        "top_p": TOP_P.value, "min_p": MIN_P.value, "repetition_penalty": REPETITION_PENALTY.value,
    }  # fmt: skip


def load_draft(trained: setup.TrainedRun) -> setup.TrainedRun:
    """The run of --draft.

    Raises:
      ValueError: it does not continue text, or not in the same tokens.
    """
    draft = setup.load_run(DRAFT.value)
    task = draft.task
    if not (isinstance(task, TextTask) and task.continues_text):
        raise ValueError(f"draft: {DRAFT.value} holds a model that cannot continue a text")
    if task.tokenizer.to_json() != trained.task.tokenizer.to_json():
        raise ValueError(
            f"draft: wanted a run with the tokenizer of {WORKDIR.value}, "
            f"but {DRAFT.value} has another one"
        )
    return draft


def speculated(
    trained: setup.TrainedRun, prompt: np.ndarray, settings: dict[str, Any]
) -> jax.Array:
    """The tokens of `inference.speculate`; what the drafts were worth goes to stderr."""
    draft = load_draft(trained)
    made = inference.speculate(
        trained.graphdef, trained.params, draft.graphdef, draft.params,
        prompt, num_drafted=NUM_DRAFTED.value, **settings,
    )  # fmt: skip
    written, passes, drafted, accepted = (int(x.sum()) for x in made[1:])
    print(
        f"draft: {accepted:,} of {drafted:,} tokens accepted, {accepted / drafted:.0%}; "
        f"{written / passes:.2f} tokens per pass of the model",
        file=sys.stderr,
    )
    return made.tokens


def write(tokenizer: Tokenizer, parts: Iterator[np.ndarray]) -> None:
    """Prints the prompt and the text of tokens [1, n] as they come."""
    print(PROMPT.value, end="", flush=True)
    tokens, printed = np.zeros(0, np.int32), 0
    for part in parts:
        tokens = np.concatenate([tokens, part[0]])
        text = tokenizer.decode(tokens)
        # The bytes of a character may come in two parts.
        whole = len(text) if not text.endswith("\ufffd") else max(printed, len(text) - 3)
        print(text[printed:whole], end="", flush=True)
        printed = whole
    print(tokenizer.decode(tokens)[printed:])


def _stop(tokenizer: Tokenizer) -> tuple[int, ...]:
    if STOP.value is None:
        return ()
    ids = tokenizer.encode(STOP.value)
    if len(ids) != 1:
        raise ValueError(f"stop: wanted a text of one token, got {STOP.value!r}, of {len(ids)}")
    return (int(ids[0]),)


if __name__ == "__main__":
    sys.exit(cli.run(main))
