"""Text from a trained run of a causal model, or the translation of a sentence.

python -m experiments.generate --workdir=runs/char_lm --prompt="The attention " --temperature=0.8
python -m experiments.generate --workdir=runs/char_lm --num_tokens=100 --draft=runs/small
python -m experiments.generate --workdir=runs/translate --prompt="two hundred and thirty-four"
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
NUM_SAMPLES = flags.DEFINE_integer("num_samples", 1, "continuations of the prompt", lower_bound=1)
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
SAMPLING = (
    NUM_TOKENS, NUM_SAMPLES, TEMPERATURE, TOP_K, TOP_P, MIN_P, REPETITION_PENALTY, STOP, SEED,
    DRAFT, NUM_DRAFTED,
)  # fmt: skip


def main(_) -> None:
    with cli.one_sentence():
        trained = setup.load_run(WORKDIR.value)
        task = trained.task
        if isinstance(task, Translation):
            print(translation(task, trained))
            return
        if not (isinstance(task, TextTask) and task.continues_text):
            raise ValueError(
                f"workdir: {WORKDIR.value} holds a model that predicts {task.unit}s and cannot "
                "continue a text; its report.md shows what it can do"
            )
        if not PROMPT.value:
            raise ValueError("prompt: wanted at least one character, got none")
        prompt = task.tokenizer.encode(PROMPT.value).astype(np.int32)[None]
        settings = {
            "num_tokens": NUM_TOKENS.value, "context": trained.settings.data.context,
            "rng": jax.random.key(SEED.value), "temperature": TEMPERATURE.value,
            "top_k": TOP_K.value, "top_p": TOP_P.value, "min_p": MIN_P.value,
            "repetition_penalty": REPETITION_PENALTY.value, "stop": _stop(task.tokenizer),
        }  # fmt: skip
        model = trained.graphdef, trained.params
        if NUM_DRAFTED.present and DRAFT.value is None:
            raise ValueError("num_drafted: was set, but no --draft")
        if DRAFT.value is not None:
            tokens = speculated(trained, prompt, settings)
        elif NUM_SAMPLES.value == 1:
            write(task.tokenizer, inference.stream(*model, prompt, **settings))
            return
        else:
            tokens = inference.generate(*model, prompt, num_samples=NUM_SAMPLES.value, **settings)
    for i, row in enumerate(np.asarray(tokens)):
        if i:
            print("-" * 80)
        ends = np.flatnonzero(np.isin(row, settings["stop"]))
        print(PROMPT.value + task.tokenizer.decode(row[: ends[0] + 1] if len(ends) else row))


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
        np.repeat(prompt, NUM_SAMPLES.value, axis=0), num_drafted=NUM_DRAFTED.value, **settings,
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


def translation(task: Translation, trained: setup.TrainedRun) -> str:
    """The prompt's translation: the likeliest token each time.

    Raises:
      ValueError: a flag about drawing tokens was set, or the prompt cannot be translated.
    """
    for flag in SAMPLING:
        if flag.present:
            raise ValueError(
                f"{flag.name}: was set, but a translation takes the likeliest token each time"
            )
    return task.translate(trained.graphdef, trained.params, PROMPT.value)


if __name__ == "__main__":
    sys.exit(cli.run(main))
