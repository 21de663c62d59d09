"""What tests of meshes compute: a process of its own, because its CPU is eight devices.

    on_devices("step 2,2,2,1", "restore")   # {"step 2,2,2,1": "", "restore": ""}, or what differs

A request is the name of a function below and, if it takes one, the mesh: the sizes of `AXES`.
"""

import functools
import json
import os
import re
import subprocess
import sys
import tempfile
from pathlib import Path
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import optax
from flax import nnx
from jax.sharding import NamedSharding, PartitionSpec

from qkv_jax import nn, ops, training
from qkv_jax.models import Decoder, DecoderConfig
from qkv_jax.ops import masks, scores
from qkv_jax.ops.mesh import ROWS
from qkv_jax.training import sharding
from tests.tolerances import assert_close

DEVICES = 8
B, T, V = 8, 16, 40
SMALL = DecoderConfig(
    vocab_size=V, context=T, num_layers=1, width=16, num_heads=8, num_kv_heads=2, head_dim=6,
    mlp_width=24, activation="swiglu", position="rotary", norm="rms", use_bias=True, qk_norm=True,
    zero_init_outputs=False, tie_embeddings=False, dropout_rate=0.2,
)  # fmt: skip


def on_devices(*requests: str) -> dict[str, Any]:
    """What each request returned, from a process with eight devices."""
    done = subprocess.run(
        [sys.executable, "-W", "error", "-m", "tests.on_devices", *requests],
        cwd=Path(__file__).parents[1], env=os.environ | {"JAX_PLATFORMS": "cpu"},
        capture_output=True, text=True, timeout=1800,
    )  # fmt: skip
    assert done.returncode == 0, done.stderr[-3000:]
    assert "Involuntary full rematerialization" not in done.stderr, done.stderr[-3000:]
    return json.loads(done.stdout.splitlines()[-1])


def make_mesh(sizes: str) -> jax.sharding.Mesh:
    config = sharding.MeshConfig(*map(int, sizes.split(",")))
    return sharding.make_mesh(config, batch_size=B)


def difference(actual: Any, expected: Any, scale: float = 1) -> str:
    """What differs between two trees, by name; "" where nothing does."""
    for (path, x), y in zip(
        jax.tree_util.tree_leaves_with_path(actual), jax.tree.leaves(expected), strict=True
    ):
        try:
            assert_close(x, y, "float32", scale=scale)
        except AssertionError as error:
            return f"{jax.tree_util.keystr(path)}: {error}"
    return ""


# Attention


def attention(sizes: str) -> str:
    """Everything that knows a row, a head or a query: values and gradients."""
    q, k, v = (
        jnp.asarray(np.random.RandomState(i).randn(B, T, n, 4), jnp.float32)
        for i, n in enumerate((8, 2, 2))
    )
    table, slopes, sinks = (
        jnp.asarray(np.random.RandomState(i).rand(*shape), jnp.float32)
        for i, shape in enumerate(((6, 8), (8,), (8,)))
    )
    ids = np.sort(np.random.RandomState(0).randint(0, 3, (B, T)), axis=1)

    def cubed(implementation, q, k, v, table, slopes, sinks):
        out, stats = ops.attention_with_stats(
            q, k, v, mask=masks.Causal() & masks.Segments(ids), sinks=sinks,
            score=(scores.RelativeBias(table, max_distance=8), scores.Alibi(slopes)),
            dropout_rate=0.3, dropout_rng=jax.random.key(1), implementation=implementation,
        )  # fmt: skip
        return (out**3).sum() + (stats.lse**2).sum()

    def results():
        return {
            name: jax.jit(jax.value_and_grad(functools.partial(cubed, way), range(6)))(
                q, k, v, table, slopes, sinks
            )
            for name, way in (("reference", "reference"), ("blockwise", ops.Blockwise(8, 16)))
        }

    expected = results()
    with jax.set_mesh(make_mesh(sizes)):
        return difference(results(), expected, scale=100)


# Training steps


