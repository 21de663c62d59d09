"""What these tests share: the scripts as a person starts them, on a tiny model and a tiny text."""

import functools
import json
import os
import random
import subprocess
import sys
import time
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path

from qkv_jax.training import load_checkpoint
from qkv_jax.training.writers import read_metrics

ROOT = Path(__file__).parents[2]
WORDS = "the cat sat on a mat and looked at its own tail until a dog came by"

# Everything that a test counts on: the defaults are free to become better.
TINY = (
    "data.corpus=text_file",
    "data.tokenizer=char",
    "data.validation_fraction=0.1",
    "data.context=16",
    "model.num_layers=1",
    "model.width=16",
    "model.num_heads=2",
    "model.activation=relu_squared",
    "model.norm=rms",
    "model.position=rotary",
    "model.qk_norm=True",
    "model.use_bias=False",
    "model.tie_embeddings=False",
    "model.zero_init_outputs=True",
    "model.logit_softcap=15.0",
    "model.dropout_rate=0.1",  # so that the random numbers must resume too
    "optimizer.name=adamw",
    "optimizer.learning_rate=3e-3",
    "optimizer.schedule=linear",
    "optimizer.warmup_steps=20",
    "optimizer.b2=0.95",
    "optimizer.clip_norm=1.0",
    "train.num_steps=20",
    "train.batch_size=4",
    "train.eval_every=7",
    "train.eval_batches=2",
    "train.save_every=5",
    "train.keep=2",
    "train.log_every=2",
    "train.steps_per_dispatch=3",
    "train.cpu_devices=2",
    "train.compute_dtype=float32",
    "train.remat=False",
    "train.sample_tokens=23",
)
LOGGED = [2, 4, 6, 8, 10, 12, 14, 16, 18, 20]
EVALUATED = [7, 14, 20]

# A training step of this model takes a millisecond: too short to send a signal in.
SLOWLY = """
import time
from qkv_jax.training import Checkpointer
check = Checkpointer.check
Checkpointer.check = lambda self: (time.sleep(0.15), check(self))  # once a dispatch
"""


@dataclass(frozen=True)
class Scripts:
    """Runs `python -m experiments.<script>`; equal programs are compiled once for all tests."""

    folder: Path

    @property
    def corpus(self) -> Path:
        return self.folder / "corpus.txt"

    def write_corpus(self) -> None:
        choose = random.Random(0).choice
        self.corpus.write_text(" ".join(choose(WORDS.split()) for _ in range(701)) + ".\n")

    def start(self, script: str, *flags: str, patch: str = "") -> subprocess.Popen:
        """The script's process; `patch` is Python that runs before it."""
        module = f"experiments.{script}"
        run = f"import runpy\nrunpy.run_module({module!r}, run_name='__main__', alter_sys=True)"
        what = ["-c", patch + run] if patch else ["-m", module]
        return subprocess.Popen(
            [sys.executable, *what, *flags],
            cwd=ROOT,
            env=self.environment(),
            stdout=subprocess.PIPE,
            stderr=subprocess.PIPE,
            text=True,
            encoding="utf-8",
        )

    def environment(self) -> dict[str, str]:
        environment = os.environ | {
            "JAX_PLATFORMS": "cpu",
            "JAX_COMPILATION_CACHE_DIR": str(self.folder / "compiled"),
            "JAX_PERSISTENT_CACHE_MIN_COMPILE_TIME_SECS": "0",
        }
        environment.pop("JAX_NUM_CPU_DEVICES", None)
        return environment

    @functools.cached_property
    def forks(self) -> subprocess.Popen:
        return subprocess.Popen(
            [sys.executable, "-m", "tests.experiments.forks"],
            cwd=ROOT,
            env=self.environment(),
            stdin=subprocess.PIPE,
            stdout=subprocess.PIPE,
            text=True,
            encoding="utf-8",
        )

    def close(self) -> None:
        if "forks" in vars(self):
            self.forks.communicate()

    def run(self, script: str, *flags: str) -> subprocess.CompletedProcess:
        """What `start` would end as, sooner: in a fork of a process that has imported most."""
        out, err = self.folder / "out.txt", self.folder / "err.txt"
        asked = {"name": script, "flags": flags, "out": str(out), "err": str(err)}
        self.forks.stdin.write(json.dumps(asked | {"environment": self.environment()}) + "\n")
        self.forks.stdin.flush()
        status = int(self.forks.stdout.readline())
        written = (path.read_text(encoding="utf-8") for path in (out, err))
        return subprocess.CompletedProcess([script, *flags], status, *written)

    def training(self, workdir: Path, *fields: str) -> list[str]:
        """Flags that train the tiny model; `fields`, such as `train.num_steps=26`, override it."""
        settings = (f"data.path={self.corpus}", *TINY, *fields)
        return [f"--workdir={workdir}", *(f"--config.{setting}" for setting in settings)]

    def start_training(self, workdir: Path, *fields: str, patch: str = "") -> subprocess.Popen:
        return self.start("train", *self.training(workdir, *fields), patch=patch)

    def train(self, workdir: Path, *fields: str) -> subprocess.CompletedProcess:
        return self.run("train", *self.training(workdir, *fields))


