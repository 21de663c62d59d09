"""Attention, one matrix at a time: a lesson that prints every number and draws it.

    python -m experiments.walkthrough                          # pictures into runs/walkthrough
    python -m experiments.walkthrough --out=results/walkthrough

Two sentences go through four mechanisms: self-attention without weights, with trained projections,
with a causal mask, and with two heads. Before that, softmax; after it, loops against matrices. The
text also goes to walkthrough.txt in the same folder. It takes ten seconds.

"Your journey starts with one step" has the embeddings and the weights of Raschka's "Build a Large
Language Model (From Scratch)", chapter 3, so the numbers are the book's. "The cat sat on the mat"
has random ones, from a fixed seed.
"""

import math
import statistics
import textwrap
import time
from collections.abc import Callable, Iterable, Iterator
from pathlib import Path
from typing import NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
from absl import app, flags, logging

from qkv_jax import viz
from qkv_jax.ops import basic

_OUT = flags.DEFINE_string("out", "runs/walkthrough", "folder for the pictures and the text")

COLUMNS = 100  # of the terminal

Weights = tuple[np.ndarray, ...]


class Sentence(NamedTuple):
    """A sentence with its embeddings, and weights for each mechanism that has some."""

    text: str
    name: str  # of its files
    note: str
    x: np.ndarray  # [T, D]
    w_trained: Weights  # w_query [D, H], w_key [D, H], w_value [D, h]
    w_causal: Weights  # the same
    w_heads: Weights  # w_query, w_key, w_value [D, 2 * H], w_out [2 * H, D_out], b_out [D_out]

    @property
    def tokens(self) -> list[str]:
        return self.text.split()


class Step(NamedTuple):
    """One matrix of a mechanism: its name, where it comes from, and whether columns are tokens."""

    name: str
    formula: str
    matrix: jax.Array | np.ndarray
    over_keys: bool = False


# --- The sentences --------------------------------------------------------------------------------


def journey() -> Sentence:
    """The book's sentence, embeddings and weights (torch.manual_seed(123), printed in full)."""
    x = [
        [0.43, 0.15, 0.89],
        [0.55, 0.87, 0.66],
        [0.57, 0.85, 0.64],
        [0.22, 0.58, 0.33],
        [0.77, 0.25, 0.10],
        [0.05, 0.80, 0.55],
    ]
    w_trained = (
        [[0.29611194, 0.51656228], [0.25167072, 0.68855679], [0.07397246, 0.86652195]],
        [[0.13657987, 0.10247904], [0.18405646, 0.72644675], [0.31525391, 0.68710667]],
        [[0.07563531, 0.19663817], [0.31641197, 0.40174013], [0.11856830, 0.82739538]],
    )
    w_causal = (
        [[-0.23542965, 0.21772663], [0.01912448, -0.49193424], [-0.28674596, 0.42322310]],
        [[-0.41964142, 0.26147818], [-0.45901767, -0.21332641], [-0.36482017, 0.21605217]],
        [[-0.49001413, -0.11346072], [-0.35029207, -0.44043939], [-0.21198919, 0.37804362]],
    )
    w_out, b_out = [[-0.16675780, 0.50002600], [0.22697258, 0.13173824]], [0.19335887, 0.68254098]
    return Sentence(
        text="Your journey starts with one step",
        name="journey",
        note="Embeddings and weights are those of the book's chapter 3: compare the numbers.",
        x=np.array(x, np.float32),
        w_trained=_arrays(*w_trained),
        w_causal=_arrays(*w_causal),
        w_heads=_arrays(*w_causal, w_out, b_out),  # the same projections, cut into two heads
    )


def cat() -> Sentence:
    """A sentence with a word in it twice; random embeddings and weights of width 4."""
    text = "The cat sat on the mat"
    random = np.random.RandomState(0)  # NumPy has promised never to change this stream
    words = text.lower().split()
    embedding = {word: random.randn(4) for word in sorted(set(words))}
    w_qkv = tuple(random.randn(4, 4) / 2 for _ in range(3))
    w_out, b_out = random.randn(4, 4) / 2, np.zeros(4)
    return Sentence(
        text=text,
        name="cat",
        note='Embeddings and weights are random. "The" and "the" share one embedding: attention '
        "alone gives them the same output, because it does not know where a token stands. The "
        "causal mask tells them apart.",
        x=np.array([embedding[word] for word in words], np.float32),
        w_trained=_arrays(*w_qkv),
        w_causal=_arrays(*w_qkv),
        w_heads=_arrays(*w_qkv, w_out, b_out),
    )


