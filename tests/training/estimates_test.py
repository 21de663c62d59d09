"""What a step takes, estimated: against the compiler's own plan, and against formulas."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from flax import nnx

from qkv_jax import nn, ops, training
from qkv_jax.models import MIXERS, Decoder, DecoderConfig
from qkv_jax.training import estimates, liveness, sharding
from qkv_jax.training.placement import Value
from qkv_jax.training.program import Walk, traced
from tests.training.meshes import compiled, make_mesh

B, T, V = 8, 32, 89
CONFIG = DecoderConfig(
    vocab_size=V, context=T, num_layers=2, width=48, num_heads=4, num_kv_heads=2, mlp_width=80,
    use_bias=False, tie_embeddings=False, norm="rms", position="rotary", activation="relu_squared",
)  # fmt: skip
ADAMW = training.make_optimizer(training.OptimizerConfig(name="adamw"), 9)
SLOW = pytest.mark.slow
MESHES = [(1, 1, 1, 1), (2, 2, 2, 1), (1, 8, 1, 1)]
OTHERS = [(8, 1, 1, 1), (1, 1, 8, 1), (1, 2, 4, 1), (4, 1, 2, 1)]


def abstract(config):
    graphdef = None

    def create():
        nonlocal graphdef
        graphdef, params = nn.split(Decoder(config, rngs=nnx.Rngs(0)))
        return params

    params = jax.eval_shape(create)
    return training.cross_entropy_loss(graphdef), params


def tokens(rows=B):
    x = jax.ShapeDtypeStruct((rows, T), jnp.int32)
    return {"inputs": x, "targets": x}


def mesh_of(**sizes):
    config = sharding.MeshConfig(**{"data": 1} | sizes)
    devices = int(np.prod(list(sizes.values()), initial=1))
    return sharding.abstract_mesh(config, devices, batch_size=64)


def estimated(config=CONFIG, rows=B, accumulate=1, **sizes):
    loss, params = abstract(config)
    return training.estimate(
        loss, ADAMW, params, tokens(rows), mesh_of(**sizes), accumulate=accumulate
    )


# Memory


@pytest.mark.parametrize("sizes", [*MESHES, *(pytest.param(s, marks=SLOW) for s in OTHERS)])
def test_the_estimate_is_what_the_compiler_plans(sizes):
    loss, params = abstract(CONFIG)
    found = training.estimate(loss, ADAMW, params, tokens(), make_mesh(sizes), depth_first=True)
    options = {"xla_cpu_scheduler_type": "CPU_SCHEDULER_TYPE_MEMORY_OPTIMIZED"}
    plan = compiled(CONFIG, sizes, length=T, **options).memory_analysis()
    assert found.arguments == plan.argument_size_in_bytes
    assert found.temporary == pytest.approx(plan.temp_size_in_bytes, rel=0.15)


def test_recomputed_activations_are_not_held():
    kept = estimated(CONFIG)
    remat = estimated(DecoderConfig(**vars(CONFIG) | {"remat": True}))
    assert remat.temporary < 0.7 * kept.temporary
    assert remat.flops == kept.flops  # of the model: what is computed again does not count
    assert sum(f for f, _ in remat.work) > 1.2 * sum(f for f, _ in kept.work)


def test_micro_batches_hold_the_activations_of_one():
    whole, quarter = estimated(rows=4 * B), estimated(rows=4 * B, accumulate=4)
    assert quarter.temporary < whole.temporary / 2
    assert sum(f for f, _ in quarter.work) == pytest.approx(sum(f for f, _ in whole.work))


def test_what_is_only_computed_number_by_number_takes_no_memory():
    def f(x, w):
        y = jnp.tanh(2 * x + 1)  # read once, by a product: stands in memory
        return (y @ w) * 3 - 1

    x, w = jax.ShapeDtypeStruct((8, 16), jnp.float32), jax.ShapeDtypeStruct((16, 4), jnp.float32)
    program = traced(lambda w, x: f(x, w).sum(), w, x)
    assert [k.operation.name for k in liveness.kernels(program)] == [
        "tanh", "dot_general", "reduce_sum"
    ]  # fmt: skip
    assert liveness.temporary_bytes(program) == 4 * (8 * 16 + 8 * 4)


# Floating point operations


def formula(config, tokens):
    """Chowdhery et al. 2022, appendix B: 6 N + 12 L T D for each token."""
    _, params = abstract(config)
    N = nn.count(params) - V * config.width * (not config.tie_embeddings)
    N -= sum(x.size for x in jax.tree.leaves(params) if x.ndim < 2)
    if config.position == "learned":
        N -= config.context * config.width
    return tokens * (6 * N + 12 * config.num_layers * T * config.attention_dim * config.num_heads)


@pytest.mark.parametrize("tied", [True, False])
def test_the_flops_of_a_decoder_are_those_of_the_formula(tied):
    for position in ("rotary", "learned"):
        config = DecoderConfig(**vars(CONFIG) | {"tie_embeddings": tied, "position": position})
        assert estimated(config).flops == formula(config, B * T)


def test_attention_block_by_block_counts_as_all_at_once():
    def attend(implementation):
        q = jax.ShapeDtypeStruct((2, 96, 4, 16), jnp.float32)

        def f(q):
            mask = ops.masks.Causal()
            return ops.attention(q, q, q, mask=mask, implementation=implementation).sum()

        return f, q

    forward = {way: traced(*attend(way)).flops() for way in ("reference", "blockwise")}
    assert forward["blockwise"] == forward["reference"] == 2 * 2 * 2 * 96 * 96 * 4 * 16
    f, q = attend("blockwise")
    both = traced(jax.grad(f), q).flops()
    # Backward: logits again, and four products; blocks that stick out are computed whole.
    assert 3.4 < both / forward["blockwise"] < 7


@pytest.mark.slow
@pytest.mark.parametrize("name", [name for name, mixer in MIXERS.items() if mixer.causal])
def test_every_mixer_has_an_estimate(name):
    config = DecoderConfig(
        vocab_size=V, context=T, num_layers=2, width=32, num_heads=4, mlp_width=48, mixer=name,
        norm="rms", use_bias=False,
    )  # fmt: skip
    found = estimated(config, data=2, fsdp=2, tensor=2)
    assert found.temporary > 0 and found.flops > 6 * B * T * 2 * 2 * 32 * 48


# Messages


def test_fsdp_gathers_each_matrix_twice_and_scatters_its_gradient():
    found = estimated(fsdp=8).received
    block = 4 * (2 * 48 * 48 + 2 * 48 * 24 + 2 * 48 * 80)  # bytes
    head = 4 * 48 * V
    gathered = found["fsdp", "all-gather"]
    assert gathered == pytest.approx(7 / 8 * (2 * 2 * block + head), rel=0.1)
    summed = found["fsdp", "reduce-scatter"] + found["fsdp", "all-reduce"] / 2
    # The embedding's lies cut along its width before it is summed.
    assert summed == pytest.approx(7 / 8 * (2 * block + head), rel=0.1)


def test_data_sums_gradients_and_tensor_has_four_messages_a_block():
    _, params = abstract(CONFIG)
    found = estimated(data=4).received
    assert found.keys() == {("data", "all-reduce")}
    assert found["data", "all-reduce"] == pytest.approx(2 * 3 / 4 * 4 * nn.count(params), rel=0.01)
    residual = 4 * B * T * 48
    found = estimated(tensor=2).received
    gathers, scatters = (found["tensor", kind] for kind in ("all-gather", "reduce-scatter"))
    # Two of each in a block, forward and backward; the embedding and the head have their own.
    assert gathers / (residual / 2) == pytest.approx(4 * 2, abs=4)
    assert scatters / (residual / 2) == pytest.approx(4 * 2, abs=4)


def test_what_lies_elsewhere_is_sent_and_what_is_cut_is_not():
    walk = Walk({"data": 4, "fsdp": 2})
    whole, rows = ((), ()), (("data",), ())
    x = Value((8, 16), 4, whole)
    assert walk.sent(x, Value((8, 16), 4, rows, 4)) == {}
    assert walk.sent(Value((8, 16), 4, rows, 4), x) == {("data", "all-gather"): 3 / 4 * 512}
    part = Value((8, 16), 4, whole, 1, ("data", "fsdp"))
    assert walk.sent(part, x) == {("data", "all-reduce"): 768.0, ("fsdp", "all-reduce"): 512.0}
    # Scattered first: a quarter is left to sum.
    assert walk.sent(part, Value((8, 16), 4, rows, 4)) == {
        ("data", "reduce-scatter"): 384.0, ("fsdp", "all-reduce"): 128.0
    }  # fmt: skip


# Chips


def test_time_is_of_products_traffic_and_messages():
    chip = training.Chip(
        kinds=(), flops=100.0, memory=1.0, memory_speed=10.0, link_speed=4.0, neighbours=2,
        network_speed=1.0, source="",
    )  # fmt: skip
    found = training.Estimate(
        sizes={"data": 2, "fsdp": 1, "tensor": 2, "context": 1}, tokens=6, parameters=1,
        optimizer=2, batch=3, gradients=1, temporary=4, flops=600.0,
        work=((300.0, 10.0), (100.0, 20.0)),
        received={("data", "all-reduce"): 3.0, ("tensor", "all-gather"): 8.0},
    )  # fmt: skip
    assert found.devices == 4 and found.total == 10
    # Tensor's two are neighbours; data's two are two places apart.
    assert found.seconds(chip) == (3.0 + 2.0, 8 / 4 + 3 / 1)
    assert found.utilization(chip, 5.0) == 600 / (5 * 100 * 4)


def test_a_cpu_is_no_chip_that_is_known():
    assert training.chip_of(jax.devices()[0]) is None
    loss, params = abstract(CONFIG)
    mesh = sharding.make_mesh(sharding.MeshConfig(data=1), batch_size=1)
    assert training.peak_steps(loss, params, lambda: pytest.fail("not needed"), mesh) is None


def test_the_peak_of_a_mesh_is_that_of_all_its_chips(monkeypatch):
    loss, shapes = abstract(CONFIG)
    mesh = sharding.make_mesh(sharding.MeshConfig(data=2, fsdp=2), batch_size=4)
    zeros = jax.tree.map(lambda x: jnp.zeros(x.shape, x.dtype), shapes)
    params = jax.device_put(zeros, sharding.shardings(zeros, mesh))
    batch = {name: np.zeros(x.shape, x.dtype) for name, x in tokens().items()}
    monkeypatch.setattr(estimates, "chip_of", lambda _: training.CHIPS["h100"])
    found = training.peak_steps(loss, params, lambda: batch, mesh)
    assert found == 4 * 989.4e12 / formula(CONFIG, B * T)


def test_device_kinds_are_of_one_chip_each():
    kinds = [kind for chip in training.CHIPS.values() for kind in chip.kinds]
    assert len(kinds) == len(set(kinds))

    class Device:
        device_kind = "TPU v5 lite"

    assert training.chip_of(Device()) is training.CHIPS["v5e"]


# Throughput


def test_throughput_leaves_out_compilation_and_interruptions():
    now = 0.0
    speed = training.Throughput(100, 4.0, clock=lambda: now)
    now = 30.0
    speed.count(10)  # compiled
    assert speed.numbers() == {}
    now = 35.0
    speed.count(10)
    assert speed.numbers() == {"tokens_per_second": 200.0, "mfu": 0.5}
    now = 95.0
    speed.resume()  # an evaluation
    assert speed.numbers() == {"tokens_per_second": 200.0, "mfu": 0.5}  # another row of these steps
    now = 96.0
    speed.count(1)
    now = 97.0
    speed.count(3)
    assert speed.numbers() == {"tokens_per_second": 200.0, "mfu": 0.5}
    assert "mfu" not in training.Throughput(100).numbers()


def test_what_cannot_be_counted_ends_no_run(monkeypatch, caplog):
    monkeypatch.setattr(estimates, "chip_of", lambda _: training.CHIPS["h100"])
    loss, params = abstract(CONFIG)
    mesh = sharding.make_mesh(sharding.MeshConfig(data=1), batch_size=1)
    assert training.peak_steps(loss, params, lambda: {"nothing": 1}, mesh) is None
    assert "mfu is left out" in caplog.text


def test_of_a_choice_between_platforms_the_default_counts():
    """As of attention, where a kernel is preferred whose products nobody sees."""

    def f(x):
        return jax.lax.platform_dependent(x, cuda=lambda x: x, default=lambda x: x @ x).sum()

    assert traced(f, jax.ShapeDtypeStruct((16, 16), jnp.float32)).flops() == 2 * 16**3
