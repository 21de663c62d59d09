"""Meshes of the tests' eight devices, and what is compiled for them."""

import jax
import jax.numpy as jnp
from flax import nnx
from jax.sharding import NamedSharding, PartitionSpec

from qkv_jax import nn, training
from qkv_jax.models import Decoder
from qkv_jax.ops import mesh as axes
from qkv_jax.training import sharding

ROWS = 8  # of a batch


def make_mesh(sizes):
    return sharding.make_mesh(sharding.MeshConfig(*sizes), batch_size=ROWS)


def compiled(config, sizes, *, length, **options):
    """The step of AdamW, compiled for abstract arrays."""
    optimizer = training.make_optimizer(training.OptimizerConfig(name="adamw"), 9)
    graphdef, mesh = None, make_mesh(sizes)

    def create():
        nonlocal graphdef
        graphdef, params = nn.split(Decoder(config, rngs=nnx.Rngs(0)))
        return training.TrainState.create(params, optimizer)

    state = jax.eval_shape(create)
    state = jax.tree.map(
        lambda x, s: jax.ShapeDtypeStruct(x.shape, x.dtype, sharding=s),
        state, sharding.shardings(state, mesh),
    )  # fmt: skip
    by_row = NamedSharding(mesh, PartitionSpec(axes.ROWS))
    tokens = jax.ShapeDtypeStruct((ROWS, length), jnp.int32, sharding=by_row)
    with jax.set_mesh(mesh):
        loss = training.cross_entropy_loss(graphdef)
        train_step = training.make_train_step(loss, optimizer, seed=0)
        lowered = jax.jit(train_step, donate_argnums=0).lower(
            state, {"inputs": tokens, "targets": tokens}
        )
        return lowered.compile(compiler_options=options)
