"""Attention, one matrix at a time: a lesson that prints every number and draws it.

    python -m experiments.walkthrough                          # pictures into runs/walkthrough
    python -m experiments.walkthrough --out=results/walkthrough
    python -m experiments.walkthrough --text="私は学校に行く。"  # a sentence of your own

Two sentences go through four mechanisms: self-attention without weights, with trained projections,
with a causal mask, and with two heads. Before that, softmax; after it, loops against matrices. The
text also goes to walkthrough.txt in the same folder. It takes ten seconds.

"Your journey starts with one step" has the embeddings and the weights of Raschka's "Build a Large
Language Model (From Scratch)", chapter 3, so the numbers are the book's. "The cat sat on the mat"
has random ones, from a fixed seed, and so has a sentence of your own, which goes through the four
mechanisms alone. Japanese is cut into words by MeCab (pip install fugashi ipadic), else into
characters.
"""

import math
import shlex
import statistics
import sys
import time
from collections.abc import Callable, Iterator
from pathlib import Path

import jax
import jax.numpy as jnp
import numpy as np
from absl import flags, logging

from experiments import cli
from experiments.walkthrough_mechanisms import MECHANISMS, Step
from experiments.walkthrough_sentences import Sentence, cat, journey, own
from experiments.walkthrough_text import heading, number, numbers, paragraph, print_steps, table
from qkv_jax import viz
from qkv_jax.ops import basic

_OUT = flags.DEFINE_string("out", "runs/walkthrough", "folder for the pictures and the text")
_TEXT = flags.DEFINE_string("text", None, "a sentence of your own, of up to 12 words")


def lesson(out: Path) -> Iterator[str]:
    """The text of the walkthrough, piece by piece; pictures are written to `out` on the way."""
    yield heading("From scores to weights")
    yield from softmax_lesson()
    for sentence in (journey(), cat()):
        yield from sentence_lesson(sentence, out)
    yield heading("Loops and matrices: the same numbers, at another speed")
    yield from timing_lesson()


def sentence_lesson(sentence: Sentence, out: Path) -> Iterator[str]:
    """A sentence in the four mechanisms."""
    yield heading(f'"{sentence.text}"')
    yield paragraph(sentence.note)
    for place, (title, mechanism) in enumerate(MECHANISMS.items(), start=1):
        steps = mechanism(sentence)
        path = out / f"{sentence.name}_{place}_{mechanism.__name__}.png"
        viz.save_figure(draw(steps, sentence, title), path)
        yield f"{place}. {title}: {sentence.text}\n"
        yield paragraph(mechanism.__doc__ or "")
        yield print_steps(steps, sentence.tokens)
        yield f"   drawn in {path.name}\n"


def draw(steps: list[Step], sentence: Sentence, title: str):
    return viz.matrices_figure(
        {f"{step.name} = {step.formula}": step.matrix for step in steps},
        sentence.tokens,
        over_keys=[f"{step.name} = {step.formula}" for step in steps if step.over_keys],
        title=f"{title}: {sentence.text}",
    )


def softmax_lesson() -> Iterator[str]:
    """Why softmax, and why the stable one."""
    yield paragraph(
        "Softmax turns any scores into positive weights that sum to 1: exp(s) / Σ exp(s). Written "
        "like this it overflows: in float32, exp(89) is inf, and inf / inf is nan; far below 0 the "
        "sum vanishes, and 0 / 0 is nan too. Subtracting the largest score first changes nothing "
        "in the formula and cures both."
    )
    rows = [(0, 1, 2), (50, 51, 52), (1000, 1001, 1002), (-1002, -1001, -1000), (0, 50, 100)]
    yield table(
        ("scores", "naive softmax", "stable softmax"),
        [
            (
                numbers(scores, 0),
                numbers(basic.naive_softmax(scores)),
                numbers(basic.softmax(scores)),
            )
            for scores in rows
        ],
    )
    yield paragraph(
        "Dividing the scores by their sum is simpler. But larger scores then make no sharper "
        "choice, and a negative score gives a negative weight. Below are the scores of "
        '"journey" against every token of its sentence, ten times these scores, and a negative one.'
    )
    sentence = journey()
    scores = basic.attention_scores(sentence.x, sentence.x)[1]
    yield compare_weights(sentence.tokens, scores)
    yield compare_weights(sentence.tokens, 10 * scores)
    yield compare_weights(["a", "b", "c"], jnp.array([2.0, -1.0, 1.0]))