def _arrays(*nested) -> Weights:
    return tuple(np.array(numbers, np.float32) for numbers in nested)


# --- The mechanisms, step by step -----------------------------------------------------------------


def simplified(sentence: Sentence) -> list[Step]:
    """Tokens look at each other as they are: every embedding is query, key and value at once."""
    x = sentence.x
    scores = basic.attention_scores(x, x)
    weights = basic.softmax_weights(scores)
    return [
        Step("x", "embeddings", x),
        Step("scores", "x xᵀ", scores, over_keys=True),
        Step("weights", "softmax(scores), row by row", weights, over_keys=True),
        Step("output", "weights x", basic.context_vectors(weights, x)),
    ]


def trained(sentence: Sentence) -> list[Step]:
    """What a token asks (query), offers (key) and passes on (value) are three projections of it."""
    q, k, v = basic.project_qkv(sentence.x, *sentence.w_trained)
    scaled = basic.attention_scores(q, k, scale=1 / math.sqrt(q.shape[-1]))
    weights = basic.softmax_weights(scaled)
    return [
        *_projections(sentence.x, q, k, v),
        Step("scores", "q kᵀ", basic.attention_scores(q, k), over_keys=True),
        Step("scaled", f"scores / √{q.shape[-1]}", scaled, over_keys=True),
        Step("weights", "softmax(scaled)", weights, over_keys=True),
        Step("output", "weights v", basic.context_vectors(weights, v)),
    ]


def causal(sentence: Sentence) -> list[Step]:
    """A token sees itself and what came before: later scores become -∞, their weights exactly 0."""
    q, k, v = basic.project_qkv(sentence.x, *sentence.w_causal)
    scaled = basic.attention_scores(q, k, scale=1 / math.sqrt(q.shape[-1]))
    mask = basic.causal_mask(len(sentence.tokens))
    weights = basic.softmax_weights(scaled, mask)
    return [
        *_projections(sentence.x, q, k, v),
        Step("scores", "q kᵀ", basic.attention_scores(q, k), over_keys=True),
        Step("scaled", f"scores / √{q.shape[-1]}", scaled, over_keys=True),
        Step("mask", "key is not later", mask, over_keys=True),
        Step("masked", "scaled where mask, else -∞", _hide(scaled, mask), over_keys=True),
        Step("weights", "softmax(masked)", weights, over_keys=True),
        Step("output", "weights v", basic.context_vectors(weights, v)),
    ]


def two_heads(sentence: Sentence) -> list[Step]:
    """Two causal attentions, on the first and on the second half of the columns, mixed by w_out."""
    *w_qkv, w_out, b_out = sentence.w_heads
    q, k, v = basic.project_qkv(sentence.x, *w_qkv)
    q_heads, k_heads, v_heads = (basic.split_heads(a, 2) for a in (q, k, v))  # [2, T, H]
    width = q_heads.shape[-1]
    scores = basic.attention_scores(q_heads, k_heads)
    scaled = basic.attention_scores(q_heads, k_heads, scale=1 / math.sqrt(width))
    mask = basic.causal_mask(len(sentence.tokens))
    weights = basic.softmax_weights(scaled, mask)
    joined = basic.join_heads(basic.context_vectors(weights, v_heads))
    output = basic.multi_head_attention(sentence.x, *w_qkv, w_out, b_out, num_heads=2, mask=mask)
    steps = _projections(sentence.x, q, k, v)
    for n in range(2):
        steps += [
            Step(f"scores {n}", f"q{n} k{n}ᵀ", scores[n], over_keys=True),
            Step(f"scaled {n}", f"scores {n} / √{width}", scaled[n], over_keys=True),
        ]
    steps.append(Step("mask", "key is not later", mask, over_keys=True))
    for n in range(2):
        formula = f"softmax(scaled {n}, mask)"
        steps.append(Step(f"weights {n}", formula, weights[n], over_keys=True))
    return [
        *steps,
        Step("joined", "[weights 0 v0, weights 1 v1]", joined),
        Step("output", "joined w_out + b_out", output),
    ]


def _projections(x, q, k, v) -> list[Step]:
    return [
        Step("x", "embeddings", x),
        Step("q", "x w_query", q),
        Step("k", "x w_key", k),
        Step("v", "x w_value", v),
    ]


