"""Trains a model, from text (or what a task generates) to report.

    python -m experiments.train
    python -m experiments.train --config=configs/char_mlm.py
    python -m experiments.train --config=configs/names.py --config.train.num_steps=500
    python -m experiments.train --config.data.corpus=text_file --config.data.path=my.txt

Run it again with the same flags and it goes on where it stopped, or reprints a finished run's
result. `--config` names a Python file, which is executed: use only files that you trust.
"""

import functools
import os
import sys
import time
from pathlib import Path

import jax
import numpy as np
from absl import flags
from jax.sharding import NamedSharding, PartitionSpec

from configs import char_lm
from experiments import cli, distributed, report, setup
from qkv_jax import nn, training
from qkv_jax.ops.mesh import ROWS
from qkv_jax.training import processes, sharding
from qkv_jax.training.heartbeat import Heartbeat
from qkv_jax.training.packing import leaf_names
from qkv_jax.training.run_directory import RunDirectory, open_run
from qkv_jax.training.writers import MetricWriter, NoWriter, read_metrics

CONFIG = cli.config_flag()
flags.declare_key_flag("config")  # so that --help shows it
WORKDIR = flags.DEFINE_string("workdir", None, "the run's directory; default: runs/<config.name>")
PROFILE = flags.DEFINE_string(
    "profile", None, "steps to trace, such as 100:110; see docs/scaling.md"
)


