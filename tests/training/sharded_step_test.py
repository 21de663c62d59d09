"""Training on a mesh of eight devices is training on one; and what is compiled for it."""

import dataclasses
import functools
import re

import jax
import numpy as np
import optax
import pytest
from flax import nnx

from qkv_jax import nn, training
from qkv_jax.models import MIXERS, Decoder, DecoderConfig
from qkv_jax.training import sharding
from tests.tolerances import assert_close
from tests.training.meshes import ROWS as B
from tests.training.meshes import compiled, make_mesh

DEVICES = 8
T, V = 16, 40
LONG = 256  # tokens of a window whose attention is computed in blocks, so that keys travel
SMALL = DecoderConfig(
    vocab_size=V, context=T, num_layers=1, width=16, num_heads=8, num_kv_heads=2, head_dim=6,
    mlp_width=24, activation="swiglu", position="rotary", norm="rms", use_bias=True, qk_norm=True,
    zero_init_outputs=False, tie_embeddings=False, dropout_rate=0.2,
)  # fmt: skip
ONE = (1, 1, 1, 1)
SHAPES = [
    (data, fsdp, tensor, context)
    for data in (1, 2, 4, 8)
    for fsdp in (1, 2, 4, 8)
    for tensor in (1, 2, 4, 8)
    for context in (1, 2, 4, 8)
    if data * fsdp * tensor * context == DEVICES
]
# Rows alone; parameters cut; two key heads on eight shards of heads; tokens; three at once.
FEW = [(8, 1, 1, 1), (1, 8, 1, 1), (1, 1, 8, 1), (2, 1, 1, 4), (2, 2, 2, 1)]
LINEAR = (
    "linear", "performer", "retention", "gated_linear", "ssd", "delta", "gated_delta", "kimi_delta",
)  # fmt: skip
# What mixes tokens by neither `ops.attention` nor the linear family is the compiler's to cut along
# context, or to gather.
GATHERED = (
    "topk", "entmax", "sparsemax", "talking_heads", "cope", "bahdanau", "gated_conv",
)  # fmt: skip
SGD = optax.sgd(1.0)  # after a step, parameters differ by gradients


@pytest.fixture(autouse=True)
def partitioned_as_wanted(capfd):
    """The compiler says so where it can only gather what it is to cut otherwise."""
    yield
    assert "Involuntary full rematerialization" not in capfd.readouterr().err


def trained(
    sizes, optimizer=SGD, *, config=SMALL, length=T, steps=1, accumulate=1, zigzag=False
):  # fmt: skip
    """Parameters after some steps, and the metrics."""
    graphdef, params = nn.split(Decoder(config, rngs=nnx.Rngs(0)))
    mesh = make_mesh(sizes)
    with jax.set_mesh(mesh):
        state = sharding.placed(params, optimizer, mesh)
        wanted = jax.tree.map(lambda x: x.sharding, state)
        loss = training.cross_entropy_loss(graphdef)
        if zigzag:
            loss = training.in_zigzag(loss, sizes[-1])
        step = jax.jit(training.make_train_step(loss, optimizer, seed=0, accumulate=accumulate))
        metrics = []
        for i in range(steps):
            tokens = np.random.RandomState(i).randint(0, V, (B * accumulate, length + 1))
            state, found = step(state, {"inputs": tokens[:, :-1], "targets": tokens[:, 1:]})
            metrics.append(found)
        moved = jax.tree.map(lambda x, s: x.sharding.is_equivalent_to(s, x.ndim), state, wanted)
        assert all(jax.tree.leaves(moved)), "the state does not stay where it lay"
    return jax.device_get((state.params, metrics))


@functools.cache
def of_one_device(**options):
    return trained(ONE, **options)


def assert_trees_close(actual, expected, scale):
    for (path, x), y in zip(
        jax.tree_util.tree_leaves_with_path(actual), jax.tree.leaves(expected), strict=True
    ):
        try:
            assert_close(x, y, "float32", scale=scale)
        except AssertionError as error:
            raise AssertionError(jax.tree_util.keystr(path)) from error


def check(sizes, **options):
    """Loss and gradients, with dropout, of a model with fewer key heads than shards of heads."""
    length = LONG if sizes[-1] > 1 else T
    actual = trained(sizes, length=length, **options)
    assert_trees_close(actual, of_one_device(length=length, **options), scale=10)


