"""Attention by different hands, on the same arrays: this library's, JAX's own, PyTorch's.

A `Side` is a call ready to be timed. Each returns the output alone, or with `backward` the output
and the gradients of q, k and v (and of what else it is given) for the cotangent `g`.
"""

import dataclasses
import math
import time
from collections.abc import Callable, Sequence
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np

from qkv_jax import ops

ABSENT = "not installed"
SAMPLE = 0.1  # seconds that one timing takes at least; shorter calls are repeated within it
PAUSE = 0.01  # seconds for which the other side's threads may spin before they sleep
TAIL = 256  # queries and keys that `check_tail` looks at


class Arrays(NamedTuple):
    """Queries, keys, values and the output's cotangent: NumPy, [B, T, N, H]."""

    q: np.ndarray
    k: np.ndarray
    v: np.ndarray
    g: np.ndarray


def random_arrays(B: int, T: int, N: int = 8, H: int = 64) -> Arrays:
    """Standard normal arrays in float32, always the same."""
    rng = np.random.default_rng(0)
    return Arrays(*(rng.standard_normal((B, T, N, H), np.float32) for _ in Arrays._fields))


@dataclasses.dataclass(frozen=True)
class Side:
    """One way to compute the same.

    Args:
      run: computes, and returns when it is done.
      as_numpy: what `run` returned, as NumPy arrays in the layout of `Arrays`.
    """

    run: Callable[[], Any]
    as_numpy: Callable[[Any], list[np.ndarray]]

    def answer(self) -> list[np.ndarray]:
        return self.as_numpy(self.run())


def ours(
    arrays: Arrays, backward: bool, *, implementation: str | None = "blockwise", **settings: Any
) -> Side:
    """`ops.attention`; a score in `settings` gets gradients too."""
    score = settings.pop("score", None)

    def attend(q, k, v, score):
        return ops.attention(q, k, v, score=score, implementation=implementation, **settings)

    return jax_side(attend, (*arrays[:3], score, arrays.g), backward)


def jax_nn(
    arrays: Arrays, backward: bool, causal: bool, implementation: str | None = "xla"
) -> Side:
    """`jax.nn.dot_product_attention`."""

    def attend(q, k, v):
        return jax.nn.dot_product_attention(
            q, k, v, is_causal=causal, implementation=implementation
        )

    return jax_side(attend, arrays, backward)


def jax_side(attend: Callable, arrays: Sequence[Any], backward: bool) -> Side:
    """A function of all arrays but the last, compiled; the last is its cotangent."""
    compute = jax.jit(both_passes(attend) if backward else lambda *arrays: attend(*arrays[:-1]))
    arrays = jax.tree.map(jnp.asarray, tuple(arrays))
    return Side(
        run=lambda: jax.block_until_ready(compute(*arrays)),
        as_numpy=lambda found: [np.asarray(x, np.float32) for x in jax.tree.leaves(found)],
    )


def both_passes(function: Callable) -> Callable:
    """From the function's arguments and its output's cotangent: the output and all gradients."""

    def both(*arrays):
        out, pull = jax.vjp(function, *arrays[:-1])
        return out, pull(arrays[-1])

    return both


def sdpa(arrays: Arrays, backward: bool, causal: bool) -> Side:
    """PyTorch's `scaled_dot_product_attention`."""
    from torch.nn.functional import scaled_dot_product_attention

    def attend(q, k, v):
        return scaled_dot_product_attention(q, k, v, is_causal=causal)

    return torch_side(attend, arrays, backward)


def flex(arrays: Arrays, backward: bool, allowed: Callable, ids: np.ndarray | None = None) -> Side:
    """PyTorch's FlexAttention, compiled; on a CPU it has no backward pass.

    Args:
      allowed: whether a query attends to a key, from their indices and `ids`.
      ids: the document of each token, for `allowed`.
    """
    import torch
    from torch.nn.attention.flex_attention import create_block_mask, flex_attention

    device = torch_device()
    T, tensor = arrays.q.shape[1], None if ids is None else torch.from_numpy(ids).to(device)
    plan = create_block_mask(
        lambda b, h, q, kv: allowed(q, kv, tensor), None, None, T, T, device=device
    )
    compiled = torch.compile(flex_attention, dynamic=False)
    return torch_side(lambda q, k, v: compiled(q, k, v, block_mask=plan), arrays, backward)


