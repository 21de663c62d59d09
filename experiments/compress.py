"""A trained language model made smaller: what that saves, and what it costs.

python -m experiments.compress --workdir=runs/char_lm --what=prune --heads=2,4,8
python -m experiments.compress --workdir=runs/char_lm --what=gqa --kv_heads=1 --steps=300
python -m experiments.compress --workdir=runs/char_lm --what=quantize --group=32

Writes compress.md, a table of size, loss and speed, to a new folder, and with it the last model of
the table, unless it is quantized, as a run that `experiments.evaluate` and `generate` read.
"""

import sys
from pathlib import Path

from absl import flags

from experiments import cli, compression, setup
from experiments.compression_table import ROUNDS, measured, table
from experiments.tasks import CausalLM
from qkv_jax.training.run_directory import versions, write_text_atomic

SAVED = "The last model of the table is a run in this folder."
KINDS = ["prune", "gqa", "quantize"]
WORKDIR = flags.DEFINE_string("workdir", "runs/char_lm", "the run whose model is compressed")
WHAT = flags.DEFINE_enum(
    "what", None, KINDS, "prune: heads; gqa: queries share keys and values; quantize: 8 and 4 bits"
)
OUT = flags.DEFINE_string("out", None, "a new folder; default: <workdir>_<what>")
HEADS = flags.DEFINE_list(
    "heads", None, "prune: how many heads of all layers go, such as 2,4,8; default: half"
)
KV_HEADS = flags.DEFINE_integer("kv_heads", 1, "gqa: key/value heads that a layer then has", 1)
STEPS = flags.DEFINE_integer("steps", 300, "gqa: steps of training after it", 1)
RATE = flags.DEFINE_float("rate", 0.5, "gqa: factor of the run's learning rates in them", 1e-6)
GROUP = flags.DEFINE_integer("group", 32, "quantize: numbers that share a scale", 1)
BATCH = flags.DEFINE_integer("batch", 1, "sequences decoded at a time, for tokens/s", 1)


def main(_) -> None:
    with cli.one_sentence():
        if WHAT.value is None:
            raise ValueError(f"what: wanted one of {KINDS}, got none")
        out = Path(OUT.value or f"{WORKDIR.value.rstrip('/')}_{WHAT.value}").absolute()
        if out.exists():
            raise ValueError(f"out: wanted a new folder, got {out}, which is there already")
        trained = setup.load_run(WORKDIR.value)
        if not isinstance(trained.task, CausalLM):
            raise ValueError(f"workdir: {WORKDIR.value} holds no language model of a text")
        found = compress(trained)
        if found.state is None:
            out.mkdir(parents=True)
        else:
            compression.save_run(out, trained, found)
    rows = measured(trained, found.models, BATCH.value)
    report = "\n".join([
        f"# {trained.settings.name}: {WHAT.value}",
        "",
        table(rows),
        "",
        f"Loss over {trained.task.validation}. Cache: what is kept of a full context of one "
        f"sequence. tokens/s: the likeliest token each time, from a cache, {BATCH.value} x "
        f"{trained.settings.data.context} tokens, the median of {ROUNDS} rounds in which the "
        f"models take turns, on {versions()['device']}.",
        "",
        found.about,
        "",
        *([] if found.state is None else [SAVED, ""]),
    ])  # fmt: skip
    write_text_atomic(out / "compress.md", report)
    print(report)
    print(out)


def compress(trained: setup.TrainedRun) -> compression.Compressed:
    """What the flags ask for.

    Raises:
      ValueError: it cannot be done to this model.
    """
    if WHAT.value == "gqa":
        return compression.grouped(trained, KV_HEADS.value, STEPS.value, RATE.value)
    if WHAT.value == "quantize":
        return compression.quantized(trained, GROUP.value)
    try:
        numbers = None if HEADS.value is None else [int(number) for number in HEADS.value]
    except ValueError:
        raise ValueError(f"heads: wanted integers, got {','.join(HEADS.value)}") from None
    return compression.pruned(trained, numbers)


if __name__ == "__main__":
    sys.exit(cli.run(main))
