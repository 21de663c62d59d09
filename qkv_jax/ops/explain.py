"""What a call of `attention` would do, and what it would cost, without computing it."""

import dataclasses

import jax
import numpy as np

from qkv_jax.ops import arguments, kernels, plan
from qkv_jax.ops.arguments import Arguments
from qkv_jax.ops.attention import IMPLEMENTATIONS, KERNELS, blockwise_pays, of_one_device
from qkv_jax.ops.blockwise import Blockwise
from qkv_jax.ops.kernels import Kernel, Preferred
from qkv_jax.ops.mask_algebra import ALL, NONE, SOME, Mask
from qkv_jax.ops.plan import Grid
from qkv_jax.ops.prepared import grid_of
from qkv_jax.ops.scores import Score

Array = jax.Array | np.ndarray


@dataclasses.dataclass(frozen=True)
class Cost:
    """What one implementation takes for one call.

    `flops` count the matrix products alone, a multiplication and an addition as 2. `bytes` estimate
    the most memory that is held at one time beside inputs and results; what mask and score carry or
    make of their own comes on top.
    """

    forward_flops: int
    training_flops: int  # of the forward and the backward pass
    forward_bytes: int
    training_bytes: int


@dataclasses.dataclass(frozen=True)
class Explanation:
    """What `explain` returns; `print` shows it as tables.

    The counts of blocks are sums over all B batch rows and N heads. They are None where positions
    or the mask are traced: then they are known only when the program runs, and the operations of
    "blockwise" are those of a plan that skips nothing.
    """

    implementation: str  # "reference", "blockwise", "cudnn" or "splash"
    # By implementation: why it is chosen, or what speaks for or against it. A kernel of another
    # platform is not among them.
    reasons: dict[str, str]
    shapes: dict[str, tuple[int, ...]]  # of q, k and v
    dtype: np.dtype  # of logits, softmax and sums
    block_q: int  # queries per block of "blockwise"
    block_kv: int  # keys per block
    skipped: int | None  # blocks in which nothing is allowed
    partial: int | None  # blocks that need the mask's predicate
    full: int | None  # blocks that do not
    costs: dict[str, Cost]  # of "blockwise" and "reference": a kernel's own are not known

    def __str__(self) -> str:
        others = [name for name in self.reasons if name != self.implementation]
        names = [self.implementation, *others]
        sizes = {name: list(shape) for name, shape in self.shapes.items()} | {"logits": self.dtype}
        return "\n".join(
            [
                *(f"{name:<11}{self.reasons[name]}" for name in names),
                "",
                *(f"{name:<11}{size}" for name, size in sizes.items()),
                "",
                *self._block_lines(),
                "",
                *self._cost_lines([name for name in names if name in self.costs]),
            ]
        )

    def _block_lines(self) -> list[str]:
        head = f"Blocks of {self.block_q} queries x {self.block_kv} keys"
        counts = {"skipped": self.skipped, "partial": self.partial, "full": self.full}
        if None in counts.values():
            return [f"{head}, not counted: positions or mask are traced"]
        total = sum(counts.values())
        lines = (f"  {name:<23}{n:>12,}{n / total:>7.0%}" for name, n in counts.items())
        return [f"{head}, of all batch rows and heads", *lines]

    def _cost_lines(self, names: list[str]) -> list[str]:
        most = ", at most" if self.full is None else ""
        rows = {
            f"forward{most}": ("forward_flops", "FLOP"),
            f"with backward{most}": ("training_flops", "FLOP"),
            "memory, forward": ("forward_bytes", "B"),
            "memory, with backward": ("training_bytes", "B"),
        }
        lines = [" " * 25 + "".join(f"{name:>14}" for name in names)]
        for label, (field, unit) in rows.items():
            cells = (_human(getattr(self.costs[name], field), unit) for name in names)
            lines.append(f"  {label:<23}" + "".join(f"{cell:>14}" for cell in cells))
        return lines


