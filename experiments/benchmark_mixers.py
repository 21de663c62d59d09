"""What `python -m experiments.benchmark mechanisms` measures, each mixer in a process of its own.

    python -m experiments.benchmark_mixers NAME ROUNDS LIMIT full|quick RESULT.json

measures one mixer of `models.MIXERS`, or the chunked delta rule beside its steps, and writes what
it found after each length: what ends the process early loses no more than one.
"""

import dataclasses
import json
import math
import sys
import time
import traceback
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from flax import nnx

from experiments.benchmark_cases import Bench, checked
from experiments.benchmark_growth import LOOP, SIZES, Growth, Loop, Sizes
from experiments.benchmark_sides import Side, both_passes, in_turn, jax_side
from experiments.benchmark_table import Ratio, Row, figure
from qkv_jax import nn
from qkv_jax.models import MIXERS
from qkv_jax.models.config import TransformerConfig
from qkv_jax.ops import delta, masks

MEMORY_LIMIT = 8  # GB: what needs more is not run
LONG = 5.0  # seconds: of a longer call the first one is timed, with the memory that it must get
SECONDS = 3.0  # for which shorter ones are repeated, twice at least, up to the number of rounds


def measure(
    growth: Growth, sizes: Sizes, rounds: int, limit: float, save: Callable[[Growth], None]
) -> None:
    """Fills the growth of one mixer, length by length.

    Args:
      growth: with the mixer's name alone.
      sizes: of everything.
      rounds: how often a call is timed at most.
      limit: the seconds that a call may take, as the two lengths before foretell it.
      save: called after each length.
    """
    for T in sizes.lengths:
        compiled, arguments, growth.state = prepare(growth.name, T, sizes)
        growth.memory[T] = planned_bytes(compiled)
        growth.ms[T] = too_much(growth, T, limit) or milliseconds(
            lambda call=compiled, of=arguments: jax.block_until_ready(call(*of)), rounds
        )
        print(f"{growth.name}: T={T}: {_brief(growth, T)}", flush=True)
        save(growth)
        if growth.memory[T] > MEMORY_LIMIT * 1e9:  # what is longer is not even compiled
            growth.ms |= {longer: growth.ms[T] for longer in sizes.lengths if longer > T}
            return


def prepare(name: str, T: int, sizes: Sizes) -> tuple[Any, tuple, int | None]:
    """Both passes of a mixer, compiled; their arguments; and what decoding keeps at the end."""
    mixer = MIXERS[name]
    settings = {field: x for field, x in sizes.settings.items() if field in mixer.reads}
    config = TransformerConfig(
        vocab_size=1, context=T, width=sizes.width, num_heads=sizes.heads, position="none",
        use_bias=False, **settings,
    )  # fmt: skip
    init = nnx.initializers.normal(sizes.width**-0.5)
    module = mixer.make(
        config, 0, kernel_init=init, out_init=init, dtype=None, rngs=nnx.Rngs(0)
    )  # fmt: skip
    graphdef, params = nn.split(module)
    mask = masks.Causal() if mixer.causal else None
    x, g = jax.random.normal(jax.random.key(0), (2, 1, T, sizes.width))
    both = both_passes(lambda params, x: nn.merge(graphdef, params)(x, mask=mask))
    compiled = jax.jit(both).lower(params, x, g).compile()
    return compiled, (params, x, g), module.state_size(sizes.lengths[-1]) if mixer.causal else None


def planned_bytes(compiled: Any) -> int:
    """What XLA allocates for a call, by its own plan: temporaries and outputs."""
    plan = compiled.memory_analysis()
    return plan.temp_size_in_bytes + plan.output_size_in_bytes


def too_much(growth: Growth, T: int, limit: float) -> str:
    """Why the length is not run, or nothing."""
    if growth.memory[T] > MEMORY_LIMIT * 1e9:
        return f"> {MEMORY_LIMIT} GB"
    return f"> {limit:g} s" if foretold(growth.ms) > limit * 1e3 else ""


def foretold(ms: Mapping[int, float | str]) -> float:
    """Milliseconds at twice the last length: it grows by what the length before it grew by."""
    last = list(ms.values())[-2:]
    if any(isinstance(value, str) for value in last):
        return math.inf
    if len(last) < 2:
        return 0.0
    return last[1] * max(last[1] / last[0], 1.0)


def milliseconds(run: Callable[[], Any], rounds: int) -> float:
    """Of one call: the median over rounds, after a first one; of a long one, the first and only.

    The first call takes up to 40 % longer: the system hands out the memory page by page.
    """
    start = time.perf_counter()
    found = run()
    first = time.perf_counter() - start
    if not all(np.isfinite(x).all() for x in jax.tree.leaves(found)):
        raise FloatingPointError("an output or a gradient is not finite")
    del found
    if first > LONG:
        return first * 1e3
    rounds = min(rounds, max(math.ceil(SECONDS / first), 2))
    return float(np.median(in_turn({"": Side(run, list)}, rounds)[""]))


def _brief(growth: Growth, T: int) -> str:
    ms, MB = growth.ms[T], figure(growth.memory[T] / 1e6)
    return f"{ms if isinstance(ms, str) else figure(ms) + ' ms'}, {MB} MB"


def delta_loop(sizes: Sizes, rounds: int) -> Row:
    """The gated delta rule at `sizes.start`, in chunks and step by step, both passes."""
    T, N, H = sizes.start, sizes.heads, sizes.width // sizes.heads
    keys = jax.random.split(jax.random.key(0), 6)
    q, k, v, g = (jax.random.normal(key, (1, T, N, H)) for key in keys[:4])
    k = k / jnp.linalg.norm(k, axis=-1, keepdims=True)
    beta = jax.nn.sigmoid(jax.random.normal(keys[4], (1, T, N)))
    log_decay = -0.1 * jax.nn.softplus(jax.random.normal(keys[5], (1, T, N)))

    def chunks(q, k, v, beta, log_decay):
        return delta.delta_rule(q, k, v, beta, log_decay=log_decay)[0]

    def steps(*arrays):
        def step(state, token):
            *token, log_decay = token
            out, state = delta.delta_rule_step(*token, state=state, log_decay=log_decay)
            return state, out

        tokens = jax.tree.map(lambda x: jnp.moveaxis(x, 1, 0), arrays)
        out = jax.lax.scan(step, jnp.zeros((1, N, H, H)), tokens)[1]
        return jnp.moveaxis(out, 0, 1)

    arrays = (q, k, v, beta, log_decay, g)
    sides = {"steps": jax_side(steps, arrays, True), "chunks": jax_side(chunks, arrays, True)}
    ratio = Ratio("steps", "chunks", 20)
    return Bench(rounds).row(f"T={T:,}, both passes", checked(sides), [ratio])


def main(name: str, rounds: int, limit: float, size: str, result: Path) -> None:
    """Measures what the name stands for; a failure is in the result, and shown here in full."""

    def save(found: Growth | Loop) -> None:
        result.write_text(json.dumps(dataclasses.asdict(found)))

    found = Loop() if name == LOOP else Growth(name)
    try:
        if isinstance(found, Loop):
            found.row = delta_loop(SIZES[size], rounds)
            print(f"{name}: {found.row.what}: done", flush=True)
        else:
            measure(found, SIZES[size], rounds, limit, save)
    except Exception as error:  # whatever a mechanism raises is its row
        traceback.print_exc()
        found.failed = f"{type(error).__name__}: {' '.join(str(error).split())[:200]}"
    save(found)


if __name__ == "__main__":
    name, rounds, limit, size, result = sys.argv[1:]
    main(name, int(rounds), float(limit), size, Path(result))