def main(_) -> None:
    started = time.perf_counter()

    # --- What was asked: everything a user can get wrong fails here, in one sentence ---
    with cli.one_sentence():
        settings = setup.resolve(CONFIG.value)
        cli.use_cpu_devices(settings.train.cpu_devices)
        distributed.join()
        workdir = os.path.abspath(WORKDIR.value or f"runs/{settings.name}")
    with cli.together():
        mesh = setup.make_mesh(settings)
        training.profiled_steps(PROFILE.value, start=0, end=settings.train.num_steps)
        task = settings.task(settings)
        graphdef, params = setup.make_model(settings, task.vocab_size)
    with cli.one_sentence():
        distributed.check_equal(
            CONFIG.value, workdir=workdir, profile=PROFILE.value, data=task.source
        )
    with cli.together():
        run = RunDirectory(Path(workdir))
        if processes.is_first():
            run = open_run(workdir, CONFIG.value, char_lm.get_config())
            task.keep(run)
    print(task.source)
    print(f"run:  {run.path}")

    # --- Devices, optimizer, state ---
    by_row = NamedSharding(mesh, PartitionSpec(ROWS))  # [batch, ...]
    by_step_and_row = NamedSharding(mesh, PartitionSpec(None, ROWS))  # [steps, batch, ...]
    optimizer = training.make_optimizer(settings.optimizer, settings.train.num_steps)
    if mesh.size > 1:
        print(f"\n{sharding.plan(params, optimizer, mesh)}\n")
    state = sharding.placed(params, optimizer, mesh)
    loss = training.cross_entropy_loss(graphdef, task.predict)
    if settings.mesh.zigzag:
        loss = training.in_zigzag(loss, mesh.shape["context"])
    train_steps = training.make_train_steps(
        training.make_train_step(
            loss,
            optimizer,
            seed=settings.seed,
            accumulate=settings.optimizer.accumulate,
        )
    )
    eval_step = training.make_eval_step(graphdef, task.predict)
    probe = task.make_probe(graphdef)
    several = f", {processes.count()} processes" if processes.count() > 1 else ""
    device = f"{mesh.size} x {jax.devices()[0].device_kind}"
    print(f"model: {nn.count(params):,} parameters on {device}{several}")

    # --- Where it stopped last time ---
    with cli.one_sentence():
        checkpointer = training.Checkpointer(
            run.checkpoints, keep=settings.train.keep, keep_every=settings.train.keep_every
        )
        restored = checkpointer.restore(like=state)
    step, done = 0, False
    if restored is not None:
        step, state = restored
        done = step >= settings.train.num_steps or reached_goal(run, step, settings.train)
        if done and processes.gather(run.report.exists())[0]:
            print(f"finished: this run has made its {step} steps. Its report:\n")
            print(run.report.read_text(encoding="utf-8"))
            return
        print(f"resuming from step {step}")
    with cli.one_sentence():
        elapsed_before, losses = so_far(run, step)
        profiled = training.profiled_steps(PROFILE.value, start=step, end=settings.train.num_steps)
        spikes = training.LossSpikes(settings.train.spike_factor, losses)
    save_times = training.SaveTimes(
        step,
        every=(settings.train.save_every, settings.train.keep_every),
        minutes=settings.train.save_minutes,
    )
    heartbeat = Heartbeat(run.heartbeat_of(processes.index()), process=processes.index())

    # --- The loop: dispatch, then look at what the dispatch before returned ---
    schedule = training.make_schedule(
        settings.optimizer, settings.optimizer.learning_rate, settings.train.num_steps
    )
    batch_size = settings.windows["batch_size"]
    tokens_per_step = batch_size * settings.windows["context"]

    def one_batch() -> dict[str, np.ndarray]:
        return {name: array[0] for name, array in task.train_batches(step).items()}

    peak = training.peak_steps(loss, state.params, one_batch, mesh)
    speed = training.Throughput(tokens_per_step, peak)

    def elapsed() -> float:
        return elapsed_before + time.perf_counter() - started

    def saved() -> list[int]:
        """The steps of the checkpoints there are, also of the one that is being written."""
        checkpointer.wait()
        return checkpointer.steps()

    def record(first: int, count: int, metrics: training.step.Metrics) -> None:
        """Waits for some steps, refuses what is not finite, writes what is to be written."""
        metrics = {name: np.asarray(values)[:count] for name, values in metrics.items()}
        speed.count(count)
        for i in range(count):
            now = first + i + 1
            values = {name: float(array[i]) for name, array in metrics.items()}
            if not all(map(np.isfinite, values.values())):
                raise FloatingPointError(
                    f"step {now}: the loss is {values['loss']:g} and the gradient norm "
                    f"{values['grad_norm']:g}; stopped, and the checkpoints from before are kept. "
                    "A smaller learning rate or clip_norm usually helps."
                )
            if now % settings.train.log_every == 0 or now == settings.train.num_steps:
                learning_rate = float(schedule(now - 1))
                more = {"learning_rate": learning_rate, "elapsed": elapsed()} | speed.numbers()
                writer.write(now, values | more)
            spikes.see(now, values["loss"], saved)
        shown["loss"] = values["loss"]
        progress.update(first + count, **shown)
        heartbeat.beat(first + count, **shown)

    def evaluate(state: training.TrainState, now: int) -> None:
        placed = (processes.place(batch, by_row) for batch in task.eval_batches())
        means = training.mean_metrics(eval_step, state.params, placed)
        found = {f"validation_{name}": value for name, value in means.items()}
        if probe is not None:
            params = processes.whole(state.params)
            with processes.alone():
                found |= probe(params)
        writer.write(now, found | {"elapsed": elapsed()})
        shown["validation"] = means["loss"]
        progress.update(now, **shown)
        heartbeat.beat(now, **shown)
        speed.resume()

    shown: dict[str, float] = {}
    with (
        cli.one_sentence(),
        heartbeat,
        jax.set_mesh(mesh),
        checkpointer,
        make_writer(run, settings.train.wandb, None if restored is None else step) as writer,
        training.Progress(settings.train.num_steps, step, tokens_per_step) as progress,
        training.Profile(run.profile, profiled if processes.is_first() else None) as profile,
        training.StopSignal() as stop,
    ):
        heartbeat.beat(step)
        pending = None
        stopping = False
        ballot = processes.Ballot(mesh)
        while not (done or stopping):
            count = steps_to_boundary(step, settings.train, profiled)
            profile.before(step, state)
            batches = processes.place_rows(
                functools.partial(task.train_rows, step), batch_size, by_step_and_row
            )
            state, metrics = train_steps(state, batches, count)
            if pending is not None:
                record(*pending)
            pending = (step, count, metrics)
            step += count
            if said := profile.after(step, state):
                progress.print(said)
            checkpointer.check()
            done = step == settings.train.num_steps
            if done or step % settings.train.eval_every == 0:
                record(*pending)
                pending = None
                evaluate(state, step)
                done = done or reached_goal(run, step, settings.train)
            # Read once: a signal must not come after the save is skipped.
            stopping, late = ballot.cast(stop.requested, save_times.late())
            if done or stopping or late or save_times.due(step):
                if pending is not None:
                    record(*pending)
                    pending = None
                if done or stopping or not spikes.suspected:
                    check_finite(state, step)
                    checkpointer.save(step, state)
                    save_times.saved(step)
                    speed.resume()
        params = processes.whole(state.params) if done else None
        seconds = elapsed()
    processes.leave()
    if not done:
        stopped = f"stopped by {stop.name or 'a signal'}"
        heartbeat.mark(stopped)
        print(f"{stopped} after step {step}, saved; the same command goes on")
        return
    if not processes.is_first():
        heartbeat.mark("finished")
        return

    # --- What came of it ---
    heartbeat.mark("reporting")
    with cli.one_sentence(), heartbeat:
        result = report.write(run, task, graphdef, params, step, seconds)
    heartbeat.mark("finished")
    print(result)


