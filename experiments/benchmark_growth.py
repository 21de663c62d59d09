"""How a mechanism's time and memory grow with length: slopes, verdicts, and their table."""

import dataclasses
from collections.abc import Mapping, Sequence

import numpy as np

from experiments.benchmark_table import Ratio, Row, Section, figure, line, tally

EXACT = "attention"  # what all others are compared with
LOOP = "delta_loop"  # the name of what is no mixer: the delta rule in chunks beside its steps
FAMILIES: dict[str, tuple[str, ...]] = {
    "exact": (EXACT,),
    "part of the keys": (
        "sliding_window", "chunked", "longformer", "streaming", "bigbird", "strided", "fixed",
    ),
    "chosen keys": ("topk", "moba", "nsa", "memory"),
    "other weights": (
        "sigmoid", "entmax", "sparsemax", "off_by_one", "sink", "clipped_softmax",
        "gated_attention", "talking_heads", "differential",
    ),
    "other logits and values": (
        "cosine", "forgetting", "cope", "bahdanau", "luong", "value_residual", "latent",
    ),
    "linear": (
        "linear", "performer", "retention", "ssd", "gated_linear", "delta", "gated_delta",
        "kimi_delta",
    ),
    "low rank": ("linformer", "nystrom"),
    "recurrence and convolution": ("lstm", "gru", "gated_conv", "long_conv"),
}  # fmt: skip
# What claims to be linear in T, and so to beat exact attention where T is long.
LINEAR = frozenset(
    (*FAMILIES["linear"], *FAMILIES["low rank"], "sliding_window", "chunked", "longformer",
     "streaming", "gated_conv")
)  # fmt: skip
# Why something, or a whole family, may not be faster than exact attention: said where it is not.
REASONS = {
    "strided": "the far keys of its queries lie in all blocks of keys, so that none is left out",
    "fixed": "the far keys of its queries lie in all blocks of keys, so that none is left out",
    "bigbird": "its random keys lie in nearly all blocks of keys where these are long, as on a GPU",
    "topk": "it takes all logits in order to choose",
    "memory": "it takes all logits in order to choose",
    "moba": "it gathers for each query the keys that it has chosen: more time for each of them",
    "nsa": "it gathers for each query the keys that it has chosen: more time for each of them",
    "linear": "its chunks wait for one another, each a few products of 64 x 64 matrices, which "
    "reach 40 to 65 GFLOP/s on two cores, where those of large blocks reach 330",
    "other weights": "it computes every pair, as exact attention does, and more for each",
    "other logits and values": "it computes every pair, as exact attention does, and more for each",
    "lstm": "its steps wait for one another, each of them small",
    "gru": "its steps wait for one another, each of them small",
}
SLOPE = Ratio("growth", "length", 1.15, at_least=False)


@dataclasses.dataclass(frozen=True)
class Sizes:
    """What all mixers are measured at.

    Args:
      lengths: T, each twice the one before.
      start: the length from which slopes are fitted, and exact attention is to be beaten.
      width, heads: D and N.
      settings: fields of the models' config; a mixer gets those that it reads.
    """

    lengths: tuple[int, ...]
    start: int
    width: int
    heads: int
    settings: dict[str, int]

    def __str__(self) -> str:
        own = ", ".join(f"{name}={value}" for name, value in self.settings.items())
        return f"B=1, D={self.width}, N={self.heads} heads of {self.width // self.heads}; {own}"


FULL = Sizes(
    (512, 1024, 2048, 4096, 8192, 16384, 32768), start=4096, width=256, heads=4,
    settings={
        "window": 256, "block_size": 64, "num_blocks": 8, "num_global": 1, "num_random": 3,
        "top_k": 32, "num_features": 128, "rank": 64, "conv_width": 4, "chunk_size": 64,
    },
)  # fmt: skip
QUICK = Sizes(
    (32, 64, 128), start=64, width=32, heads=4,
    settings={
        "window": 16, "block_size": 8, "num_blocks": 2, "num_global": 1, "num_random": 1,
        "top_k": 4, "num_features": 16, "rank": 8, "conv_width": 4, "chunk_size": 16,
    },
)  # fmt: skip
SIZES = {"full": FULL, "quick": QUICK}


