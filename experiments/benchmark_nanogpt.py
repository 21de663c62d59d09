"""nanoGPT as a peer: a checkout of karpathy/nanoGPT, which is copied, and never changed."""

import contextlib
import importlib.util
import json
import os
import re
import shutil
import statistics
import subprocess
import sys
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
from absl import flags
from safetensors.numpy import save_file

from experiments import cli
from qkv_jax import interop

NANOGPT = flags.DEFINE_string("nanogpt", None, "a checkout of karpathy/nanoGPT to run beside")
NANOGPT_PYTHON = flags.DEFINE_string("nanogpt_python", sys.executable, "a Python with PyTorch")

SETTING = [
    "config/train_shakespeare_char.py", "--device=cpu", "--compile=False", "--eval_iters=20",
    "--block_size=64", "--batch_size=12", "--n_layer=4", "--n_head=4", "--n_embd=128",
    "--lr_decay_iters=2000", "--dropout=0.0", "--log_interval=1",
]  # fmt: skip
# Runs with nanoGPT's own model.py, in its Python: the loss over the whole validation text.
FULL_LOSS = """
import numpy as np, torch
from model import GPT, GPTConfig
saved = torch.load("out-shakespeare-char/ckpt.pt", map_location="cpu", weights_only=False)
model = GPT(GPTConfig(**saved["model_args"]))
model.load_state_dict(saved["model"])
model.eval()
tokens = torch.from_numpy(np.fromfile("data/shakespeare_char/val.bin", np.uint16).astype(np.int64))
total, T = 0.0, saved["model_args"]["block_size"]
with torch.no_grad():
    for i in range(0, len(tokens) - 1, T):
        y = tokens[i + 1 : i + T + 1][None]
        total += model(tokens[i : i + y.shape[1]][None], y)[1].item() * y.shape[1]
print("full", total / (len(tokens) - 1))
"""


def prepare(folder: Path, text: Path) -> Path:
    """A copy of the checkout with the text in its own binary form."""
    checkout = folder / "nanogpt"
    shutil.copytree(NANOGPT.value, checkout, ignore=shutil.ignore_patterns(".git", "out*"))
    shutil.copyfile(text, checkout / "data/shakespeare_char/input.txt")
    _run(checkout, [NANOGPT_PYTHON.value, "data/shakespeare_char/prepare.py"])
    return checkout


def train(checkout: Path, steps: int) -> tuple[str, float]:
    """Runs nanoGPT's `train.py`; returns what it printed and its seconds."""
    command = [NANOGPT_PYTHON.value, "train.py", *SETTING, f"--max_iters={steps}"]
    print("$", " ".join(command[1:]), flush=True)
    started = time.perf_counter()
    output = _run(checkout, command)
    return output, time.perf_counter() - started


def ms_per_step(output: str) -> float:
    """The median time of an iteration without an evaluation; the first ten warm up."""
    times = re.findall(r"^iter (\d+): .* time ([\d.]+)ms", output, re.M)
    return statistics.median(float(ms) for i, ms in times if int(i) > 10 and int(i) % 250)


def full_loss(checkout: Path) -> float:
    """The trained model's loss over the whole validation text."""
    return float(_run(checkout, [NANOGPT_PYTHON.value, "-c", FULL_LOSS]).split()[-1])


def _run(checkout: Path, command: list[str]) -> str:
    environment = {k: v for k, v in os.environ.items() if k != "PYTHONPATH"}
    done = subprocess.run(command, cwd=checkout, env=environment, capture_output=True, text=True)
    if done.returncode:
        cli.fail(f"nanoGPT's {command[1]} failed: {done.stderr.strip().splitlines()[-1]}")
    return done.stdout


def small_model(folder: Path) -> tuple[Any, interop.Checkpoint]:
    """Its model of Shakespeare's characters on a CPU, drawn at random, and the same as ours.

    Args:
      folder: an empty one, through which the parameters go.

    Raises:
      ImportError: there is no PyTorch.
    """
    import torch

    source = Path(NANOGPT.value) / "model.py"
    spec = importlib.util.spec_from_file_location("nanogpt_model", source)
    module = importlib.util.module_from_spec(spec)
    sys.modules[spec.name] = module  # where its dataclasses look for themselves
    with contextlib.redirect_stdout(None):
        spec.loader.exec_module(module)
        torch.manual_seed(0)
        size = {"n_layer": 4, "n_head": 4, "n_embd": 128, "vocab_size": 65}
        theirs = module.GPT(module.GPTConfig(block_size=64, dropout=0.0, **size)).eval()
    tensors = {name: x.numpy() for name, x in theirs.state_dict().items()}
    del tensors["lm_head.weight"]  # is the embedding
    dense = re.compile(r"\.(c_attn|c_proj|c_fc)\.weight$")  # GPT-2's files have them transposed
    turned = {k: np.ascontiguousarray(x.T) if dense.search(k) else x for k, x in tensors.items()}
    save_file(turned, folder / "model.safetensors")
    config = {
        "model_type": "gpt2", "n_positions": 64, "activation_function": "gelu",
        "bos_token_id": 0, "eos_token_id": 0, **size,
    }  # fmt: skip
    (folder / "config.json").write_text(json.dumps(config))
    return theirs, interop.load(folder)


def sampler(model: Any, prompt: np.ndarray, **settings: Any) -> Callable[[], np.ndarray]:
    """Its `sample.py`: texts one after another, each by `model.generate`.

    Args:
      model: nanoGPT's.
      prompt: int [B, P], a row for each text.
      settings: of `model.generate`.
    """
    import torch

    rows = torch.from_numpy(prompt.astype(np.int64))

    def run() -> np.ndarray:
        texts = [model.generate(row[None], **settings) for row in rows]
        return torch.cat(texts)[:, prompt.shape[1] :].numpy()

    return run
