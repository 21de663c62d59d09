"""Folders of config.json and safetensors: written, read back, and refused where they are wrong."""

import dataclasses
import json
import struct

import jax
import ml_dtypes
import numpy as np
import pytest
from flax import nnx
from safetensors.numpy import load_file, save_file

from qkv_jax import interop, nn
from qkv_jax.interop.tensors import write
from qkv_jax.models import (
    Decoder,
    DecoderConfig,
    EncoderConfig,
    EncoderDecoder,
    EncoderDecoderConfig,
    MaskedLanguageModel,
    prune_heads,
)
from tests.parameters import randomised

V, T = 19, 13
GPT2 = DecoderConfig(vocab_size=V, context=T, num_layers=2, width=12, num_heads=3,
                     activation="gelu_tanh")  # fmt: skip
LLAMA = DecoderConfig(
    vocab_size=V, context=T, num_layers=2, width=12, num_heads=6, num_kv_heads=2, head_dim=4,
    mlp_width=17, activation="swiglu", norm="rms", position="rotary", use_bias=False,
    tie_embeddings=False, norm_epsilon=1e-5, rotary_scaling=(8.0, 1.0, 4.0, 8192),
)  # fmt: skip
GEMMA = dataclasses.replace(
    LLAMA, mixer="sliding_window,sliding_window,attention", window=5, num_layers=4,
    attention_scale=0.5, norm="zero_centered_rms", norm_position="both", activation="geglu",
    scale_embeddings=True, rotary_scaling=None,
)  # fmt: skip
T5 = EncoderDecoderConfig(
    vocab_size=V, context=T, num_layers=2, width=12, num_heads=3, head_dim=5, norm="rms",
    position="relative", use_bias=False, attention_scale=1.0, activation="geglu",
    tie_embeddings=False,
)  # fmt: skip
BERT = EncoderConfig(vocab_size=V, context=T, num_layers=2, width=12, num_heads=3)
MODELS = {
    "gpt2": (Decoder, GPT2),
    "llama": (Decoder, LLAMA),
    "qwen2": (Decoder, dataclasses.replace(LLAMA, qkv_bias=True, rotary_scaling=None)),
    "qwen3": (Decoder, dataclasses.replace(LLAMA, qk_norm=True)),
    "mistral": (Decoder, dataclasses.replace(LLAMA, mixer="sliding_window", window=5)),
    "gemma2": (Decoder, dataclasses.replace(GEMMA, attention_softcap=3.0)),
    "gemma3_text": (
        Decoder,
        dataclasses.replace(GEMMA, qk_norm=True, local_rotary_base=100.0, rotary_scaling=(8.0,)),
    ),
    "t5": (EncoderDecoder, T5),
    "bert": (MaskedLanguageModel, BERT),
    "roberta": (MaskedLanguageModel, dataclasses.replace(BERT, num_segments=1)),
}


def model_of(model_type):
    model, config = MODELS[model_type]
    return randomised(model(config, rngs=nnx.Rngs(0)))


@pytest.fixture
def folder(tmp_path):
    """A llama as we write it."""
    interop.save(tmp_path / "llama", interop.of_model("llama", model_of("llama")))
    return tmp_path / "llama"


def test_every_architecture_has_a_model_here():
    assert set(MODELS) == set(interop.ARCHITECTURES)


@pytest.mark.parametrize("dtype", ["float32", "bfloat16"])
@pytest.mark.parametrize("model_type", MODELS)
def test_what_is_saved_is_read_back_to_the_bit(model_type, dtype, tmp_path):
    ours = interop.of_model(model_type, model_of(model_type))
    kept = jax.tree.map(lambda x: x.astype(dtype), ours.params)
    interop.save(tmp_path / "new" / "folder", dataclasses.replace(ours, params=kept))
    again = interop.load(tmp_path / "new" / "folder", param_dtype=dtype)
    jax.tree.map(np.testing.assert_array_equal, again.params, kept)
    tokens = (np.arange(T)[None] % V,) * (2 if model_type == "t5" else 1)
    wanted = nn.merge(ours.graphdef, jax.tree.map(lambda x: x.astype("float32"), kept))(*tokens)
    loaded = interop.load(tmp_path / "new" / "folder").model
    np.testing.assert_allclose(loaded(*tokens), wanted, atol=1e-5)


def test_a_pruned_model_is_saved_where_its_layers_have_equally_many_heads(tmp_path):
    pruned = prune_heads(model_of("llama"), {0: [0, 1, 2], 1: [3, 4, 5]})  # a group of each
    interop.save(tmp_path, interop.of_model("llama", pruned))
    loaded = interop.load(tmp_path)
    assert (loaded.config.num_heads, loaded.config.num_kv_heads) == (3, 1)
    tokens = np.arange(T)[None] % V
    np.testing.assert_allclose(loaded.model(tokens), pruned(tokens), atol=1e-5)


def test_a_model_with_other_heads_in_each_layer_is_refused():
    pruned = prune_heads(model_of("llama"), {1: [3, 4, 5]})
    wanted = r"model\.heads_per_layer: .* one number of heads .* got \(\(6, 2\), \(3, 1\)\)"
    for model_type in ("llama", "gpt2"):
        with pytest.raises(ValueError, match=wanted):
            interop.of_model(model_type, pruned)
    pruned = prune_heads(model_of("gpt2"), {0: [1], 1: [2]})
    with pytest.raises(ValueError, match=r"model\.head_dim: .*'gpt2' has None, got 4"):
        interop.of_model("gpt2", pruned)