@pytest.mark.parametrize("sizes", FEW)
def test_a_mesh_gives_the_loss_and_gradients_of_one_device(sizes):
    check(sizes)


@pytest.mark.slow
@pytest.mark.parametrize("sizes", [sizes for sizes in SHAPES if sizes not in FEW])
def test_every_mesh_of_eight_devices_gives_the_loss_and_gradients_of_one(sizes):
    check(sizes)


@pytest.mark.slow
def test_a_zigzag_of_tokens_changes_neither_loss_nor_gradients():
    config = dataclasses.replace(SMALL, dropout_rate=0.0)  # whose bits count places
    actual = trained((2, 1, 1, 4), config=config, length=LONG, zigzag=True)
    assert_trees_close(actual, trained(ONE, config=config, length=LONG), scale=10)


def test_there_are_twenty_meshes_of_eight_devices():
    assert len(SHAPES) == 20 and set(FEW) < set(SHAPES)


@pytest.mark.slow
@pytest.mark.parametrize("sizes", [(2, 2, 2, 1), (4, 1, 1, 2)])
def test_micro_batches_are_as_on_one_device(sizes):
    check(sizes, accumulate=2)


@pytest.mark.slow
@pytest.mark.parametrize("sizes", [(2, 2, 2, 1), (1, 8, 1, 1)])
def test_muon_whose_state_is_stacks_of_matrices_is_as_on_one_device(sizes):
    optimizer = training.make_optimizer(training.OptimizerConfig(name="muon"), 9)
    expected = trained(ONE, optimizer, steps=3)
    # Newton-Schulz iterations amplify what rounding leaves.
    assert_trees_close(trained(sizes, optimizer, steps=3), expected, scale=100)


def check_mixer(name, sizes):
    config = DecoderConfig(
        vocab_size=V, context=LONG, num_layers=2, width=16, num_heads=4, mlp_width=24, mixer=name,
        norm="rms", use_bias=False, zero_init_outputs=False,
    )  # fmt: skip
    check(sizes, config=config)


@pytest.mark.slow
@pytest.mark.parametrize("sizes", [(2, 2, 2, 1), (2, 1, 2, 2)])
@pytest.mark.parametrize("name", [name for name, mixer in MIXERS.items() if mixer.causal])
def test_every_mixer_gives_the_loss_and_gradients_of_one_device(name, sizes, capfd):
    check_mixer(name, sizes)
    if sizes[-1] > 1 and name in GATHERED:
        capfd.readouterr()


@pytest.mark.slow
@pytest.mark.parametrize("sizes", [(2, 1, 1, 4), (1, 2, 2, 2)])
@pytest.mark.parametrize("name", LINEAR)
def test_states_that_travel_give_the_loss_and_gradients_of_one_device(name, sizes):
    check_mixer(name, sizes)


def test_a_checkpoint_is_restored_onto_other_meshes_to_the_bit(tmp_path):
    _, params = nn.split(Decoder(SMALL, rngs=nnx.Rngs(0)))
    optimizer = optax.adamw(1e-3)
    before = sharding.placed(params, optimizer, make_mesh((1, 4, 2, 1)))
    with training.Checkpointer(tmp_path) as checkpointer:
        checkpointer.save(3, before)
    for sizes in ((8, 1, 1, 1), (2, 2, 2, 1), ONE):
        like = sharding.placed(params, optimizer, make_mesh(sizes))
        _, after = training.load_checkpoint(tmp_path, like)
        for x, y, z in zip(*map(jax.tree.leaves, (after, before, like)), strict=True):
            assert x.sharding.device_set == z.sharding.device_set, sizes
            assert np.asarray(x).tobytes() == np.asarray(y).tobytes(), sizes
            assert x.addressable_shards[0].data.shape == z.addressable_shards[0].data.shape


# What is compiled


