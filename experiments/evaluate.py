"""The loss of a trained run over its full validation text, or over any text.

A model of masked tokens is evaluated on the same hidden tokens each time.

python -m experiments.evaluate --workdir=runs/char_lm
python -m experiments.evaluate --workdir=runs/char_lm --text=other.txt
"""

import sys

from absl import flags

from experiments import cli, report, setup
from qkv_jax import data, training

WORKDIR = flags.DEFINE_string("workdir", "runs/char_lm", "the run to evaluate")
TEXT = flags.DEFINE_string("text", None, "evaluate on all of this file instead")


def main(_) -> None:
    with cli.one_sentence():
        trained = setup.load_run(WORKDIR.value)
        text = setup.load_text(trained.settings.data, trained.tokenizer)
        setup.keep_text(trained.run, text)  # the text may have changed since the training
        if TEXT.value is not None:
            other = data.text_file(TEXT.value)
            tokens = data.pack_tokens(
                trained.tokenizer.encode(other.text), trained.tokenizer.vocab_size
            )
            if len(tokens) < 2:
                raise ValueError(f"text: {TEXT.value} has {len(tokens)} token; wanted at least 2")
            text = setup.Text(other, trained.tokenizer, text.train, tokens)
    scores = report.evaluate(
        trained.settings, text, trained.params, training.make_eval_step(trained.graphdef)
    )
    what = "all of" if TEXT.value is not None else "the validation part of"
    print(f"step {trained.step}, on {what} {text.corpus.source}: {len(text.validation):,} tokens\n")
    print(report.scores_table(trained.settings, scores, text))
    print(f"\n{trained.settings.task.about_loss}")


if __name__ == "__main__":
    sys.exit(cli.run(main))
