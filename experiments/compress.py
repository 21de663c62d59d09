"""A trained language model made smaller: what that saves, and what it costs.

python -m experiments.compress --workdir=runs/char_lm --what=prune --heads=2,4,8 --steps=300
python -m experiments.compress --workdir=runs/char_lm --what=gates --heads=8 --steps=300
python -m experiments.compress --workdir=runs/char_lm --what=gqa --kv_heads=1 --steps=300
python -m experiments.compress --workdir=runs/char_lm --what=quantize --group=32
python -m experiments.compress --workdir=runs/char_lm --what=outliers --beside=runs/clipped
python -m experiments.compress --workdir=runs/char_lm --what=distill --student=num_heads=2

Writes compress.md, a table of size, loss and speed, to a new folder, and with it the last model of
the table, unless it is quantized, as a run that `experiments.evaluate` and `generate` read.
"""

import sys
from pathlib import Path

from absl import flags

from experiments import cli, compression, head_gates, outliers, setup, students
from experiments.compression_table import ROUNDS, measured, table
from experiments.tasks import CausalLM
from qkv_jax import training
from qkv_jax.training.run_directory import versions, write_text_atomic

SAVED = "The last model of the table, in float32, is a run in this folder."
KINDS = {
    "prune": "heads",
    "gates": "heads, by gates that learn to close",
    "gqa": "queries share keys and values",
    "distill": "smaller models that it teaches",
    "quantize": "8 and 4 bits",
    "outliers": "among activations",
}
WORKDIR = flags.DEFINE_string("workdir", "runs/char_lm", "the run whose model is compressed")
WHAT = flags.DEFINE_enum(
    "what", None, list(KINDS), "; ".join(f"{name}: {about}" for name, about in KINDS.items())
)
OUT = flags.DEFINE_string("out", None, "a new folder; default: <workdir>_<what>")
HEADS = flags.DEFINE_list(
    "heads", None, "how many heads of all layers go, such as 2,4,8; default of prune: half, of "
    "gates: those that the penalty closes",
)  # fmt: skip
PENALTY = flags.DEFINE_float("penalty", 0.1, "gates: nats of loss for a head that is open too many")
BESIDE = flags.DEFINE_list("beside", [], "outliers: runs of the same text, for the same table")
KV_HEADS = flags.DEFINE_integer("kv_heads", 1, "gqa: key/value heads that a layer then has", 1)
STEPS = flags.DEFINE_integer(
    "steps", 300, "prune, gates, gqa: steps of training after it; gates: as many before; distill: "
    "of training", 0,
)  # fmt: skip
RATE = flags.DEFINE_float("rate", 0.5, "factor of the run's learning rates in them", 1e-6)
GROUP = flags.DEFINE_integer("group", 32, "quantize: numbers that share a scale", 1)
STUDENT = flags.DEFINE_multi_string(
    "student",
    ["num_heads=2,head_dim=32"],
    "distill: fields of config.model that differ; repeatable",
)
ALPHA = flags.DEFINE_float("alpha", 0.5, "distill: weight of the teacher's answers, from 0 to 1")
TEMPERATURE = flags.DEFINE_float("temperature", 2.0, "distill: by which their logits are divided")
RELATIONS = flags.DEFINE_float("relation_weight", 0.0, "distill: of relations among tokens")
HIDDEN = flags.DEFINE_float("hidden_weight", 0.0, "distill: of hidden states")
SEEDS = flags.DEFINE_integer("seeds", 1, "distill: how many times each student is trained", 1)
BATCH = flags.DEFINE_integer("batch", 1, "sequences decoded at a time, for tokens/s", 1)


def main(_) -> None:
    with cli.one_sentence():
        if WHAT.value is None:
            raise ValueError(f"what: wanted one of {list(KINDS)}, got none")
        out = Path(OUT.value or f"{WORKDIR.value.rstrip('/')}_{WHAT.value}").absolute()
        if out.exists():
            raise ValueError(f"out: wanted a new folder, got {out}, which is there already")
        trained = language_model(WORKDIR.value)
        if WHAT.value == "outliers":
            tables = outliers.report([trained, *map(language_model, BESIDE.value)])
            out.mkdir(parents=True)
            write(out, trained, tables)
            return
        found = compress(trained)
        if found.state is None:
            out.mkdir(parents=True)
        else:
            compression.save_run(out, trained, found)
    rows = measured(trained, found.models, BATCH.value, found.caches)
    lines = [
        table(rows),
        "",
        f"Loss over {trained.task.validation}. Cache: what is kept of a full context of one "
        f"sequence. tokens/s: the likeliest token each time, from a cache, {BATCH.value} x "
        f"{trained.settings.data.context} tokens, the median of {ROUNDS} rounds in which the "
        f"models take turns, on {versions()['device']}.",
        "",
        found.about,
        *([] if found.state is None else ["", SAVED]),
    ]
    write(out, trained, "\n".join(lines))


def write(out: Path, trained: setup.TrainedRun, tables: str) -> None:
    """Writes compress.md, and prints it."""
    report = f"# {trained.settings.name}: {WHAT.value}\n\n{tables}\n"
    write_text_atomic(out / "compress.md", report)
    print(report)
    print(out)


def language_model(workdir: str) -> setup.TrainedRun:
    """A run whose model is a language model of a text.

    Raises:
      ValueError: there is none.
    """
    trained = setup.load_run(workdir)
    if not isinstance(trained.task, CausalLM):
        raise ValueError(f"workdir: {workdir} holds no language model of a text")
    return trained


def compress(trained: setup.TrainedRun) -> compression.Compressed:
    """What the flags ask for.

    Raises:
      ValueError: it cannot be done to this model.
    """
    if WHAT.value == "gqa":
        return compression.grouped(trained, KV_HEADS.value, STEPS.value, RATE.value)
    if WHAT.value == "quantize":
        return compression.quantized(trained, GROUP.value)
    if WHAT.value == "distill":
        config = training.DistillationConfig(
            ALPHA.value, TEMPERATURE.value, RELATIONS.value, hidden_weight=HIDDEN.value
        )
        return students.distilled(trained, STUDENT.value, STEPS.value, config, SEEDS.value)
    try:
        numbers = None if HEADS.value is None else [int(number) for number in HEADS.value]
    except ValueError:
        raise ValueError(f"heads: wanted integers, got {','.join(HEADS.value)}") from None
    if WHAT.value == "gates":
        return head_gates.pruned_by_gates(trained, numbers, PENALTY.value, STEPS.value, RATE.value)
    return compression.pruned(trained, numbers, STEPS.value, RATE.value)


if __name__ == "__main__":
    sys.exit(cli.run(main))
