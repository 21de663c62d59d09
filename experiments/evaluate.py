"""How well a trained run does on its validation data, or a language model on any text.

A model of masked tokens is evaluated on the same hidden tokens each time.

python -m experiments.evaluate --workdir=runs/char_lm
python -m experiments.evaluate --workdir=runs/char_lm --text=other.txt
"""

import sys

from absl import flags

from experiments import cli, setup
from experiments.tasks import TextTask

WORKDIR = flags.DEFINE_string("workdir", "runs/char_lm", "the run to evaluate")
TEXT = flags.DEFINE_string("text", None, "a language model: evaluate on all of this file instead")


def main(_) -> None:
    with cli.one_sentence():
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


if __name__ == "__main__":
    sys.exit(cli.run(main))
