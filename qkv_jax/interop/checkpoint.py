"""Models from Hugging Face's folders, and back: config.json and safetensors, never code."""

import dataclasses
import json
from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import Any

import jax
import numpy as np
from flax import nnx
from flax.traverse_util import flatten_dict, unflatten_dict

from qkv_jax import nn
from qkv_jax.data.files import read_text, write_atomically
from qkv_jax.interop.architecture import ACTIVATIONS, Architecture, Json, Tensor
from qkv_jax.interop.architectures import TABLE
from qkv_jax.interop.tensors import Tensors, dtype_of, write

CONFIG = "config.json"
TOKEN_IDS = ("bos_token_id", "eos_token_id", "pad_token_id", "decoder_start_token_id")
TIED = "lm_head.weight"  # the embedding once more, where it is the head


@dataclasses.dataclass(frozen=True)
class Checkpoint:
    """A model of a known architecture.

    Args:
      architecture: its row of `architectures.TABLE`.
      config: of the model.
      graphdef, params: the model, as `nn.split` gives it.
      token_ids: what config.json says of `TOKEN_IDS`, which no model of ours needs to know.
    """

    architecture: Architecture
    config: Any
    graphdef: nnx.GraphDef
    params: nn.Params
    token_ids: Mapping[str, Any] = dataclasses.field(default_factory=dict)

    @property
    def model(self) -> nnx.Module:
        return nn.merge(self.graphdef, self.params)


def load(folder: str | Path, *, param_dtype: str = "float32", dtype: str = "float32") -> Checkpoint:
    """A model from a folder that transformers wrote, or a copy of one on the hub.

    It reads config.json and model.safetensors (or its parts and their index), and runs nothing.

    Args:
      folder: holds them.
      param_dtype: "float32" or "bfloat16", of the parameters.
      dtype: the same, of the computation.

    Raises:
      ValueError: the architecture is unknown or has a setting that we have not, a file is damaged,
        or a tensor is missing, unknown, or of another shape or kind: it is named.
    """
    folder = Path(folder)
    said = _config_json(folder)
    architecture, config = _read_config(folder, said)
    tensors = Tensors(folder)
    if architecture.bare and not any(name.startswith(architecture.head) for name in tensors):
        architecture = architecture.bare
    config = dataclasses.replace(
        config, dtype=dtype, tie_embeddings=_is_tied(architecture, config, tensors)
    )
    graphdef, shapes = nn.split(
        nnx.eval_shape(lambda: architecture.model(config, rngs=nnx.Rngs(0)))
    )
    flat = _flat(shapes)
    found: dict[str, np.ndarray] = {}
    used: set[str] = set()
    for row in _rows(architecture, config.num_layers, flat):
        name = _present(row.theirs, tensors, architecture)
        if name is None:
            raise ValueError(f"{folder}: there is no tensor {row.theirs!r}")
        used.add(name)
        found |= _ours(row, tensors.read(name), [flat[path].shape for path in row.ours], name)
    unused = architecture.unused + ((TIED,) if config.tie_embeddings else ())
    unknown = [name for name in tensors if name not in used and not name.endswith(unused)]
    if unknown:
        raise ValueError(
            f"{folder}: {len(unknown)} tensors have no place in a model of type "
            f"{architecture.model_type!r}, the first {unknown[0]!r}"
        )
    params = _nested({path: jax.numpy.asarray(x, param_dtype) for path, x in found.items()})
    token_ids = {name: said[name] for name in TOKEN_IDS if said.get(name) is not None}
    return Checkpoint(architecture, config, graphdef, params, token_ids)


def save(folder: str | Path, checkpoint: Checkpoint) -> None:
    """Writes a folder that transformers loads by `from_pretrained`.

    Args:
      folder: is made where it is missing; the two files in it are replaced, each whole or not.
      checkpoint: its parameters are of float32 or bfloat16.

    Raises:
      ValueError: the config has a field that the architecture has not.
    """
    folder = Path(folder)
    architecture, config = checkpoint.architecture, checkpoint.config
    flat = _flat(checkpoint.params)
    dtype = dtype_of(str(next(iter(flat.values())).dtype))
    tensors = {
        row.theirs: _theirs(row, [np.asarray(flat[path], dtype) for path in row.ours])
        for row in _rows(architecture, config.num_layers, flat)
    }
    written = dict(checkpoint.token_ids) | _written_config(architecture, config)
    folder.mkdir(parents=True, exist_ok=True)
    write(folder, tensors)
    write_atomically(
        folder / CONFIG, (json.dumps(written | {"dtype": str(dtype)}, indent=2) + "\n").encode()
    )