def trained(
    sizes: str, optimizer: optax.GradientTransformation, steps: int = 1, accumulate: int = 1
) -> tuple[Any, list[Any]]:
    """Parameters after some steps, and the metrics."""
    graphdef, params = nn.split(Decoder(SMALL, rngs=nnx.Rngs(0)))
    mesh = make_mesh(sizes)
    with jax.set_mesh(mesh):
        state = sharding.placed(params, optimizer, mesh)
        wanted = jax.tree.map(lambda x: x.sharding, state)
        step = jax.jit(
            training.make_train_step(
                training.cross_entropy_loss(graphdef), optimizer, seed=0, accumulate=accumulate
            )
        )
        metrics = []
        for i in range(steps):
            tokens = np.random.RandomState(i).randint(0, V, (B * accumulate, T + 1))
            state, found = step(state, {"inputs": tokens[:, :-1], "targets": tokens[:, 1:]})
            metrics.append(found)
        moved = jax.tree.map(lambda x, s: x.sharding.is_equivalent_to(s, x.ndim), state, wanted)
        assert all(jax.tree.leaves(moved)), "the state does not stay where it lay"
    return jax.device_get(state.params), jax.device_get(metrics)


ONE = "1,1,1,1"
SGD = optax.sgd(1.0)  # after a step, parameters differ by gradients


@functools.cache
def _of_one_device(**kwargs: Any) -> Any:
    return trained(ONE, SGD, **kwargs)


def step(sizes: str) -> str:
    """Loss and gradients, with dropout, of a model with fewer key heads than shards of heads."""
    return difference(trained(sizes, SGD), _of_one_device(), scale=10)


def accumulated(sizes: str) -> str:
    """The same for two micro-batches."""
    return difference(trained(sizes, SGD, accumulate=2), _of_one_device(accumulate=2), scale=10)


def muon(sizes: str) -> str:
    """Three steps of Muon, whose state is stacks of matrices."""
    optimizer = training.make_optimizer(training.OptimizerConfig(name="muon"), 9)
    expected = trained(ONE, optimizer, steps=3)
    # Newton-Schulz iterations amplify what rounding leaves.
    return difference(trained(sizes, optimizer, steps=3), expected, scale=100)


def restore() -> str:
    """A state of one mesh, read back onto others: where it is to lie, and to the bit."""
    _, params = nn.split(Decoder(SMALL, rngs=nnx.Rngs(0)))
    optimizer = optax.adamw(1e-3)
    before = sharding.placed(params, optimizer, make_mesh("1,4,2,1"))
    with tempfile.TemporaryDirectory() as folder:
        with training.Checkpointer(folder) as checkpointer:
            checkpointer.save(3, before)
        for sizes in ("8,1,1,1", "2,2,2,1", ONE):
            like = sharding.placed(params, optimizer, make_mesh(sizes))
            _, after = training.load_checkpoint(folder, like)
            for x, y, z in zip(*map(jax.tree.leaves, (after, before, like)), strict=True):
                assert x.sharding.device_set == z.sharding.device_set, sizes
                assert np.asarray(x).tobytes() == np.asarray(y).tobytes(), sizes
                assert x.addressable_shards[0].data.shape == z.addressable_shards[0].data.shape
    return ""


# What is compiled


def compiled(config: DecoderConfig, sizes: str, *, length: int, **options: Any) -> Any:
    """The step of AdamW, compiled for abstract arrays."""
    optimizer = training.make_optimizer(training.OptimizerConfig(name="adamw"), 9)
    graphdef, mesh = None, make_mesh(sizes)

    def create() -> training.TrainState:
        nonlocal graphdef
        graphdef, params = nn.split(Decoder(config, rngs=nnx.Rngs(0)))
        return training.TrainState.create(params, optimizer)

    state = jax.eval_shape(create)
    state = jax.tree.map(
        lambda x, s: jax.ShapeDtypeStruct(x.shape, x.dtype, sharding=s),
        state, sharding.shardings(state, mesh),
    )  # fmt: skip
    by_row = NamedSharding(mesh, PartitionSpec(ROWS))
    tokens = jax.ShapeDtypeStruct((B, length), jnp.int32, sharding=by_row)
    with jax.set_mesh(mesh):
        train_step = training.make_train_step(
            training.cross_entropy_loss(graphdef), optimizer, seed=0
        )
        lowered = jax.jit(train_step, donate_argnums=0).lower(
            state, {"inputs": tokens, "targets": tokens}
        )
        return lowered.compile(compiler_options=options)