def _hide(scores, mask):
    return jnp.where(mask, scores, -jnp.inf)


MECHANISMS = {
    "Self-attention without weights": simplified,
    "Self-attention with trained projections": trained,
    "Causal self-attention": causal,
    "Two-head attention": two_heads,
}


# --- The lesson -----------------------------------------------------------------------------------


def lesson(out: Path) -> Iterator[str]:
    """The text of the walkthrough, piece by piece; pictures are written to `out` on the way."""
    yield heading("From scores to weights")
    yield from softmax_lesson()
    for sentence in (journey(), cat()):
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
    yield heading("Loops and matrices: the same numbers, at another speed")
    yield from timing_lesson()


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


# --- Typesetting ----------------------------------------------------------------------------------


def heading(text: str) -> str:
    return f"{'═' * COLUMNS}\n{text}\n{'═' * COLUMNS}\n"


def paragraph(text: str) -> str:
    return textwrap.fill(" ".join(text.split()), COLUMNS - 10) + "\n"


def number(value: float, decimals: int = 3) -> str:
    """Fixed decimals; an exact 0 is a bare 0."""
    if np.isinf(value):
        return "∞" if value > 0 else "-∞"
    if value == 0:
        return "0"
    return f"{value:z.{decimals}f}"  # z: no minus sign before 0.000


def numbers(values: Iterable[float], decimals: int = 3) -> str:
    return " ".join(f"{number(float(value), decimals):>6}" for value in values)


def table(header: tuple[str, ...], rows: list[tuple[str, ...]]) -> str:
    """Names on the left, then columns as wide as their widest cell, flush right."""
    widths = [max(map(len, column)) for column in zip(header, *rows, strict=True)]
    lines = []
    for name, *cells in (header, ["─" * width for width in widths], *rows):
        right = [cell.rjust(width) for cell, width in zip(cells, widths[1:], strict=True)]
        lines.append("   ".join(["", name.ljust(widths[0]), *right]).rstrip() + "\n")
    return "".join(lines)


def print_steps(steps: list[Step], tokens: list[str]) -> str:
    """The matrices side by side, as many as fit the line, rows labelled by token."""
    gap = "   "
    longest = max(map(len, tokens))
    labels = [gap + token.ljust(longest) for token in ["", "", "", *tokens]]
    lines: list[list[list[str]]] = []
    free = 0
    for step in steps:
        block = print_matrix(step, tokens)
        width = len(gap) + len(block[0])
        if width > free:
            lines.append([])
            free = COLUMNS - len(labels[0])
        lines[-1].append(block)
        free -= width
    return "\n".join(
        "\n".join(gap.join(row).rstrip() for row in zip(labels, *blocks, strict=True)) + "\n"
        for blocks in lines
    )


def print_matrix(step: Step, tokens: list[str]) -> list[str]:
    """Formula, shape, column labels, then a line per row; all lines of one length."""
    matrix = np.asarray(step.matrix)
    columns = tokens if step.over_keys else [str(i) for i in range(matrix.shape[1])]
    width = max(6, *map(len, columns))
    if matrix.dtype == bool:
        cells = [["1" if value else "·" for value in row] for row in matrix]
    else:
        cells = [[number(float(value)) for value in row] for row in matrix]
    lines = [
        f"{step.name} = {step.formula}",
        f"[{matrix.shape[0]}, {matrix.shape[1]}]",
        *(" ".join(f"{cell:>{width}}" for cell in row) for row in [columns, *cells]),
    ]
    longest = max(map(len, lines))
    return [line.ljust(longest) for line in lines]


def main(argv: list[str]) -> None:
    if len(argv) > 1:
        raise app.UsageError(f"unexpected arguments: {argv[1:]}")
    logging.set_verbosity(logging.WARNING)  # JAX tells which accelerators it did not find
    out = Path(_OUT.value)
    pieces = [f"Attention, one matrix at a time\npython -m experiments.walkthrough --out={out}\n"]
    print(pieces[0])
    try:
        for piece in lesson(out):
            print(piece, flush=True)
            pieces.append(piece)
        (out / "walkthrough.txt").write_text("\n".join(pieces), encoding="utf-8")
    except OSError as error:
        raise SystemExit(f"--out={out}: {error}") from None
    print(f"Pictures and this text are in {out}.")


if __name__ == "__main__":
    app.run(main)
