"""The cases of `python -m experiments.benchmark attention`, each in a process of its own.

    python -m experiments.benchmark_cases NAME ROUNDS SHRINK RESULT.json

measures one case and writes what it found; `benchmark_attention` runs all of them so. Before
anything is timed, the sides' answers are compared: what is wrong is not worth a figure.
"""

import dataclasses
import json
import sys
from collections.abc import Callable, Iterator
from pathlib import Path

import jax
import jax.numpy as jnp
import numpy as np

from experiments.benchmark_sides import (
    ABSENT,
    Arrays,
    Side,
    check_equal,
    check_tail,
    flex,
    if_it_runs,
    in_turn,
    jax_nn,
    on_cpu,
    ours,
    random_arrays,
    sdpa,
)
from experiments.benchmark_table import Ratio, Row, Section, figure, made_with
from experiments.memory import peak_memory
from qkv_jax import ops
from qkv_jax.ops import masks, positions, scores

PASSES = {False: "forward", True: "both passes"}  # by whether gradients are taken


@dataclasses.dataclass
class Bench:
    """How to measure, and what is to be said about it.

    Args:
      rounds: in how many rounds every side is timed.
      shrink: what lengths and batches are divided by; more than 1 is a smoke test.
    """

    rounds: int
    shrink: int = 1
    notes: list[str] = dataclasses.field(default_factory=list)

    def size(self, full: int) -> int:
        return max(1, full // self.shrink)

    def row(self, what: str, sides: dict[str, Side | str], ratios: list[Ratio]) -> Row:
        """Times the sides that exist in turn; the others keep the word that stands for them."""
        present = {name: side for name, side in sides.items() if isinstance(side, Side)}
        values = sides | in_turn(present, self.rounds)
        if not on_cpu():  # the targets were set for a CPU
            ratios = [dataclasses.replace(ratio, target=None) for ratio in ratios]
        return Row(what, values, tuple(ratios))

    def peer(self, make: Callable[..., Side], *args, **kwargs) -> Side | str:
        """A side that may be absent."""
        side, why = if_it_runs(make, *args, **kwargs)
        if why and why not in self.notes:
            self.notes.append(why)
        return side or ABSENT


def checked(sides: dict[str, Side | str]) -> dict[str, Side | str]:
    """The sides, once all that exist have given the same answer."""
    names = [name for name, side in sides.items() if isinstance(side, Side)]
    wanted = sides[names[0]].answer()
    for name in names[1:]:
        check_equal(f"{names[0]} and {name}", sides[name].answer(), wanted)
    return sides


JAX_NN_TARGETS = {  # by full length, whether causal, whether both passes
    (1024, True, False): 3, (1024, False, False): 3, (1024, True, True): 3.5,
    (1024, False, True): 3.5, (4096, True, False): 4.5, (4096, False, False): 4.5,
    (4096, True, True): 10, (4096, False, True): 5.5,
}  # fmt: skip
SDPA_TARGETS = {(4096, False): 1.4, (4096, True): 1.5}  # by full length, whether both passes


def peers(bench: Bench) -> Iterator[Row]:
    for full in (1024, 4096):
        T = bench.size(full)
        arrays = random_arrays(1, T)
        for causal in (True, False):
            for backward in (False, True):
                what = f"T={T} {'causal' if causal else 'full'}, {PASSES[backward]}"
                sides = checked({
                    "ours": ours(arrays, backward, mask=masks.Causal() if causal else None),
                    "jax.nn": jax_nn(arrays, backward, causal),
                    "SDPA": bench.peer(sdpa, arrays, backward, causal),
                })  # fmt: skip
                yield bench.row(what, sides, [
                    Ratio("jax.nn", "ours", JAX_NN_TARGETS[full, causal, backward]),
                    Ratio("SDPA", "ours", SDPA_TARGETS.get((full, backward))),
                ])  # fmt: skip
        if not on_cpu():
            yield from half_precision(bench, arrays)


def half_precision(bench: Bench, arrays: Arrays) -> Iterator[Row]:
    """The rows in bfloat16, for an accelerator."""
    T, arrays = arrays.q.shape[1], Arrays(*(jnp.asarray(x, jnp.bfloat16) for x in arrays))
    for backward in (False, True):
        sides = checked({
            "ours": ours(arrays, backward, mask=masks.Causal()),
            "ours, chosen": ours(arrays, backward, mask=masks.Causal(), implementation=None),
            "jax.nn": jax_nn(arrays, backward, True),
            "cuDNN": bench.peer(jax_nn, arrays, backward, True, "cudnn"),
            "SDPA": bench.peer(sdpa, arrays, backward, True),
        })  # fmt: skip
        ratios = [Ratio(name, "ours") for name in ("jax.nn", "cuDNN", "SDPA")]
        ratios += [Ratio(name, "ours, chosen") for name in ("cuDNN", "SDPA")]
        yield bench.row(f"T={T} causal bfloat16, {PASSES[backward]}", sides, ratios)


def batch(bench: Bench) -> Iterator[Row]:
    B, T = bench.size(32), bench.size(256)
    arrays = random_arrays(B, T)
    for backward in (False, True):
        sides = checked({
            "ours": ours(arrays, backward, mask=masks.Causal(), implementation=None),
            "blockwise": ours(arrays, backward, mask=masks.Causal()),
            "SDPA": bench.peer(sdpa, arrays, backward, True),
        })  # fmt: skip
        yield bench.row(
            f"B={B} T={T} causal, {PASSES[backward]}", sides,
            [Ratio("SDPA", "ours", 1), Ratio("SDPA", "blockwise", 1)],
        )  # fmt: skip


def windows(bench: Bench) -> Iterator[Row]:
    window = bench.size(256)
    both = {"causal": masks.Causal(), "window": masks.Causal() & masks.SlidingWindow(window)}
    for full in (4096, 8192, 16384):
        T = bench.size(full)
        arrays = random_arrays(1, T)
        for backward in (False, True):
            sides = {name: ours(arrays, backward, mask=mask) for name, mask in both.items()}
            for name, mask in both.items():
                check_tail(arrays, sides[name].answer(), mask)
            target = 7 if full == 16384 else None
            what = f"T={T} window {window}, {PASSES[backward]}"
            yield bench.row(what, sides, [Ratio("causal", "window", target)])


def flex_attention(bench: Bench) -> Iterator[Row]:
    window, longest = bench.size(256), bench.size(16384)
    ids = np.sort(np.random.default_rng(1).integers(0, 16, longest)).astype(np.int32)
    documents = masks.Causal() & masks.Segments(ids)
    cases = [
        ("causal", bench.size(4096), masks.Causal(), lambda q, kv, ids: q >= kv, 1.3),
        ("16 documents, causal", longest, documents,
         lambda q, kv, ids: (q >= kv) & (ids[q] == ids[kv]), 0.9),
        (f"window {window}, causal", longest, masks.Causal() & masks.SlidingWindow(window),
         lambda q, kv, ids: (q >= kv) & (q - kv <= window), 0.65),
    ]  # fmt: skip
    for name, T, mask, allowed, target in cases:
        arrays = random_arrays(1, T)
        for backward in (False,) if on_cpu() else (False, True):
            sides = {
                "ours": ours(arrays, backward, mask=mask),
                "FlexAttention": bench.peer(flex, arrays, backward, allowed, ids[:T]),
            }
            ratio = Ratio("FlexAttention", "ours", target)
            yield bench.row(f"T={T} {name}, {PASSES[backward]}", checked(sides), [ratio])


def score_functions(bench: Bench) -> Iterator[Row]:
    T, N = bench.size(4096), 8
    arrays = random_arrays(1, T, N)
    softcap, alibi = scores.Softcap(30.0), scores.Alibi(jnp.asarray(positions.alibi_slopes(N)))
    t5 = scores.RelativeBias(jax.random.normal(jax.random.key(0), (32, N)))
    by_name = {"softcap": softcap, "ALiBi": alibi, "T5": t5, "all three": (softcap, alibi, t5)}
    sides = {}
    for name, score in ({"none": None} | by_name).items():
        sides[name] = ours(arrays, True, mask=masks.Causal(), score=score)
        reference = ours(arrays, True, mask=masks.Causal(), score=score, implementation="reference")
        check_equal(name, sides[name].answer(), reference.answer())
    targets = {name: 1.7 if name == "all three" else 1.35 for name in by_name}
    ratios = [Ratio(name, "none", target, at_least=False) for name, target in targets.items()]
    yield bench.row(f"T={T} causal, both passes", sides, ratios)


def memory(bench: Bench) -> Iterator[Row]:
    T, small = bench.size(32768), random_arrays(1, 64)
    ours(small, True, mask=masks.Causal()).run()
    at_rest = peak_memory()
    # Made on the device: NumPy's would count beside JAX's copies of them.
    keys = jax.random.split(jax.random.key(0), len(small))
    arrays = Arrays(*(jax.random.normal(key, (1, T, 8, 64)) for key in keys))
    found = ours(arrays, True, mask=masks.Causal()).answer()
    used = peak_memory() - at_rest
    seven = sum(x.nbytes for x in (*arrays[:3], *found))
    bench.notes.append(f"the process at rest: {figure(at_rest / 1e6)} MB")
    check_tail(arrays, found, masks.Causal())
    yield Row(
        f"T={T} causal, both passes",
        {"peak": [used / 1e6], "7 arrays": [seven / 1e6]},
        (Ratio("peak", "7 arrays", 3 if on_cpu() else None, at_least=False),),
        unit="MB",
    )


def crossover(bench: Bench) -> Iterator[Row]:
    for B in (1, 8):
        for full in (64, 128, 256, 512, 1024):
            T = bench.size(full)
            arrays = random_arrays(B, T)
            for backward in (False, True):
                sides = checked({
                    name: ours(arrays, backward, mask=masks.Causal(), implementation=name)
                    for name in ("reference", "blockwise")
                })  # fmt: skip
                what = f"B={B} T={T}, {PASSES[backward]}"
                yield bench.row(what, sides, [Ratio("reference", "blockwise")])


def block_sizes(bench: Bench) -> Iterator[Row]:
    dtype = jnp.float32 if on_cpu() else jnp.bfloat16
    for B, full in ((1, 1024), (1, 4096), (8, 1024)):
        T = bench.size(full)
        arrays = Arrays(*(jnp.asarray(x, dtype) for x in random_arrays(B, T)))
        for backward in (False, True):
            sides = {
                str(size): ours(
                    arrays, backward, mask=masks.Causal(), implementation=ops.Blockwise(size, size)
                )
                for size in map(bench.size, (128, 256, 512, 1024, 2048))
            }
            chosen = ours(arrays, backward, mask=masks.Causal())
            yield bench.row(
                f"B={B} T={T}, {PASSES[backward]}", checked({"default": chosen} | sides), []
            )


# By the name that --cases takes, in the order of their numbers: how, the heading, and what it is.
CASES: dict[str, tuple[Callable[[Bench], Iterator[Row]], str, str]] = {
    "peers": (
        peers, "Beside JAX's own attention and PyTorch's",
        "B=1. `jax.nn` is `jax.nn.dot_product_attention`, SDPA PyTorch's "
        "`scaled_dot_product_attention`. Quotients above 1: ours is faster. Ours is `blockwise`, "
        "and in bfloat16 on an accelerator also what `implementation=None` chooses there.",
    ),
    "batch": (
        batch, "Many short sequences",
        "Ours with `implementation=None`, the choice of the library, and with `blockwise`.",
    ),
    "windows": (
        windows, "A sliding window beside plain causal attention",
        "Ours under `Causal()` and under `Causal() & SlidingWindow(...)`. Linear: twice the T, "
        "twice the window's time.",
    ),
    "flex": (
        flex_attention, "Beside PyTorch's FlexAttention",
        "`torch.compile(flex_attention)` with `create_block_mask`; on a CPU it has no backward "
        "pass. Quotients above 1: ours is faster.",
    ),
    "scores": (
        score_functions, "What scores cost",
        "Gradients of ALiBi's slopes and of T5's table [32, N] included.",
    ),
    "memory": (
        memory, "Peak memory",
        "Above the process at rest, which has imported everything and compiled a tiny attention; "
        "the 7 arrays are q, k, v, the output and the gradients of q, k and v. The "
        "cotangent and the compilation count in the peak, not in the 7.",
    ),
    "crossover": (
        crossover, "Where blocks pay",
        "Causal. Quotients above 1: `blockwise` is faster than `reference`.",
    ),
    "blocks": (
        block_sizes, "Block sizes",
        "Causal, as many queries as keys in a block; float32 on a CPU, bfloat16 elsewhere. "
        "*default*: the sizes that `blockwise` takes by itself.",
    ),
}  # fmt: skip


def measure(name: str, bench: Bench, result: Path) -> None:
    """Runs one case and writes its section, with all rows up to a failure."""
    case, title, about = CASES[name]
    section = Section(name, f"{list(CASES).index(name) + 1}. {title}", about, [], bench.notes)
    try:
        for row in case(bench):
            section.rows.append(row)
            print(f"{name}: {row.what}:", *_brief(row), flush=True)
    finally:
        record = {"section": dataclasses.asdict(section), "made_with": made_with()}
        result.write_text(json.dumps(record))


def _brief(row: Row) -> list[str]:
    return [
        f"{side} {values if isinstance(values, str) else figure(row.median(side))}"
        for side, values in row.values.items()
    ]


def section_from(record: dict) -> Section:
    """The section that a process has written."""
    return Section(**record | {"rows": [Row.from_record(row) for row in record["rows"]]})


if __name__ == "__main__":
    name, rounds, shrink, result = sys.argv[1:]
    measure(name, Bench(int(rounds), int(shrink)), Path(result))
