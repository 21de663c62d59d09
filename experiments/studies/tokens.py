"""Judges `configs/tokens.py`: tokens a character, and bits a character, by kind of token."""

import json
from collections.abc import Sequence

from experiments.studies.study import Findings, Line, Result
from qkv_jax import viz
from qkv_jax.viz import Panel

# Kudo and Richardson's experiment, tokens a sentence of the KFTT's Japanese, by vocabulary 8,000.
PUBLISHED = {"unigram": 25.05, "BPE": 25.43}
BITS = "bits_per_character"


def judge(lines: Sequence[Line]) -> Findings:
    """Whether pieces need fewer tokens, unigram's no more than BPE's, and fewer bits."""
    lengths = {line.name: line.mean(tokens_per_character) for line in lines}
    bits = {line.name: line.mean(BITS) for line in lines}
    sizes = sorted(
        {int(n.split()[-1].replace(",", "")) for n in lengths if n.startswith("unigram")}
    )
    pairs = {size: (f"unigram {size:,}", f"BPE {size:,}") for size in sizes}
    ratios = {size: lengths[unigram] / lengths[bpe] for size, (unigram, bpe) in pairs.items()}
    small = min(bits["characters"], bits["bytes"])
    largest = pairs[sizes[-1]]
    parts = {
        "fewer tokens": max(lengths[name] for name in largest) < lengths["characters"],
        "unigram's no more than BPE's": max(ratios.values()) <= 1,
        "fewer bits": all(bits[name] < small for name in largest),
    }
    found = (
        "Unigram's tokens, in BPE's: "
        + ", ".join(f"{ratio:.3f} with {size:,}" for size, ratio in ratios.items())
        + f" (published: {PUBLISHED['unigram'] / PUBLISHED['BPE']:.3f} with 8,000). With "
        f"{sizes[-1]:,} pieces a model spends "
        + " and ".join(f"{bits[name] - small:+.3f} ({name})" for name in largest)
        + " bits on a character, beside the better of characters and bytes."
    )
    return Findings(
        parts=parts,
        ours="tokens a character / bits a character: "
        + ", ".join(f"{name} {lengths[name]:.2f} / {bits[name]:.3f}" for name in lengths),
        found=found,
        figures={"tokens": _figure(lengths, bits)},
        captions={
            "tokens": "Claimed: down and to the left, from bytes and characters to pieces. Each "
            "point is a model that has read as many tokens as the others."
        },
        notes=[
            "With the same number of tokens a model of longer ones has read more text, and sees "
            "farther back: that is their advantage, and part of what is measured here."
        ],
    )


def tokens_per_character(result: Result) -> float:
    """Of the whole text, as the run has noted it."""
    path = result.run.directory.path / "corpus.json"
    corpus = json.loads(path.read_text(encoding="utf-8"))
    return corpus["tokens"] / corpus["characters"]


def _figure(lengths: dict[str, float], bits: dict[str, float]):
    points = {name: [(lengths[name], bits[name])] for name in lengths}
    return viz.lines_figure(
        [Panel("validation text", points, "tokens per character")],
        y_label="bits per character", title="What a model reads",
    )  # fmt: skip