def torch_side(attend: Callable, arrays: Arrays, backward: bool) -> Side:
    """A function of q, k, v in PyTorch's layout [B, N, T, H], on the device that JAX is on."""
    import torch

    *qkv, g = [_tensor(x, torch_device()) for x in arrays]
    on_gpu = torch_device() == "cuda"
    if on_gpu:
        torch.set_float32_matmul_precision("high")  # TF32, as JAX does

    def forward():
        with torch.no_grad():
            return [attend(*qkv)]

    def both():
        out = attend(*qkv)
        return [out.detach(), *torch.autograd.grad(out, qkv, g)]

    def run():
        found = both() if backward else forward()
        if on_gpu:
            torch.cuda.synchronize()
        return found

    for x in qkv:
        x.requires_grad_(backward)
    return Side(
        run, as_numpy=lambda found: [np.swapaxes(x.float().cpu().numpy(), 1, 2) for x in found]
    )


def _tensor(x: np.ndarray, device: str):
    """[B, T, N, H] as a tensor [B, N, T, H], in bfloat16 if it is that (NumPy's own has none)."""
    import torch

    tensor = torch.from_numpy(np.ascontiguousarray(np.swapaxes(np.asarray(x, np.float32), 1, 2)))
    return tensor.to(device, torch.bfloat16 if x.dtype == jnp.bfloat16 else torch.float32)


def torch_device() -> str:
    """Where PyTorch computes: beside JAX.

    Raises:
      ImportError: JAX is on a device that this PyTorch does not know.
    """
    import torch

    if on_cpu():
        return "cpu"
    if jax.default_backend() != "gpu" or not torch.cuda.is_available():
        raise ImportError(f"PyTorch {torch.__version__} cannot use this {jax.default_backend()}")
    return "cuda"


def if_it_runs(make: Callable[..., Side], *args: Any, **kwargs: Any) -> tuple[Side | None, str]:
    """The side, or None and why: a package or a compiler that it needs is absent."""
    try:
        side = make(*args, **kwargs)
        side.run()
    except (ImportError, RuntimeError, ValueError) as error:
        first = next(iter(str(error).strip().splitlines()), "")
        return None, f"{make.__name__}: {type(error).__name__}: {first}"
    return side, ""


def on_cpu() -> bool:
    """Whether JAX computes on a CPU."""
    return jax.default_backend() == "cpu"


def check_equal(name: str, found: Sequence[np.ndarray], wanted: Sequence[np.ndarray]) -> None:
    """Compares two answers, each array by the largest magnitude in it.

    Raises:
      ValueError: they differ by more than rounding explains.
    """
    tolerance = 1e-3 if on_cpu() else 0.03  # TF32 and bfloat16
    for index, (a, b) in enumerate(zip(found, wanted, strict=True)):
        error = np.abs(a - b).max() / max(1.0, np.abs(b).max())
        if not error <= tolerance:  # NaN fails too
            raise ValueError(f"{name}: array {index} of their answers differs by {error:.2g}")


def check_tail(arrays: Arrays, found: Sequence[np.ndarray], mask: ops.masks.Mask) -> None:
    """Compares with the reference where that is small, under a mask that is causal.

    The last queries' outputs and gradients depend on these queries alone. So do the gradients of
    the last keys and values, which no other query sees.
    """
    T = arrays.q.shape[1]
    n = min(TAIL, T)
    last = Arrays(arrays.q[:, -n:], arrays.k, arrays.v, arrays.g[:, -n:])
    positions = np.arange(T)
    reference = ours(
        last, len(found) > 1, implementation="reference", mask=mask,
        q_positions=positions[-n:], kv_positions=positions,
    )  # fmt: skip
    wanted = [x[:, -n:] for x in reference.answer()]
    check_equal("the last queries", [x[:, -n:] for x in found], wanted)


def in_turn(sides: dict[str, Side], rounds: int) -> dict[str, list[float]]:
    """Milliseconds a call, by side, once a round; in each round one side after the other."""
    calls = {name: _calls(side.run) for name, side in sides.items()}
    times = {name: [] for name in sides}
    for _ in range(rounds):
        for name, side in sides.items():
            time.sleep(PAUSE)
            times[name].append(_seconds(side.run, calls[name]) * 1e3)
    return times


def _calls(run: Callable[[], Any]) -> int:
    """How many calls fill a sample; the first one here may still compile or warm up."""
    run()
    return max(1, math.ceil(SAMPLE / _seconds(run, 1)))


def _seconds(run: Callable[[], Any], calls: int) -> float:
    start = time.perf_counter()
    for _ in range(calls):
        run()
    return (time.perf_counter() - start) / calls