def of_model(model_type: str, model: nnx.Module) -> Checkpoint:
    """A model of ours as a checkpoint of an architecture, to be saved.

    A pruned model is one where all of its layers have equally many heads left.

    Raises:
      ValueError: the architecture is unknown or not the model's.
    """
    architecture = _architecture(model_type)
    if architecture.bare and isinstance(model, architecture.bare.model):
        architecture = architecture.bare
    if not isinstance(model, architecture.model):
        raise ValueError(
            f"model: {model_type!r} is a {architecture.model.__name__}, got {type(model).__name__}"
        )
    graphdef, params = nn.split(model)
    config = _with_equal_heads(model.config)
    _written_config(architecture, config)  # checks that it is one
    return Checkpoint(architecture, config, graphdef, params)


# --- Configs --------------------------------------------------------------------------------------


def _config_json(folder: Path) -> Json:
    path = folder / CONFIG
    try:
        found = json.loads(read_text(path, what="the checkpoint's config"))
    except json.JSONDecodeError as error:
        raise ValueError(f"{path} is no JSON: {error}") from error
    if not isinstance(found, dict):
        raise ValueError(f"{path}: wanted an object, got {type(found).__name__}")
    return found


def _read_config(folder: Path, found: Json) -> tuple[Architecture, Any]:
    path = folder / CONFIG
    architecture = _architecture(found.get("model_type"))
    found = {**architecture.defaults, **found}
    for name, wanted in architecture.required.items():
        if found.get(name, wanted) != wanted:
            raise ValueError(f"{path}: wanted {name} = {wanted!r}, got {found[name]!r}")
    try:
        values = architecture.read(found)
        fields = {
            ours: values[theirs]
            for theirs, ours in architecture.fields.items()
            if values.get(theirs) is not None
        }
        if "activation" in fields:
            fields["activation"] = _activation(fields["activation"])
        return architecture, architecture.config(**{**fields, **architecture.fixed})
    except (KeyError, TypeError) as error:
        raise ValueError(f"{path}: a field is missing or of another type: {error}") from error
    except ValueError as error:
        raise ValueError(f"{path}: {error}") from error


def _architecture(model_type: Any) -> Architecture:
    if model_type not in TABLE:
        raise ValueError(f"model_type: wanted one of {sorted(TABLE)}, got {model_type!r}")
    return TABLE[model_type]


def _activation(theirs: Any) -> str:
    if theirs not in ACTIVATIONS:
        raise ValueError(f"activation: wanted one of {sorted(ACTIVATIONS)}, got {theirs!r}")
    return ACTIVATIONS[theirs]


def _written_config(architecture: Architecture, config: Any) -> Json:
    """config.json for a config of ours.

    Raises:
      ValueError: a field differs from what the architecture fixes or cannot say.
    """
    said = {"vocab_size", "context", "dtype", "remat", "dropout_rate", "init_std", "num_classes"}
    said |= {*architecture.fields.values(), *architecture.fixed}
    defaults = {field.name: field.default for field in dataclasses.fields(config)}
    for name, default in defaults.items():
        value = getattr(config, name)
        wanted = architecture.fixed.get(name, value if name in said else default)
        if value != wanted:
            raise ValueError(
                f"model.{name}: a model of type {architecture.model_type!r} has {wanted!r}, "
                f"got {value!r}"
            )
    values = {theirs: _value(config, ours) for theirs, ours in architecture.fields.items()}
    return {
        "architectures": [architecture.class_name],
        "model_type": architecture.model_type,
        **architecture.required,
        **architecture.write(values),
    }


def _with_equal_heads(config: Any) -> Any:
    """The config of a model, pruned or not, that says once how many heads all layers have.

    Raises:
      ValueError: they have different numbers.
    """
    heads = getattr(config, "heads_per_layer", None)
    if heads is None:
        return config
    if len(set(heads)) > 1:
        raise ValueError(
            "model.heads_per_layer: a config.json has one number of heads for all layers, got "
            f"{heads}, (heads, key/value heads) of each layer of a pruned model"
        )
    N, K = heads[0]
    fewer = None if K == N else K
    return dataclasses.replace(config, num_heads=N, num_kv_heads=fewer, heads_per_layer=None)