def steps_to_boundary(
    step: int, config: setup.TrainConfig, profiled: tuple[int, int] | None
) -> int:
    """How many steps the next dispatch takes: up to the next evaluation, save, profile or end."""
    regular = config.eval_every, config.save_every, config.keep_every
    ends = [config.num_steps, *((step // every + 1) * every for every in regular if every)]
    ends += [edge for edge in profiled or () if edge > step]
    return min(config.steps_per_dispatch, min(ends) - step)


def make_writer(run: RunDirectory, wandb: bool, resume_step: int | None) -> MetricWriter | NoWriter:
    """What the metrics go to: files of the first process."""
    if not processes.is_first():
        return NoWriter()
    return MetricWriter(run, wandb=wandb, resume_step=resume_step)


def check_finite(state: training.TrainState, step: int) -> None:
    """Refuses to let a number that is not finite into a checkpoint."""
    bad = (
        name
        for name, leaf in zip(leaf_names(state), jax.tree.leaves(state), strict=True)
        if not all(np.isfinite(shard.data).all() for shard in leaf.addressable_shards)
    )
    if name := next(filter(None, processes.gather(next(bad, None))), None):
        raise FloatingPointError(
            f"step {step}: {name} is not finite; stopped without saving it, and the checkpoints "
            "from before are kept. A smaller learning rate usually helps."
        )


def reached_goal(run: RunDirectory, step: int, config: setup.TrainConfig) -> bool:
    """Whether the evaluation after this step was as good as the config wants it."""
    if config.stop_accuracy is None:
        return False
    rows = read_metrics(run.metrics) if processes.is_first() and run.metrics.exists() else []
    found = [row["validation_accuracy"] for row in rows
             if row["step"] == step and "validation_accuracy" in row]  # fmt: skip
    return processes.gather(bool(found) and found[-1] >= config.stop_accuracy)[0]


def so_far(run: RunDirectory, step: int) -> tuple[float, list[float]]:
    """The seconds that the steps so far took, in the processes before this one, and their losses.

    Of the losses, those that were written.
    """
    if step == 0 or not run.metrics.exists():
        return 0.0, []
    rows = [row for row in read_metrics(run.metrics) if row["step"] <= step]
    seconds = max((row["elapsed"] for row in rows), default=0.0)
    return seconds, [row["loss"] for row in rows if "loss" in row]


if __name__ == "__main__":
    sys.exit(cli.run(main))