def gathers(sizes: str) -> dict[str, Any]:
    """Of the scheduled step of three layers: what of its parameters is whole, and how long.

    Returns:
      For each shape of gathered parameters how often it is gathered, and the most bytes of them
      that are alive at once.
    """
    config = DecoderConfig(
        vocab_size=V, context=T, num_layers=3, width=32, num_heads=2, mlp_width=48, norm="rms",
        position="rotary", use_bias=False, activation="relu_squared",
    )  # fmt: skip
    # A CPU's own scheduler wants concurrency and gathers all at once; other devices' want memory.
    options = {"xla_cpu_scheduler_type": "CPU_SCHEDULER_TYPE_MEMORY_OPTIMIZED"}
    text = compiled(config, sizes, length=T, **options).as_text()
    assert "is_scheduled=true" in text
    lines = [
        found.groups()
        for line in text[text.index("\nENTRY") :].splitlines()
        if (found := re.match(r"\s+(?:ROOT )?%(\S+) = (.*?)(?:, metadata=.*)?$", line))
    ]
    last = {
        name: i for i, (_, body) in enumerate(lines) for name in re.findall(r"%([\w.-]+)", body)
    }
    count: dict[str, int] = {}
    alive = np.zeros(len(lines), int)
    for i, (name, body) in enumerate(lines):
        if found := re.match(r"f32\[(\d+),(\d+)\]\S* all-gather\(", body):
            rows, columns = map(int, found.groups())
            count[f"{rows},{columns}"] = count.get(f"{rows},{columns}", 0) + 1
            alive[i : last[name] + 1] += 4 * rows * columns
    return {"count": count, "alive": int(alive.max())}


def step_bytes(sizes: str) -> list[tuple[int, int]]:
    """Of a step of AdamW, (arguments, temporaries) on a device: estimated, and compiled."""
    from tests.training.estimates_test import ADAMW, CONFIG, abstract, tokens

    loss, params = abstract(CONFIG)
    found = training.estimate(
        loss, ADAMW, params, tokens(), make_mesh(sizes), depth_first=True
    )  # fmt: skip
    options = {"xla_cpu_scheduler_type": "CPU_SCHEDULER_TYPE_MEMORY_OPTIMIZED"}
    plan = compiled(CONFIG, sizes, length=CONFIG.context, **options).memory_analysis()
    return [
        (found.arguments, found.temporary),
        (plan.argument_size_in_bytes, plan.temp_size_in_bytes),
    ]


def state_bytes(sizes: str) -> int:
    """What one device holds of GPT-2's parameters and AdamW's state, by `memory_analysis()`."""
    config = DecoderConfig(
        vocab_size=50_257, context=1024, num_layers=12, width=768, num_heads=12, position="learned",
        norm="layer", use_bias=True, tie_embeddings=True, qk_norm=False,
    )  # fmt: skip
    return compiled(config, sizes, length=32).memory_analysis().argument_size_in_bytes


def mixer(sizes: str) -> dict[str, str]:
    """For every mixer of a decoder, whether loss and gradients are those of one device."""
    from qkv_jax.models import MIXERS

    global SMALL
    small, different = SMALL, {}
    for name in (name for name, mixer in MIXERS.items() if mixer.causal):
        SMALL = DecoderConfig(
            vocab_size=V, context=T, num_layers=2, width=16, num_heads=4, mlp_width=24,
            mixer=name, norm="rms", use_bias=False, zero_init_outputs=False,
        )  # fmt: skip
        different[name] = difference(trained(sizes, SGD), trained(ONE, SGD), scale=10)
        print(name, different[name][:200], file=sys.stderr, flush=True)
        jax.clear_caches()
    SMALL = small
    return different


def main(requests: list[str]) -> None:
    jax.config.update("jax_num_cpu_devices", DEVICES)
    results = {}
    for request in requests:
        name, *sizes = request.split()
        results[request] = globals()[name](*sizes)
    print(json.dumps(results))


if __name__ == "__main__":
    main(sys.argv[1:])
