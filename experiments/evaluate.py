"""How well a trained run does on its validation data, or a language model on any text.

A model of masked tokens is evaluated on the same hidden tokens each time.

python -m experiments.evaluate --workdir=runs/char_lm
python -m experiments.evaluate --workdir=runs/char_lm --text=other.txt
python -m experiments.evaluate --checkpoint=openai-community/gpt2 --text=other.txt
python -m experiments.evaluate --checkpoint=google-bert/bert-base-uncased --text=other.txt

A checkpoint is a folder of Hugging Face's, or `owner/name` on its hub, with a decoder or a BERT:
`text_loss` says what is measured.
"""

import sys
from pathlib import Path

from absl import flags

from experiments import cli, setup, text_loss
from experiments.pretrained import Pretrained
from experiments.tasks import TextTask
from qkv_jax.data.files import read_text

WORKDIR = flags.DEFINE_string("workdir", "runs/char_lm", "the run to evaluate")
CHECKPOINT = flags.DEFINE_string(
    "checkpoint", None, "instead of a run: a folder of Hugging Face's, or owner/name on its hub"
)
TEXT = flags.DEFINE_string("text", None, "a language model: evaluate on all of this file instead")
BATCH_SIZE = flags.DEFINE_integer("batch_size", 4, "windows of a checkpoint at a time", 1)


def main(_) -> None:
    with cli.one_sentence():
        if CHECKPOINT.value is not None:
            print(of_checkpoint())
            return
        trained = setup.load_run(WORKDIR.value)
        task = trained.task
        task.keep(trained.run)  # the text may have changed since the training
        if TEXT.value is not None:
            if not isinstance(task, TextTask):
                raise ValueError(f"text: {WORKDIR.value} holds a model of {task.source}")
            task.validate_on(TEXT.value)
    scores = task.measure(trained.graphdef, trained.params)
    print(f"step {trained.step}, on {task.validation}\n")
    print("\n".join(task.describe(scores)))


def of_checkpoint() -> str:
    """The perplexity of a checkpoint's language model on a text, in a few lines.

    Raises:
      ValueError: there is no text, or a run was named too.
    """
    if WORKDIR.present:
        raise ValueError("checkpoint: wanted either a checkpoint or a run, got both")
    if TEXT.value is None:
        raise ValueError("text: wanted a file on which to evaluate the checkpoint, got none")
    pretrained = Pretrained.load(CHECKPOINT.value)
    text = read_text(Path(TEXT.value), what="the text")
    return text_loss.describe(pretrained, text, name=TEXT.value, batch_size=BATCH_SIZE.value)


if __name__ == "__main__":
    sys.exit(cli.run(main))