def test_no_device_of_context_ever_holds_anything_of_all_tokens():
    """Keys and their gradients travel: nothing is gathered, and no array is that long."""
    text = compiled(SMALL, (1, 1, 1, 4), length=LONG).as_text()
    assert "all-gather" not in text
    shard = rf"f32\[{B},{LONG // 4},{SMALL.num_kv_heads},{SMALL.head_dim}\]"
    assert len(re.findall(rf"= {shard}\S* collective-permute(?:-start)?\(", text)) >= 4
    assert re.findall(rf"f\d+\[(?:\d+,)*{LONG}(?:,\d+)*\]", text) == []


@pytest.mark.parametrize("mixer", ["linear", "gated_delta"])
def test_of_a_recurrence_that_context_cuts_nothing_travels_but_states(mixer):
    """And the last tokens of a shard, to the convolution of the next one."""
    heads, length = 2, 4 * 52  # that no other axis has
    config = DecoderConfig(
        vocab_size=V, context=length, num_layers=1, width=16, num_heads=heads, head_dim=6,
        mixer=mixer, position="none", mlp_width=24, norm="rms", use_bias=False,
    )  # fmt: skip
    text = compiled(config, (1, 1, 1, 4), length=length).as_text()
    gathered = re.findall(r"= f32\[([\d,]*)\]\S* all-gather(?:-start)?\(", text)
    assert gathered and all(shape.startswith(f"4,{B},{heads},") for shape in gathered)
    sent = re.findall(r"= f32\[([\d,]*)\]\S* collective-permute(?:-start)?\(", text)
    assert all(int(shape.split(",")[1]) < config.conv_width for shape in sent)
    assert re.findall(rf"f\d+\[{B},(?:\d+,)*{length}(?:,\d+)*\]", text) == []


def test_no_layer_of_fsdp_is_whole_while_another_one_is():
    """Each matrix is gathered twice, forward and backward, and forgotten before the next layer."""
    D, F, layers = 32, 48, 3
    config = DecoderConfig(
        vocab_size=V, context=T, num_layers=layers, width=D, num_heads=2, mlp_width=F, norm="rms",
        position="rotary", use_bias=False, activation="relu_squared",
    )  # fmt: skip
    # A CPU's own scheduler wants concurrency and gathers all at once; other devices' want memory.
    options = {"xla_cpu_scheduler_type": "CPU_SCHEDULER_TYPE_MEMORY_OPTIMIZED"}
    count, alive = gathers(compiled(config, (1, 8, 1, 1), length=T, **options).as_text())
    assert count.pop((D, V), 0) + count.pop((V, D), 0) >= 1  # the head
    assert count == {
        shape: 2 * layers * number for shape, number in {(D, D): 4, (D, F): 1, (F, D): 1}.items()
    }
    assert alive <= 4 * (4 * D * D + 2 * D * F)  # bytes of one layer


def gathers(text):
    """For each shape of gathered matrices how often one is, and the most bytes alive at once."""
    assert "is_scheduled=true" in text
    lines = [
        found.groups()
        for line in text[text.index("\nENTRY") :].splitlines()
        if (found := re.match(r"\s+(?:ROOT )?%(\S+) = (.*?)(?:, metadata=.*)?$", line))
    ]
    last = {
        name: i for i, (_, body) in enumerate(lines) for name in re.findall(r"%([\w.-]+)", body)
    }
    count: dict[tuple[int, int], int] = {}
    alive = np.zeros(len(lines), int)
    for i, (name, body) in enumerate(lines):
        if found := re.match(r"f32\[(\d+),(\d+)\]\S* all-gather\(", body):
            rows, columns = map(int, found.groups())
            count[rows, columns] = count.get((rows, columns), 0) + 1
            alive[i : last[name] + 1] += 4 * rows * columns
    return count, alive.max()


@pytest.mark.slow
def test_eight_devices_of_fsdp_hold_less_than_a_sixth_of_gpt2_each():
    """What `memory_analysis()` says of parameters and AdamW's state."""
    config = DecoderConfig(
        vocab_size=50_257, context=1024, num_layers=12, width=768, num_heads=12, position="learned",
        norm="layer", use_bias=True, tie_embeddings=True, qk_norm=False,
    )  # fmt: skip
    whole, part = (
        compiled(config, sizes, length=32).memory_analysis().argument_size_in_bytes
        for sizes in (ONE, (1, 8, 1, 1))
    )
    assert whole > 3 * 4 * 124e6
    assert part <= whole / 6