def finish(process: subprocess.Popen) -> subprocess.CompletedProcess:
    try:
        out, err = process.communicate(timeout=600)
    finally:
        process.kill()
        process.wait()
    return subprocess.CompletedProcess(process.args, process.returncode, out, err)


def wait_until(condition: Callable[[], bool], process: subprocess.Popen) -> None:
    """Returns as soon as the condition holds, while the process still runs."""
    while not condition():
        assert process.poll() is None, process.communicate()[1]
        time.sleep(0.001)


def has_logged(workdir: Path, step: int) -> bool:
    metrics = workdir / "metrics.jsonl"
    return metrics.exists() and any(row["step"] >= step for row in read_metrics(metrics))


def is_saving(workdir: Path, step: int) -> bool:
    begun = workdir.glob("checkpoints/*.orbax-checkpoint-tmp*")
    return any(int(path.name.partition(".")[0]) >= step for path in begun)


def heartbeat(workdir: Path) -> dict:
    return json.loads((workdir / "heartbeat.json").read_text())


def saved_steps(workdir: Path) -> list[int]:
    return sorted(int(path.name) for path in workdir.glob("checkpoints/*") if path.name.isdigit())


def numbers(workdir: Path) -> list[dict]:
    """The metrics, without how long it took."""
    rows, times = read_metrics(workdir / "metrics.jsonl"), ("elapsed", "tokens_per_second")
    return [{name: row[name] for name in row if name not in times} for row in rows]


def files_of(workdir: Path) -> dict[str, bytes]:
    """The files by name, without that which says what last computed: an edit here changes it."""
    found = (path for path in workdir.rglob("*") if path.is_file())
    files = {str(path.relative_to(workdir)): path.read_bytes() for path in found}
    return {name: content for name, content in files.items() if name != "versions.json"}


def messages(done: subprocess.CompletedProcess) -> list[str]:
    """The lines on the standard error, without what an edit or commit between two runs causes."""
    return [line for line in done.stderr.splitlines() if "with other versions" not in line]


def assert_same_run(actual: Path, expected: Path) -> None:
    """Parameters, optimizer state and metrics equal to the bit; so is what the model writes."""
    step, leaves = load_checkpoint(actual / "checkpoints")
    expected_step, expected_leaves = load_checkpoint(expected / "checkpoints")
    assert step == expected_step
    assert list(leaves) == list(expected_leaves)
    for name, leaf in leaves.items():
        assert leaf.tobytes() == expected_leaves[name].tobytes(), name
    assert numbers(actual) == numbers(expected)
    assert (actual / "sample.txt").read_text() == (expected / "sample.txt").read_text()


def assert_one_sentence(done: subprocess.CompletedProcess, *words: str) -> None:
    """The script ended as for a user's mistake: one line that holds the words, no traceback."""
    assert done.returncode == 2, done.stdout + done.stderr
    lines = messages(done)
    assert len(lines) == 1 and lines[0].startswith("error: "), done.stderr
    assert all(word in lines[0] for word in words), done.stderr
