"""What a trained run's heads look at: one HTML file that any browser opens.

python -m experiments.visualize --workdir=runs/char_lm --text="The cat sat on the mat."
python -m experiments.visualize --workdir=runs/char_lm --text_file=my.txt --worst=20
python -m experiments.visualize --workdir=runs/a --other=runs/b --text="The cat sat on the mat."
python -m experiments.visualize --workdir=runs/char_mlm --text="The cat sat on the m[MASK]t."
python -m experiments.visualize --workdir=runs/translate --text="two hundred and thirty-four"
python -m experiments.visualize --checkpoint=gpt2 --text="The cat sat on the mat."

A checkpoint is a folder of Hugging Face's, with config.json, model.safetensors and a tokenizer's
files, or `owner/name` on its hub, such as openai-community/gpt2.
Without a text a run shows what its report shows. The page has every head as a small map, lines
between tokens, the product of one query and key, measures of each head, for a language model what
it would say after each layer, and for one of masked tokens what it says is behind each mask, which
is "[MASK]", or as a checkpoint's tokenizer spells it. Of a large model, queries and keys are left
out unless --vector_mb gives them more room. --figures=<folder> draws the maps as PNG or SVG too.
"""

import dataclasses
import sys
from pathlib import Path

import numpy as np
from absl import flags

from experiments import attention_views, cli, setup
from experiments.pretrained import Pretrained
from qkv_jax import viz
from qkv_jax.data.files import read_text
from qkv_jax.training.run_directory import write_text_atomic

WORKDIR = flags.DEFINE_string("workdir", "runs/char_lm", "the run whose model looks")
CHECKPOINT = flags.DEFINE_string(
    "checkpoint", None, "instead of a run: a folder of Hugging Face's, or owner/name on its hub"
)
OTHER = flags.DEFINE_string("other", None, "another run, to be compared on the same text")
TEXT = flags.DEFINE_string("text", None, "what it reads, or translates")
TEXT_FILE = flags.DEFINE_string("text_file", None, "a UTF-8 file to read, from its beginning")
NUM_TOKENS = flags.DEFINE_integer(
    "num_tokens", None, "read so many tokens of the text; default: all", lower_bound=1
)
WORST = flags.DEFINE_integer(
    "worst", 0, "list so many of the tokens that a language model predicts worst", lower_bound=0
)
OUT = flags.DEFINE_string(
    "out",
    None,
    "the page; default: attention.html in the run's or checkpoint's folder, or runs/<name>",
)
VECTOR_MB = flags.DEFINE_float(
    "vector_mb", 1.0, "megabytes that a page gives to queries and keys, for q . k", lower_bound=0
)
FIGURES = flags.DEFINE_string("figures", None, "a folder for the maps as pictures, one a layer")
FORMAT = flags.DEFINE_enum("format", "png", ["png", "svg"], "of the pictures")


def main(_) -> None:
    with cli.one_sentence():
        text = _text()
        if CHECKPOINT.value is None:
            models = [setup.load_run(path) for path in (WORKDIR.value, OTHER.value) if path]
        else:
            if WORKDIR.present or OTHER.value is not None:
                raise ValueError("checkpoint: wanted either a checkpoint or runs, got both")
            models = [Pretrained.load(CHECKPOINT.value)]
        found = [_look(model, text) for model in models]
        folders = [_folder(model) for model in models]
        page = viz.attention_page(
            _views([folder.name for folder in folders], found),
            title="Attention of " + " and ".join(folder.name for folder in folders),
            about="\n".join(map(_about, models, found)),
            tables=[table for looked in found for table in looked.tables],
            vector_bytes=round(1e6 * VECTOR_MB.value),
        )
        out = Path(OUT.value or folders[0] / "attention.html")
        out.parent.mkdir(parents=True, exist_ok=True)
        write_text_atomic(out, page)
        print(f"{out}  {len(page.encode()) / 1e6:.2f} MB; open it in a browser")
        if FIGURES.value is not None:
            for path in _draw(found[0].views[0], Path(FIGURES.value)):
                print(path)


def _text() -> str | None:
    """What is to be read; None: the run's own example."""
    if TEXT.value is not None and TEXT_FILE.value is not None:
        raise ValueError("text_file: wanted either --text or --text_file, got both")
    if TEXT_FILE.value is not None:
        return read_text(Path(TEXT_FILE.value))
    return TEXT.value


def _folder(model: setup.TrainedRun | Pretrained) -> Path:
    return Path(model.folder if isinstance(model, Pretrained) else model.run.path).absolute()


def _look(model: setup.TrainedRun | Pretrained, text: str | None) -> attention_views.Looked:
    pretrained = isinstance(model, Pretrained)
    if text is not None and NUM_TOKENS.value is not None:
        tokenizer = getattr(model if pretrained else model.task, "tokenizer", None)
        text = attention_views.cut(tokenizer, text, NUM_TOKENS.value)
    look = attention_views.of_checkpoint if pretrained else attention_views.of_run
    try:
        return look(model, text, worst=WORST.value)
    except NotImplementedError as error:
        raise ValueError(f"workdir: {_folder(model)}: {error}") from None


def _views(names: list[str], found: list[attention_views.Looked]) -> list[viz.AttentionView]:
    """The views of all runs; of several, each with its run's name."""
    if len(found) == 1:
        return found[0].views
    return [
        dataclasses.replace(view, name=f"{name}: {view.name}")
        for name, looked in zip(names, found, strict=True)
        for view in looked.views
    ]


def _about(model: setup.TrainedRun | Pretrained, looked: attention_views.Looked) -> str:
    """A line on a model."""
    layers, heads, T, _ = np.shape(looked.views[0].weights)
    if isinstance(model, Pretrained):
        what = f"a {model.checkpoint.architecture.model_type} model"
    else:
        what = f"step {model.step:,}"
    return f"{_folder(model).name}, {what}: {layers} layers of {heads} heads on {T} tokens"


def _draw(view: viz.AttentionView, folder: Path) -> list[Path]:
    """The maps of each layer, as pictures."""
    paths = []
    for layer, weights in enumerate(np.asarray(view.weights), start=1):
        figure = viz.heads_figure(
            weights, view.queries, key_tokens=view.keys, title=f"{view.name}, layer {layer}"
        )
        paths.append(viz.save_figure(figure, folder / f"layer_{layer}.{FORMAT.value}"))
    return paths


if __name__ == "__main__":
    sys.exit(cli.run(main))
