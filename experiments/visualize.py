"""What a trained run's heads look at: one HTML file that any browser opens.

python -m experiments.visualize --workdir=runs/char_lm --text="The cat sat on the mat."
python -m experiments.visualize --workdir=runs/char_lm --text_file=my.txt --worst=20
python -m experiments.visualize --workdir=runs/a --other=runs/b --text="The cat sat on the mat."
python -m experiments.visualize --workdir=runs/translate --text="two hundred and thirty-four"

Without a text it shows what the run's report shows. The page has every head as a small map, lines
between tokens, the product of one query and key, measures of each head, and for a language model
what it would say after each layer. --figures=<folder> draws the maps as PNG or SVG too.
"""

import dataclasses
import sys
from pathlib import Path

import numpy as np
from absl import flags

from experiments import attention_views, cli, setup
from qkv_jax import viz
from qkv_jax.data.files import read_text
from qkv_jax.training.run_directory import write_text_atomic

WORKDIR = flags.DEFINE_string("workdir", "runs/char_lm", "the run whose model looks")
OTHER = flags.DEFINE_string("other", None, "another run, to be compared on the same text")
TEXT = flags.DEFINE_string("text", None, "what it reads, or translates")
TEXT_FILE = flags.DEFINE_string("text_file", None, "a UTF-8 file to read, from its beginning")
NUM_TOKENS = flags.DEFINE_integer(
    "num_tokens", None, "read so many tokens of the text; default: all", lower_bound=1
)
WORST = flags.DEFINE_integer(
    "worst", 0, "list so many of the tokens that a language model predicts worst", lower_bound=0
)
OUT = flags.DEFINE_string("out", None, "the page; default: <workdir>/attention.html")
FIGURES = flags.DEFINE_string("figures", None, "a folder for the maps as pictures, one a layer")
FORMAT = flags.DEFINE_enum("format", "png", ["png", "svg"], "of the pictures")


def main(_) -> None:
    with cli.one_sentence():
        text = _text()
        runs = [setup.load_run(path) for path in (WORKDIR.value, OTHER.value) if path is not None]
        found = [_look(run, text) for run in runs]
        names = [Path(run.run.path).name for run in runs]
        page = viz.attention_page(
            _views(names, found),
            title="Attention of " + " and ".join(names),
            about=_about(runs, found),
            tables=[table for looked in found for table in looked.tables],
        )
        out = Path(OUT.value or Path(WORKDIR.value) / "attention.html")
        out.parent.mkdir(parents=True, exist_ok=True)
        write_text_atomic(out, page)
        print(f"{out}  {len(page.encode()) / 1e6:.1f} MB; open it in a browser")
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


def _look(run: setup.TrainedRun, text: str | None) -> attention_views.Looked:
    if text is not None and NUM_TOKENS.value is not None:
        text = attention_views.cut(run, text, NUM_TOKENS.value)
    try:
        return attention_views.look(run, text, worst=WORST.value)
    except NotImplementedError as error:
        raise ValueError(f"workdir: {run.run.path}: {error}") from None


def _views(names: list[str], found: list[attention_views.Looked]) -> list[viz.AttentionView]:
    """The views of all runs; of several, each with its run's name."""
    if len(found) == 1:
        return found[0].views
    return [
        dataclasses.replace(view, name=f"{name}: {view.name}")
        for name, looked in zip(names, found, strict=True)
        for view in looked.views
    ]


def _about(runs: list[setup.TrainedRun], found: list[attention_views.Looked]) -> str:
    """A line on each model."""
    lines = []
    for run, looked in zip(runs, found, strict=True):
        layers, heads, T, _ = np.shape(looked.views[0].weights)
        lines.append(
            f"{run.run.path.name}, step {run.step:,}: {layers} layers of {heads} heads on {T} "
            "tokens"
        )
    return "\n".join(lines)


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
