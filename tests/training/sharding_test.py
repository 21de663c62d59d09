"""A mesh: what lies where on it, and what a user can get wrong."""

import jax
import numpy as np
import pytest
from flax import nnx
from jax.sharding import AbstractMesh, AxisType

from qkv_jax import nn, training
from qkv_jax.models import Decoder, DecoderConfig
from qkv_jax.nn.sharding import parameter_axes
from qkv_jax.ops.mesh import AXES
from qkv_jax.training import sharding
from qkv_jax.training.packing import leaf_names

CONFIG = DecoderConfig(
    vocab_size=97, context=7, num_layers=3, width=16, num_heads=4, num_kv_heads=2, mlp_width=24,
    use_bias=True, tie_embeddings=False,
)  # fmt: skip
ADAMW = training.make_optimizer(training.OptimizerConfig(name="adamw"), 9)


def params():
    return nn.split(Decoder(CONFIG, rngs=nnx.Rngs(0)))[1]


def abstract_mesh(*sizes):
    return AbstractMesh(sizes, AXES, axis_types=(AxisType.Auto,) * len(AXES))


def operations(jaxpr):
    """Every operation and what it returns, in order, those of inner programs too."""
    for equation in jaxpr.eqns:
        yield equation.primitive.name, [str(x.aval) for x in equation.outvars]
        for leaf in jax.tree.leaves(list(equation.params.values()), is_leaf=is_jaxpr):
            if is_jaxpr(leaf):
                yield from operations(leaf)


def is_jaxpr(x):
    return hasattr(x, "eqns")


def test_a_mesh_of_one_device_changes_nothing_of_a_step():
    graphdef, start = nn.split(Decoder(CONFIG, rngs=nnx.Rngs(0)))
    step = training.make_train_step(training.cross_entropy_loss(graphdef), ADAMW, seed=0)
    state = training.TrainState.create(start, ADAMW)
    tokens = np.zeros((2, CONFIG.context), np.int32)
    batch = {"inputs": tokens, "targets": tokens}
    without = list(operations(jax.make_jaxpr(step)(state, batch)))
    with jax.set_mesh(sharding.make_mesh(sharding.MeshConfig(), batch_size=1)):
        assert list(operations(jax.make_jaxpr(step)(state, batch))) == without
    assert ("dot_general", ["float32[14,24]"]) in without  # of tokens in one axis


# What lies where


@pytest.mark.parametrize(
    ("path", "shape", "axes"),
    [
        ("blocks/0/mixer/query/kernel", (16, 24), (("fsdp",), ("tensor",))),
        ("opt_state/0/mu/blocks/0/mixer/out/kernel", (24, 16), (("tensor",), ("fsdp",))),
        ("embedding/embedding", (40, 16), (("tensor",), ("fsdp",))),
        ("embedding/embedding", (41, 16), (None, ("fsdp", "tensor"))),  # tensor moves
        ("blocks/0/mixer/query/kernel", (15, 24), (None, ("tensor", "fsdp"))),
        ("blocks/0/mixer/query/kernel", (15, 23), (None, None)),
        ("blocks/0/mixer/query/bias", (24,), (("tensor",),)),
        ("blocks/0/mixer_norm/scale", (16,), (None,)),
        ("muon/mu/16x24", (6, 16, 24), (("fsdp",), None, ("tensor",))),
        ("muon/mu/16x24", (5, 16, 24), (None, ("fsdp",), ("tensor",))),
        ("blocks/0/mixer/anything", (64, 64), (("fsdp",), None)),
        ("blocks/0/mixer/anything", (8, 8), (None, None)),  # few numbers
        ("step", (), ()),
    ],
)
def test_the_end_of_a_path_says_what_cuts_a_parameter(path, shape, axes):
    assert parameter_axes(path, shape, {"data": 3, "fsdp": 2, "tensor": 4}) == axes


def test_parameters_have_rules_for_all_their_matrices():
    """None of a decoder's matrices is left whole, or cut by fsdp alone."""
    for name, leaf in zip(leaf_names(params()), jax.tree.leaves(params()), strict=True):
        cut = {axis for axes in parameter_axes(name, leaf.shape, {"fsdp": 2, "tensor": 2})
               for axis in axes or ()}  # fmt: skip
        if leaf.ndim == 2 and name != "positions/table":
            assert cut == {"fsdp", "tensor"}, name


def test_the_plan_says_what_each_device_holds():
    table = sharding.plan(params(), ADAMW, abstract_mesh(2, 2, 2, 1))
    rows = {
        cells[0]: cells[1:]
        for line in table.splitlines()
        if len(cells := [cell.strip() for cell in line.strip("|").split("|")]) == 5
    }
    head = 4 * 16 * 97
    assert rows["head/kernel"] == [
        "16 x 97", "fsdp+tensor, -", f"{head:,}", f"{head // 4:,}"
    ]  # fmt: skip
    up = 3 * 4 * 16 * 24
    assert rows["blocks/*/feed_forward/up/kernel"] == [
        "3 of 16 x 24", "fsdp, tensor", f"{up:,}", f"{up // 4:,}"
    ]  # fmt: skip
    whole = 4 * nn.count(params())
    assert rows["parameters"][2] == f"{whole:,}"
    assert rows["optimizer"][2] == f"{2 * whole + 8:,}"  # two moments, two counts of steps
    here = int(rows["parameters"][3].replace(",", ""))
    assert whole / 4 < here < whole / 3
    assert int(rows["all of these"][3].replace(",", "")) == pytest.approx(4 * here, rel=1e-3)


# What a user can get wrong


def wrong(**sizes):
    with pytest.raises(ValueError) as error:
        sharding.make_mesh(sharding.MeshConfig(**sizes), batch_size=6)
    return str(error.value)


def test_a_mesh_that_cannot_be_is_one_sentence_that_names_it():
    assert "mesh.fsdp: wanted an integer >= 1, or -1, got 0" in wrong(fsdp=0)
    assert "mesh.tensor" in wrong(tensor=-2)
    assert "at most one axis of -1" in wrong(data=-1, fsdp=-1)
    said = wrong(data=1, tensor=16)
    assert "takes 16 devices" in said and "the 8 there are" in said and "cpu_devices" in said


def test_rows_that_devices_cannot_share_are_an_error_and_the_rest_takes_what_divides():
    """Without devices: what `make_mesh` makes of eight."""

    def of_eight(batch_size, **sizes):
        return tuple(sharding.axis_sizes(sharding.MeshConfig(**sizes), 8, batch_size).values())

    assert of_eight(16) == (8, 1, 1, 1)
    assert of_eight(12) == (6, 1, 1, 1)
    assert of_eight(7) == (7, 1, 1, 1)
    assert of_eight(4, fsdp=2) == (2, 2, 1, 1)
    assert of_eight(4, data=1, fsdp=-1, tensor=2) == (1, 4, 2, 1)
    assert of_eight(4, data=1, tensor=4) == (1, 1, 4, 1)
    for sizes in ({"data": 1, "fsdp": 8}, {"data": 1, "fsdp": -1}, {"fsdp": 8}):
        with pytest.raises(ValueError, match=r"batch_size: wanted a multiple of the 8 .* got 12"):
            of_eight(12, **sizes)
