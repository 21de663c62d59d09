"""A run's model as a folder of Hugging Face's, or such a folder in another precision.

python -m experiments.convert --workdir=runs/gpt2 --architecture=gpt2 --out=gpt2_folder
python -m experiments.convert --checkpoint=openai-community/gpt2 --dtype=bfloat16 --out=gpt2_half

transformers loads the folder by `AutoModelForCausalLM.from_pretrained(folder)`. A run must have
been trained with the choices of the architecture, which `qkv_jax.interop.ARCHITECTURES` lists; the
first that differs is named. A BPE tokenizer goes along as tokenizer.json, a checkpoint's in the
files that it has.
"""

import dataclasses
import json
import shutil
import sys
from pathlib import Path

import jax
from absl import flags

from experiments import cli, setup
from qkv_jax import interop, nn
from qkv_jax.data import TOKENIZER_FILES, BpeTokenizer

WORKDIR = flags.DEFINE_string("workdir", None, "the run whose model is written")
ARCHITECTURE = flags.DEFINE_enum(
    "architecture", None, sorted(interop.ARCHITECTURES), "what the run's model is to be read as"
)
CHECKPOINT = flags.DEFINE_string(
    "checkpoint", None, "instead of a run: a folder of Hugging Face's, or owner/name on its hub"
)
DTYPE = flags.DEFINE_enum("dtype", "float32", ["float32", "bfloat16"], "of what is written")
OUT = flags.DEFINE_string("out", None, "the folder to write")


def main(_) -> None:
    with cli.one_sentence():
        if OUT.value is None:
            raise ValueError("out: wanted a folder to write, got none")
        if (WORKDIR.value is None) == (CHECKPOINT.value is None):
            raise ValueError("workdir: wanted either --workdir or --checkpoint")
        out = Path(OUT.value)
        if WORKDIR.value is not None:
            _convert_run(WORKDIR.value, out)
        else:
            _convert_checkpoint(interop.folder_of(CHECKPOINT.value), out)
    print(f"{out}  " + ", ".join(sorted(path.name for path in out.iterdir())))


def _convert_run(workdir: str, out: Path) -> None:
    if ARCHITECTURE.value is None:
        raise ValueError(f"architecture: wanted one of {sorted(interop.ARCHITECTURES)}, got none")
    trained = setup.load_run(workdir)
    model = nn.merge(trained.graphdef, trained.params)
    _save(out, interop.of_model(ARCHITECTURE.value, model))
    tokenizer = getattr(trained.task, "tokenizer", None)
    if isinstance(tokenizer, BpeTokenizer):
        written = json.loads(tokenizer.to_json())["json"]
        path = out / "tokenizer.json"
        path.write_text(json.dumps(written, ensure_ascii=False), encoding="utf-8")


def _convert_checkpoint(folder: Path, out: Path) -> None:
    if ARCHITECTURE.value is not None:
        raise ValueError("architecture: is for --workdir; a checkpoint's config.json says its own")
    if out.absolute() == folder.absolute():
        raise ValueError(f"out: wanted another folder than the checkpoint's, got {out}")
    _save(out, interop.load(folder))
    for name in TOKENIZER_FILES:
        if (folder / name).exists():
            shutil.copyfile(folder / name, out / name)


def _save(out: Path, checkpoint: interop.Checkpoint) -> None:
    params = jax.tree.map(lambda x: x.astype(DTYPE.value), checkpoint.params)
    interop.save(out, dataclasses.replace(checkpoint, params=params))


if __name__ == "__main__":
    sys.exit(cli.run(main))
