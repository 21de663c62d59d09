"""Smaller models that learn a run's text, with its model as their teacher and alone."""

import ast
import copy
import dataclasses
import functools
import re
import statistics
import time
from collections.abc import Callable, Sequence

import jax
from flax import nnx

from configs import char_lm
from experiments.compression import Compressed, trained_on, untrained
from experiments.setup import Settings, TrainedRun, make_model, resolve
from qkv_jax import nn, training
from qkv_jax.inference import quantize
from qkv_jax.models import Decoder
from qkv_jax.training.run_directory import read_config

Lesson = tuple[Decoder, training.DistillationConfig]  # the teacher, and what is learnt from it
MakeLoss = Callable[[nnx.GraphDef], training.Loss]
Losses = dict[str, list[tuple[float, float]]]  # student -> (alone, taught) of each seed


def distilled(
    trained: TrainedRun,
    students: Sequence[str],
    num_steps: int,
    config: training.DistillationConfig,
    num_seeds: int = 1,
) -> Compressed:
    """Students of the run's model, each trained alone and taught, then quantized.

    Both begin with the same parameters and see the same batches. The last student, taught, is what
    can be kept.

    Args:
      trained: the run, whose model is the teacher.
      students: what each has that the teacher has not, as for `student_settings`.
      num_steps: of training, of each.
      config: what is learnt from the teacher.
      num_seeds: how many times, with the run's seed, the next one and so on; the models returned
        are those of the first.

    Raises:
      ValueError: a student is no model, cannot learn so or be quantized, or is there twice.
    """
    if num_steps < 1:
        raise ValueError(f"steps: wanted at least 1, of each student's training, got {num_steps}")
    if len(set(students)) < len(students):
        raise ValueError(f"student: wanted different ones, got {list(students)}")
    wanted = {name: student_settings(trained, name) for name in students}
    teacher = nn.merge(trained.graphdef, trained.params)
    for settings in wanted.values():
        _check(_as_run_of(trained, settings, trained.settings.seed), (teacher, config))
    models = _with_fewer_bits("the teacher", teacher)
    losses: Losses = {name: [] for name in students}
    for seed in range(num_seeds):
        for name, settings in wanted.items():
            run = _as_run_of(trained, settings, trained.settings.seed + seed)
            alone = _trained(run, f"{name}, alone", num_steps, None)
            taught = _trained(run, f"{name}, taught", num_steps, (teacher, config))
            losses[name].append((alone[1], taught[1]))
            if seed == 0:
                models |= _with_fewer_bits(f"{name}, alone", alone[0])
                models |= _with_fewer_bits(f"{name}, taught", taught[0])
                last = dataclasses.replace(run, step=num_steps), taught[0]
    return Compressed(models, _about(trained, num_steps, config, losses), untrained(*last))


def student_settings(trained: TrainedRun, student: str) -> Settings:
    """The settings of a run whose model differs from the trained one's.

    Args:
      trained: the run.
      student: fields of `config.model` and their values, such as "num_heads=2,head_dim=16".

    Raises:
      ValueError: it is not written so, there is no such field, or the values make no model.
    """
    config = read_config(trained.run, char_lm.get_config())
    # A comma within a value, as of mixer=gated_delta,attention, is not before a name.
    for part in re.split(r",(?=\w+=)", student):
        name, equals, value = part.partition("=")
        if not equals or name not in config.model:
            raise ValueError(
                "student: wanted fields of config.model and their values, such as "
                f"num_heads=2,head_dim=16, got {student!r}"
            )
        try:
            config.model[name] = _value(value)
        except TypeError as error:
            raise ValueError(f"student: config.model.{name}: {error}") from None
    return resolve(config)


def _value(text: str) -> object:
    try:
        return ast.literal_eval(text)
    except (SyntaxError, ValueError):
        return text


def _as_run_of(trained: TrainedRun, settings: Settings, seed: int) -> TrainedRun:
    """The run with a new model of these settings before its first step, on the same text."""
    settings = dataclasses.replace(settings, seed=seed)
    task = copy.copy(trained.task)
    task.settings, task.text = settings, trained.task.text  # which is read once
    graphdef, params = make_model(settings, task.vocab_size)
    return TrainedRun(trained.run, settings, task, graphdef, params, step=0)


def _learner(run: TrainedRun, lesson: Lesson | None) -> tuple[nnx.Module, MakeLoss | None]:
    """What is trained, the run's model or what holds it, and its loss; None: cross entropy."""
    model = nn.merge(run.graphdef, run.params)
    if lesson is None:
        return model, None
    teacher, config = lesson
    make_loss = functools.partial(training.distillation_loss, teacher=teacher, config=config)
    if config.hidden_weight == 0:
        return model, make_loss
    rngs = nnx.Rngs(run.settings.seed)
    return training.Student(model, teacher.config.width, rngs=rngs), make_loss


def _check(run: TrainedRun, lesson: Lesson) -> None:
    """Raises what would otherwise be raised after a student has been trained alone."""
    quantize(nn.merge(run.graphdef, run.params))
    learner, make_loss = _learner(run, lesson)
    graphdef, params = nn.split(learner)
    batch = {name: batches[0] for name, batches in run.task.train_batches(0).items()}
    try:
        jax.eval_shape(make_loss(graphdef), params, batch, None)
    except NotImplementedError as error:
        raise ValueError(f"student: {error}") from error


def _trained(
    run: TrainedRun, name: str, num_steps: int, lesson: Lesson | None
) -> tuple[Decoder, float]:
    """The run's model after so many steps, and its loss over the validation text, printed too."""
    started = time.perf_counter()
    learner, make_loss = _learner(run, lesson)
    learner, _ = trained_on(run, learner, num_steps, 1.0, make_loss)
    model = learner.model if isinstance(learner, training.Student) else learner
    loss = run.task.measure(*nn.split(model))["loss"]
    seconds = time.perf_counter() - started
    seed = run.settings.seed
    print(f"{name}, seed {seed}: {loss:.4f} nats per token, {seconds:.0f} s", flush=True)
    return model, loss


def _with_fewer_bits(name: str, model: Decoder) -> dict[str, Decoder]:
    return {
        name: model,
        f"{name}, int8": quantize(model),
        f"{name}, int4": quantize(model, "int4"),
    }


def _about(
    trained: TrainedRun,
    num_steps: int,
    config: training.DistillationConfig,
    losses: Losses,
) -> str:
    seeds = range(trained.settings.seed, trained.settings.seed + len(next(iter(losses.values()))))
    lines = ["| student | alone | taught | difference, by seed |", "|---|---:|---:|---|"]
    for name, pairs in losses.items():
        alone, taught = (statistics.mean(side) for side in zip(*pairs, strict=True))
        differences = ", ".join(f"{taught - alone:+.4f}" for alone, taught in pairs)
        lines.append(f"| {name} | {alone:.4f} | {taught:.4f} | {differences} |")
    weights = ", ".join(
        f"{field.name} {getattr(config, field.name):g}" for field in dataclasses.fields(config)
    )
    return "\n".join([
        f"Each student learnt from {trained.task.trained_on(num_steps)}, alone and, from the same "
        "parameters and windows, taught by the run's model (Hinton et al. 2015, "
        f"arxiv.org/abs/1503.02531): {weights}. Quantized: a scale for each column. The last "
        "student, taught, is what is kept.",
        "",
        f"Nats per token in float32, the mean of seeds {', '.join(map(str, seeds))}:",
        "",
        *lines,
    ])  # fmt: skip