def compare_weights(labels: list[str], scores: jax.Array) -> str:
    rows = {
        "scores": scores,
        "scores / Σ scores": basic.sum_normalized(scores),
        "softmax(scores)": basic.softmax(scores),
    }
    return table(("", *labels), [(name, *map(number, row.tolist())) for name, row in rows.items()])


def timing_lesson() -> Iterator[str]:
    """Each loop form beside its matrix form, on one random sequence."""
    num_tokens, width, num_heads = 64, 32, 8
    random = np.random.RandomState(0)
    x = random.randn(num_tokens, width).astype(np.float32)
    weights = [(random.randn(width, width) / math.sqrt(width)).astype(np.float32) for _ in range(4)]

    def fused(*args):
        return basic.multi_head_attention(*args, num_heads=num_heads)

    def head_by_head(*args):
        return basic.multi_head_attention_loop(*args, num_heads=num_heads)

    pairs = {
        "simple self-attention": (basic.simple_self_attention_loop, basic.simple_self_attention, 0),
        "self-attention": (basic.self_attention_loop, basic.self_attention, 3),
        f"{num_heads} heads": (jax.jit(head_by_head), fused, 4),
    }
    rows = []
    for name, (loop, matrix, num_weights) in pairs.items():
        args, matrix = (x, *weights[:num_weights]), jax.jit(matrix)
        difference = float(jnp.abs(loop(*args) - matrix(*args)).max())
        loop_time, matrix_time = median_time(loop, args), median_time(matrix, args)
        rows.append(
            (
                name,
                f"{1000 * loop_time:.3f} ms",
                f"{1000 * matrix_time:.3f} ms",
                f"{loop_time / matrix_time:.1f}",
                f"{difference:.1e}",
            )
        )
    yield paragraph(
        f"{num_tokens} tokens of width {width}, on {jax.devices()[0].device_kind}. The loops of "
        "the first two lines are plain Python, one number at a time; the loop of the last goes "
        "over heads and is compiled, as are all matrix forms. Times are medians, without "
        "compilation."
    )
    yield table(("", "loop", "matrix", "loop / matrix", "largest difference"), rows)


def median_time(function: Callable, args: tuple, budget: float = 0.3) -> float:
    """Median seconds of a call, after a first one that compiles; 5 calls, or as many as fit."""
    jax.block_until_ready(function(*args))
    times: list[float] = []
    while len(times) < 5 or (sum(times) < budget and len(times) < 200):
        start = time.perf_counter()
        jax.block_until_ready(function(*args))
        times.append(time.perf_counter() - start)
    return statistics.median(times)


def main(_) -> None:
    logging.set_verbosity(logging.WARNING)  # JAX tells which accelerators it did not find
    out, text = Path(_OUT.value), _TEXT.value
    command = f"python -m experiments.walkthrough --out={out}"
    command += "" if text is None else f" --text={shlex.quote(text)}"
    pieces = [f"Attention, one matrix at a time\n{command}\n"]
    with cli.one_sentence():
        told = lesson(out) if text is None else sentence_lesson(own(text), out)
        print(pieces[0])
        for piece in told:
            print(piece, flush=True)
            pieces.append(piece)
        (out / "walkthrough.txt").write_text("\n".join(pieces), encoding="utf-8")
    print(f"Pictures and this text are in {out}.")


if __name__ == "__main__":
    sys.exit(cli.run(main))
