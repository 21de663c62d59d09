"""What an architecture of Hugging Face is here: its config in ours, its tensors in ours.

An `Architecture` is all that one needs: no model code. Names with {i} stand for a layer.
"""

import dataclasses
from collections.abc import Callable, Mapping
from typing import Any

from flax import nnx

Json = dict[str, Any]


@dataclasses.dataclass(frozen=True)
class Tensor:
    """One tensor of theirs and the parameters of ours that it holds.

    Args:
      theirs: its name.
      ours: dotted paths of parameters; several lie side by side along its last axis.
      transposed: theirs is [out, in], ours [in, out].
      skip: rows at the beginning of theirs that ours has not, which are written as zeros.
      beside: a parameter of ours without which there is no such tensor.
    """

    theirs: str
    ours: tuple[str, ...]
    transposed: bool = False
    skip: int = 0
    beside: str | None = None


@dataclasses.dataclass(frozen=True)
class Architecture:
    """An architecture of transformers.

    Args:
      model_type: in config.json.
      class_name: transformers' class, for `architectures` in a config.json that we write.
      config, model: ours.
      fields: name in config.json -> our field of the same meaning.
      fixed: our fields that it decides.
      defaults: transformers' own, of what a config.json leaves out.
      required: name in config.json -> the only value that we have; absent means that value.
      tensors: see `Tensor`. A parameter that a config has not, such as a bias, is passed over; what
        two rows could hold, the first does.
      prefix: of the tensors in a model with a head, which a model without one lacks.
      unused: endings of names whose tensors hold nothing that we need.
      read: changes a config.json before `fields` read it; write: the inverse.
      bare: the same without a head, for a folder that has no tensor whose name begins with `head`.
    """

    model_type: str
    class_name: str
    config: type
    model: type[nnx.Module]
    fields: Mapping[str, str]
    fixed: Mapping[str, Any]
    defaults: Mapping[str, Any]
    required: Mapping[str, Any]
    tensors: tuple[Tensor, ...]
    prefix: str
    unused: tuple[str, ...] = ()
    read: Callable[[Json], Json] = dict
    write: Callable[[Json], Json] = dict
    bare: "Architecture | None" = None
    head: str = ""


# Their activations -> ours; where several are one of ours, the first is written.
ACTIVATIONS = {
    "gelu": "gelu", "gelu_new": "gelu_tanh", "gelu_pytorch_tanh": "gelu_tanh", "relu": "relu",
    "gated-gelu": "geglu", "gated-silu": "swiglu",
}  # fmt: skip


def linear(theirs: str, *ours: str, transposed: bool = True) -> tuple[Tensor, ...]:
    """The rows of a linear layer."""
    return (
        Tensor(f"{theirs}.weight", tuple(f"{path}.kernel" for path in ours), transposed),
        Tensor(f"{theirs}.bias", tuple(f"{path}.bias" for path in ours)),
    )


def norm(theirs: str, ours: str) -> tuple[Tensor, ...]:
    """The rows of a norm."""
    return (
        Tensor(f"{theirs}.weight", (f"{ours}.scale",)),
        Tensor(f"{theirs}.bias", (f"{ours}.bias",)),
    )


def table(theirs: str, ours: str, skip: int = 0) -> tuple[Tensor, ...]:
    """The row of an embedding."""
    return (Tensor(f"{theirs}.weight", (ours,), skip=skip),)