def explain(
    q: Array | jax.ShapeDtypeStruct,
    k: Array | jax.ShapeDtypeStruct,
    v: Array | jax.ShapeDtypeStruct,
    *,
    mask: Mask | None = None,
    score: Score | tuple[Score, ...] | None = None,
    scale: float | None = None,
    sinks: Array | None = None,
    dropout_rate: float = 0.0,
    dropout_rng: Array | None = None,
    q_positions: Array | None = None,
    kv_positions: Array | None = None,
    implementation: str | Blockwise | None = None,
    platform: str | None = None,
) -> Explanation:
    """Which implementation `attention` takes for these arguments, why, and what it costs.

    With L = (batch rows and heads in one step) x block_q x block_kv logits, W = B x N x T x S of
    them, and q, k, v, out for the sizes of these arrays, all in the dtype of the logits:

        operations, forward     2 (H + h)           per element of the blocks that are computed
                    backward    2 (3 H + 2 h)       more: the logits are computed again
                                2 (2 H + 2 h)       more in "reference", which keeps them
        bytes       reference   2 W                 forward; with backward 4 W
                    blockwise   2 L                 forward; with backward 4 L + q + out

    Where blocks do not fill the plane or the inputs have another dtype, "blockwise" also holds
    copies: q + k + v + out forward; 2 (q + k + v) with backward. The bytes are what XLA was seen to
    allocate on a CPU.

    The arguments and errors are those of `attention`; q, k and v may be shapes, and none is read.

    Args:
      platform: "cpu", "gpu" (NVIDIA's) or "tpu", to ask what `attention` would do there; by default
        where JAX computes.

    Raises:
      ValueError: also where an axis of q, k or v is empty.
    """
    if platform is None:
        platform = kernels.platform()
    elif platform not in kernels.PLATFORMS:
        raise ValueError(
            f"platform: wanted one of {sorted(kernels.PLATFORMS)} or None, got {platform!r}"
        )
    args = arguments.check(
        q, k, v, mask=mask, score=score, scale=scale, sinks=sinks, dropout_rate=dropout_rate,
        dropout_rng=dropout_rng, q_positions=q_positions, kv_positions=kv_positions,
    )  # fmt: skip
    shapes = {"q": args.q.shape, "k": args.k.shape, "v": args.v.shape}
    if empty := [f"{name} {list(shape)}" for name, shape in shapes.items() if 0 in shape]:
        raise ValueError(f"explain: wanted no empty axis, got {', '.join(empty)}")
    chosen = of_one_device(args, implementation, stats=False, platform=platform)
    if isinstance(chosen, Preferred):
        chosen = chosen.of(args)
    if isinstance(chosen, Kernel):
        chosen.check_call(args)
    blocks = chosen if isinstance(chosen, Blockwise) else IMPLEMENTATIONS["blockwise"]
    grid = grid_of(args, (blocks.block_q, blocks.block_kv), platform=platform)
    cover = plan.coverage(args.mask, args.q_pos, args.kv_pos, args.head, grid)
    grid, *_ = plan.schedule(cover, grid)
    counts = _counts(cover, grid)
    costs = {"blockwise": _blockwise_cost(args, grid, counts), "reference": _reference_cost(args)}
    name = next((name for name, x in IMPLEMENTATIONS.items() if x is chosen), "blockwise")
    reasons = _reasons(args, name, implementation is not None, costs, platform)
    return Explanation(
        name, reasons, shapes, args.dtype, grid.block_q, grid.block_kv, *counts, costs
    )


def _counts(cover: Array, grid: Grid) -> tuple[int | None, int | None, int | None]:
    """How many blocks are skipped, partial and full, of all batch rows and heads."""
    if not isinstance(cover, np.ndarray):
        return None, None, None
    alike = grid.B * grid.N // (cover.shape[0] * cover.shape[1])
    return tuple(alike * int((cover == value).sum()) for value in (NONE, SOME, ALL))


def _reasons(
    args: Arguments, name: str, asked: bool, costs: dict[str, Cost], platform: str
) -> dict[str, str]:
    T, S = args.q.shape[1], args.k.shape[1]
    faster = "faster" if blockwise_pays(T, S, platform) else "not faster"
    needed = _human(costs["reference"].forward_bytes, "B")
    kernel = KERNELS.get(platform)
    reasons = {} if kernel is None else {kernel.name: kernel.refusal(args) or "honours the call"}
    return reasons | {
        "blockwise": f"{faster} where T x S is {T} x {S}",
        "reference": f"needs {needed} for the {T} x {S} weights",
        name: "asked for" if asked else "the fastest that honours every argument",
    }


def _reference_cost(args: Arguments) -> Cost:
    B, T, N, H = args.q.shape
    S, h = args.k.shape[1], args.v.shape[3]
    weights = B * N * T * S
    size = weights * args.dtype.itemsize
    return Cost(2 * (H + h) * weights, 6 * (H + h) * weights, 2 * size, 4 * size)


def _blockwise_cost(args: Arguments, grid: Grid, counts: tuple[int | None, ...]) -> Cost:
    H, h = args.q.shape[3], args.v.shape[3]
    _, partial, full = counts
    blocks = grid.B * grid.N * grid.q_blocks * grid.kv_blocks if full is None else partial + full
    forward_flops = 2 * (H + h) * blocks * grid.block_q * grid.block_kv
    backward_flops = 2 * (3 * H + 2 * h) * blocks * grid.block_q * grid.block_kv

    size = args.dtype.itemsize
    logits = grid.rows * grid.heads * grid.block_q * grid.block_kv * size
    queries = grid.B * grid.N * grid.q_blocks * grid.block_q * size
    keys = grid.B * grid.K * grid.kv_blocks * grid.block_kv * size
    copied = grid.ragged or any(x.dtype != args.dtype for x in (args.q, args.k, args.v))
    inputs = (queries * H + keys * (H + h)) * copied
    return Cost(
        forward_flops,
        forward_flops + backward_flops,
        2 * logits + inputs + queries * h * copied,
        4 * logits + queries * (H + h) + 2 * inputs,
    )


def _human(amount: float, unit: str) -> str:
    """An amount with three digits and a prefix: 1,234,567 FLOP are 1.23 MFLOP."""
    prefixes = iter(("", "k", "M", "G", "T", "P", "E", "Z", "Y"))
    prefix = next(prefixes)
    while amount >= 999.5:
        amount, prefix = amount / 1000, next(prefixes)
    return f"{amount:.3g} {prefix}{unit}"