def _value(config: Any, name: str) -> Any:
    """A field of ours, in their terms and said out loud where ours leaves it to a default."""
    if name == "activation":
        return {ours: theirs for theirs, ours in reversed(ACTIVATIONS.items())}[config.activation]
    if name == "norm_epsilon" and config.norm_epsilon is None:
        return 1e-6 if config.norm == "rms" else 1e-5
    said = {"num_kv_heads": "kv_heads", "head_dim": "attention_dim", "mlp_width": "hidden"}
    return getattr(config, said.get(name, name))


# --- Tensors --------------------------------------------------------------------------------------


def _rows(architecture: Architecture, num_layers: int, flat: Mapping[str, Any]) -> Iterator[Tensor]:
    """The tensors of a model, a row for each layer's, without those that it has no parameter for.

    Raises:
      ValueError: a parameter stands in no row.
    """
    left = set(flat)
    for row in architecture.tensors:
        for layer in range(num_layers) if "{i}" in row.theirs else [0]:
            ours = tuple(path.replace("{i}", str(layer)) for path in row.ours)
            beside = row.beside is None or row.beside.replace("{i}", str(layer)) in flat
            if beside and left.issuperset(ours):
                left -= set(ours)
                theirs = row.theirs.replace("{i}", str(layer))
                yield dataclasses.replace(row, theirs=theirs, ours=ours)
    if left:
        raise ValueError(
            f"a model of type {architecture.model_type!r} has no parameter {min(left)!r}"
        )


def _is_tied(architecture: Architecture, config: Any, tensors: Tensors) -> bool:
    """Whether the embedding is the head, too: not where both are there, and differ (Flan-T5)."""
    if not config.tie_embeddings or TIED not in tensors:
        return config.tie_embeddings
    if all(row.theirs != TIED for row in architecture.tensors):
        return True
    rows = (row for row in architecture.tensors if row.ours[0].endswith("embedding.embedding"))
    embedding = _present(next(rows).theirs, tensors, architecture)
    return embedding is None or np.array_equal(tensors.read(embedding), tensors.read(TIED))


def _present(name: str, tensors: Tensors, architecture: Architecture) -> str | None:
    """The name under which the folder has a tensor: a model without a head has no prefix."""
    for known in (name, name.removeprefix(architecture.prefix)):
        # BERT's first checkpoints name the norms as TensorFlow did.
        older = known.replace("LayerNorm.weight", "LayerNorm.gamma")
        for spelling in (known, older.replace("LayerNorm.bias", "LayerNorm.beta")):
            if spelling in tensors:
                return spelling
    return None


def _ours(
    row: Tensor, array: np.ndarray, shapes: list[tuple[int, ...]], name: str
) -> dict[str, Any]:
    """The parameters that a tensor holds, by their paths."""
    sizes = [shape[-1] for shape in shapes]
    wanted = (*shapes[0][:-1], sum(sizes))
    in_file = wanted[::-1] if row.transposed else (wanted[0] + row.skip, *wanted[1:])
    if array.shape != in_file:
        raise ValueError(
            f"tensor {name!r}: wanted the shape {list(in_file)}, got {list(array.shape)}"
        )
    array = array.T if row.transposed else array[row.skip :]
    parts = np.split(array, np.cumsum(sizes)[:-1], axis=-1)
    return dict(zip(row.ours, parts, strict=True))


def _theirs(row: Tensor, parts: list[np.ndarray]) -> np.ndarray:
    array = np.concatenate(parts, axis=-1)
    if row.transposed:
        return array.T
    return np.concatenate([np.zeros_like(array[: row.skip]), array]) if row.skip else array


def _flat(params: nn.Params) -> dict[str, Any]:
    """Parameters by their dotted paths."""
    return {".".join(map(str, path)): x for path, x in flatten_dict(params).items()}


def _nested(flat: Mapping[str, Any]) -> nn.Params:
    """The inverse of `_flat`; numbers are places in lists."""
    return unflatten_dict({
        tuple(int(key) if key.isdigit() else key for key in path.split(".")): x
        for path, x in flat.items()
    })  # fmt: skip
