"""Text from a trained run of a causal model, or the translation of a sentence.

python -m experiments.generate --workdir=runs/char_lm --prompt="The attention " --temperature=0.8
python -m experiments.generate --workdir=runs/translate --prompt="two hundred and thirty-four"
"""

import sys

import jax
import numpy as np
from absl import flags

from experiments import cli, setup
from experiments.tasks import TextTask, Translation
from qkv_jax import inference

WORKDIR = flags.DEFINE_string("workdir", "runs/char_lm", "the run to sample from")
PROMPT = flags.DEFINE_string("prompt", "\n", "the text to continue, or to translate")
NUM_TOKENS = flags.DEFINE_integer("num_tokens", 400, "tokens to add", lower_bound=1)
NUM_SAMPLES = flags.DEFINE_integer("num_samples", 1, "continuations of the prompt", lower_bound=1)
TEMPERATURE = flags.DEFINE_float("temperature", 0.8, "divides the logits; > 0")
TOP_K = flags.DEFINE_integer("top_k", None, "keep the k likeliest tokens")
TOP_P = flags.DEFINE_float("top_p", None, "keep the likeliest tokens that reach p together")
SEED = flags.DEFINE_integer(
    "seed", 0, "the same seed gives the same text", lower_bound=0, upper_bound=2**31 - 1
)
SAMPLING = (NUM_TOKENS, NUM_SAMPLES, TEMPERATURE, TOP_K, TOP_P, SEED)


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
        prompt = task.tokenizer.encode(PROMPT.value).astype(np.int32)
        tokens = inference.generate(
            trained.graphdef,
            trained.params,
            np.tile(prompt, (NUM_SAMPLES.value, 1)),
            num_tokens=NUM_TOKENS.value,
            context=trained.settings.data.context,
            rng=jax.random.key(SEED.value),
            temperature=TEMPERATURE.value,
            top_k=TOP_K.value,
            top_p=TOP_P.value,
        )
    for i, row in enumerate(np.asarray(tokens)):
        if i:
            print("-" * 80)
        print(PROMPT.value + task.tokenizer.decode(row))


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