@dataclasses.dataclass
class Growth:
    """What was measured of one mixer.

    Args:
      name: in the table of mixers.
      ms: by length, the milliseconds of both passes; or why there are none, such as "> 20 s".
      memory: by length, the bytes of temporaries and outputs, where that was compiled.
      state: the numbers that decoding keeps after the last length; None where nothing decodes.
      failed: what went wrong, in a sentence.
      made: at which commit, on which day, in how many rounds.
    """

    name: str
    ms: dict[int, float | str] = dataclasses.field(default_factory=dict)
    memory: dict[int, int] = dataclasses.field(default_factory=dict)
    state: int | None = None
    failed: str = ""
    made: str = ""

    @classmethod
    def from_record(cls, record: dict) -> "Growth":
        """From JSON, whose keys are text."""
        tables = ({int(T): x for T, x in record[name].items()} for name in ("ms", "memory"))
        ms, memory = tables
        return cls(**record | {"ms": ms, "memory": memory})

    @property
    def times(self) -> dict[int, float]:
        """`ms` where it was measured."""
        return {T: x for T, x in self.ms.items() if not isinstance(x, str)}

    @property
    def family(self) -> str:
        return next((name for name, names in FAMILIES.items() if self.name in names), "other")


@dataclasses.dataclass
class Loop:
    """The delta rule in chunks beside its steps.

    Args:
      name: LOOP.
      row: the sides, timed in turn.
      failed, made: as for Growth.
    """

    name: str = LOOP
    row: Row | None = None
    failed: str = ""
    made: str = ""

    @classmethod
    def from_record(cls, record: dict) -> "Loop":
        return cls(**record | {"row": record["row"] and Row.from_record(record["row"])})

    def lines(self) -> list[str]:
        """As Markdown."""
        about = (
            "The op of `gated_delta`, `ops.delta_rule`, and a `lax.scan` of its one-step form: "
            "the output and the gradients of all arrays. The answers were compared before. What "
            "bounds the chunks on a CPU is the speed of many small products of matrices: 40 to 65 "
            "GFLOP/s for 64 x 64, where large ones reach 300 and more."
        )
        notes = [f"failed: {self.failed}"] if self.failed else []
        rows = [self.row] if self.row else []
        return Section(self.name, "Chunks beside steps", about, rows, notes).lines()


def in_order(names: Sequence[str]) -> list[str]:
    """The names by family; what no family holds comes last."""
    known = [name for family in FAMILIES.values() for name in family]
    return sorted(names, key=lambda name: known.index(name) if name in known else len(known))


def slope(values: Mapping[int, float], start: int) -> float | None:
    """The least-squares slope of log value against log T, from `start` on; None below 2 points."""
    points = [(T, x) for T, x in values.items() if start <= T]
    if len(points) < 2:
        return None
    T, x = np.log(points).T
    return float(np.polyfit(T, x, 1)[0])


def faster_from(one: Growth, exact: Growth) -> int | None:
    """The length from which on `one` takes less time wherever either was timed; None if none."""
    found = None
    for T in sorted(set(one.ms) & set(exact.ms), reverse=True):
        if T not in one.times and T not in exact.times:
            continue
        if not one.times.get(T, np.inf) < exact.times.get(T, np.inf):
            break
        found = T
    return found


def verdicts(one: Growth, exact: Growth | None, sizes: Sizes) -> dict[str, str]:
    """`reached` or `missed`, for each target that could be checked of what should be linear."""
    if one.name not in LINEAR:
        return {}
    slopes = {"time": slope(one.times, sizes.start), "memory": slope(one.memory, sizes.start)}
    found = {name: SLOPE.verdict(value) for name, value in slopes.items() if value is not None}
    if exact and set(one.times) & set(exact.ms):
        found["against exact attention"] = "reached" if _beats(one, exact, sizes) else "missed"
    return found