def test_a_matrix_is_written_as_it_is_and_not_as_it_lies_in_memory(tmp_path):
    matrix = np.arange(6.0, dtype="f").reshape(2, 3)
    write(tmp_path, {"transposed": matrix.T, "strided": matrix[:, ::2]})
    found = load_file(tmp_path / "model.safetensors")
    np.testing.assert_array_equal(found["transposed"], matrix.T)
    np.testing.assert_array_equal(found["strided"], matrix[:, ::2])


def change_config(folder, **changes):
    path = folder / "config.json"
    path.write_text(json.dumps(json.loads(path.read_text()) | changes))


def change_tensors(folder, change):
    path = folder / "model.safetensors"
    tensors = load_file(path)
    change(tensors)
    save_file(tensors, path)


def cut_off(folder):
    path = folder / "model.safetensors"
    path.write_bytes(path.read_bytes()[:-100])


def say_a_huge_header(folder):
    path = folder / "model.safetensors"
    path.write_bytes(struct.pack("<Q", 2**40) + path.read_bytes()[8:])


def pickled(folder):
    (folder / "model.safetensors").rename(folder / "pytorch_model.bin")


def index_of(name):
    def change(folder):
        (folder / "model.safetensors").unlink()
        index = {"weight_map": {"model.norm.weight": name}}
        (folder / "model.safetensors.index.json").write_text(json.dumps(index))

    return change


QUERY = "model.layers.1.self_attn.q_proj.weight"


@pytest.mark.parametrize(("damage", "message"), [
    (cut_off, "is no readable safetensors file"),
    (say_a_huge_header, "is no readable safetensors file"),
    (pickled, "pickle, which is never read"),
    (index_of("../elsewhere.safetensors"), r"wanted names of files beside it, got '\.\./else"),
    (index_of("missing.safetensors"), "names 'missing.safetensors', which is not there"),
    (lambda f: (f / "config.json").write_text("{"), "is no JSON"),
    (lambda f: (f / "config.json").write_text("[]"), "wanted an object, got list"),
    (lambda f: (f / "config.json").unlink(), "config.json' cannot be read"),
    (lambda f: change_config(f, model_type="mamba"), r"model_type: wanted one of .*, got 'mamba'"),
    (lambda f: change_config(f, model_type=None), "model_type: wanted one of .*, got None"),
    (lambda f: change_config(f, hidden_act="relu"), "wanted hidden_act = 'silu', got 'relu'"),
    (lambda f: change_config(f, hidden_size="x"), r"config\.json"),
    (lambda f: change_config(f, num_key_value_heads=4), r"config\.json: model\.num_kv_heads"),
    (lambda f: change_config(f, rope_parameters={"rope_type": "yarn"}), "rope_type: .* 'yarn'"),
    (lambda f: change_config(f, num_hidden_layers=3), r"no tensor 'model\.layers\.2\.input_lay"),
    (lambda f: change_config(f, num_hidden_layers=1), r"have no place .* 'model\.layers\.1\."),
    (lambda f: change_config(f, vocab_size=20), r"embed_tokens.*wanted the shape \[20, 12\]"),
    (lambda f: change_tensors(f, lambda t: t.pop(QUERY)), f"there is no tensor '{QUERY}'"),
    (lambda f: change_tensors(f, lambda t: t.update({QUERY: t[QUERY].T.copy()})),
     rf"tensor '{QUERY}': wanted the shape \[24, 12\], got \[12, 24\]"),
    (lambda f: change_tensors(f, lambda t: t.update({QUERY: t[QUERY].astype("i8")})),
     f"tensor '{QUERY}' holds int64"),
    (lambda f: change_tensors(f, lambda t: t.update(other=t[QUERY])), "the first 'other'"),
])  # fmt: skip
def test_a_damaged_folder_is_one_clear_error(folder, damage, message):
    damage(folder)
    with pytest.raises(ValueError, match=message):
        interop.load(folder)


@pytest.mark.parametrize(("model_type", "changes", "message"), [
    ("gpt2", {"norm": "rms"}, r"model\.norm: a model of type 'gpt2' has 'layer', got 'rms'"),
    ("llama", {"logit_softcap": 5.0}, r"model\.logit_softcap: .* has 0\.0, got 5\.0"),
    ("llama", {"mixer": "linear", "rotary_scaling": None}, r"model\.mixer: .* has 'attention'"),
])  # fmt: skip
def test_a_model_that_an_architecture_has_not_is_refused(model_type, changes, message):
    model, config = MODELS[model_type]
    other = model(dataclasses.replace(config, **changes), rngs=nnx.Rngs(0))
    with pytest.raises(ValueError, match=message):
        interop.of_model(model_type, other)
    with pytest.raises(ValueError, match="model: 'bert' is a MaskedLanguageModel, got Decoder"):
        interop.of_model("bert", other)
    with pytest.raises(ValueError, match="model_type: wanted one of"):
        interop.of_model("other", other)


def test_half_precision_files_become_what_is_asked_for(folder):
    exact = interop.load(folder).params
    for dtype in ("float16", ml_dtypes.bfloat16, "float64"):
        change_tensors(folder, lambda t, dtype=dtype: t.update(
            {name: x.astype(dtype) for name, x in t.items()}
        ))  # fmt: skip
        found = interop.load(folder).params
        assert {x.dtype.name for x in jax.tree.leaves(found)} == {"float32"}
        jax.tree.map(lambda x, y: np.testing.assert_allclose(x, y, rtol=1e-2), found, exact)