def _beats(one: Growth, exact: Growth, sizes: Sizes) -> bool:
    first = faster_from(one, exact)
    return first is not None and first <= sizes.start


def summary(rows: Sequence[Growth], loop: Loop | None, sizes: Sizes) -> str:
    """How many targets were reached, and which were missed."""
    exact = next((row for row in rows if row.name == EXACT), None)
    found = [
        (f"{row.name}: {what}", [verdict])
        for row in rows
        for what, verdict in verdicts(row, exact, sizes).items()
    ]
    if loop and loop.row:
        found.append((loop.name, loop.row.verdicts()))
    return tally(found)


def table(rows: Sequence[Growth], sizes: Sizes) -> list[str]:
    """The rows as Markdown, and below them why some are not faster than exact attention."""
    exact = next((row for row in rows if row.name == EXACT), None)
    longest = sizes.lengths[-1]
    heads = [
        "mixer", "family", *(f"{T:,}, ms" for T in sizes.lengths), "time ~ T^",
        f"MB at {longest:,}", "memory ~ T^", f"state at {longest:,}",
        "faster than exact attention",
    ]  # fmt: skip
    lines = [line(heads), "|---|---|" + "---:|" * (len(heads) - 3) + "---|"]
    for row in rows:
        state = "-" if row.state is None else f"{row.state:,}"
        lines.append(line([
            f"`{row.name}`", row.family, *(cell(row.ms.get(T, "-")) for T in sizes.lengths),
            _slope(row, row.times, sizes), _memory(row, longest), _slope(row, row.memory, sizes),
            state, _against(row, exact, sizes),
        ]))  # fmt: skip
    return [*lines, "", *_slower(rows, exact, sizes)]


def cell(value: float | str) -> str:
    """A time as tables show it, or why there is none."""
    return value if isinstance(value, str) else figure(value)


def _memory(row: Growth, longest: int) -> str:
    if longest in row.memory:
        return figure(row.memory[longest] / 1e6)
    return cell(row.ms.get(longest, "-"))


def _slope(row: Growth, values: Mapping[int, float], sizes: Sizes) -> str:
    value = slope(values, sizes.start)
    if value is None:
        return "-"
    ratio = SLOPE if row.name in LINEAR else dataclasses.replace(SLOPE, target=None)
    fitted = sum(sizes.start <= T for T in values)
    wanted = sum(sizes.start <= T for T in sizes.lengths)
    return ratio.shown(value) + (f", {fitted} of {wanted} lengths" if fitted < wanted else "")


def _against(row: Growth, exact: Growth | None, sizes: Sizes) -> str:
    if row.failed:
        return f"failed: {row.failed}"
    both = sorted(set(row.times) & set(exact.times)) if exact else []
    if row.name == EXACT or not both:
        return "-"
    first, last = faster_from(row, exact), both[-1]
    text = "never" if first is None else f"from T = {first:,}"
    text += f"; {figure(exact.times[last] / row.times[last])} times at {last:,}"
    if row.name not in LINEAR:
        return text
    verdict = "reached" if _beats(row, exact, sizes) else "missed"
    return f"{text} (≤ {sizes.start:,}: **{verdict}**)"


def _slower(rows: Sequence[Growth], exact: Growth | None, sizes: Sizes) -> list[str]:
    """Each reason why exact attention is not beaten from `start` on, with those it stands for."""
    names: dict[str, list[str]] = {}
    for row in rows:
        if exact and row.name != EXACT and row.times and not _beats(row, exact, sizes):
            reason = REASONS.get(row.name, REASONS.get(row.family, "not explained"))
            names.setdefault(reason, []).append(f"`{row.name}`")
    if not names:
        return []
    title = f"Not faster than exact attention at all lengths from {sizes.start:,} on, and why:"
    return [title, "", *(f"- {', '.join(who)}: {why}" for why, who in names.items()), ""]
