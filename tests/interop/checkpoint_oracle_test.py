"""Models that transformers writes are its models here, to the last digits of float32."""

import dataclasses

import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest

from qkv_jax import inference, interop, nn
from qkv_jax.interop.checkpoint import _read_config
from qkv_jax.models import (
    Decoder,
    Encoder,
    EncoderDecoder,
    alignment_maps,
    attention_maps,
    encoder_decoder_maps,
)

torch = pytest.importorskip("torch", reason="PyTorch is not installed; `make test-all` installs it")
transformers = pytest.importorskip("transformers")

pytestmark = pytest.mark.oracle

B, T, V = 2, 11, 53
LLAMA = {
    "vocab_size": V, "hidden_size": 24, "intermediate_size": 37, "num_hidden_layers": 3,
    "num_attention_heads": 6, "num_key_value_heads": 2, "max_position_embeddings": 96,
    "rms_norm_eps": 1e-5, "tie_word_embeddings": False, "pad_token_id": 0,
}  # fmt: skip
BERT = {
    "vocab_size": V, "hidden_size": 28, "intermediate_size": 31, "num_hidden_layers": 3,
    "num_attention_heads": 7, "max_position_embeddings": 40, "type_vocab_size": 2,
}  # fmt: skip
SCALED = {
    "rope_type": "llama3", "rope_theta": 10_000.0, "factor": 4.0, "low_freq_factor": 1.0,
    "high_freq_factor": 4.0, "original_max_position_embeddings": 24,
}  # fmt: skip
GEMMA = LLAMA | {
    "head_dim": 6, "query_pre_attn_scalar": 5, "sliding_window": 4, "tie_word_embeddings": True,
    "attn_logit_softcapping": 3.0, "final_logit_softcapping": 7.0,
}  # fmt: skip
T5 = {
    "vocab_size": V, "d_model": 20, "d_kv": 6, "d_ff": 31, "num_layers": 3, "num_heads": 5,
    "relative_attention_num_buckets": 8, "relative_attention_max_distance": 9,
    "decoder_start_token_id": 0,
}  # fmt: skip
GPT2 = {"vocab_size": V, "n_positions": 96, "n_embd": 20, "n_layer": 3, "n_head": 5}
CASES = {
    "gpt2": ("GPT2", GPT2),
    "gpt2 of its own width": ("GPT2", GPT2 | {"n_inner": 29, "activation_function": "gelu"}),
    "llama": ("Llama", LLAMA),
    "llama 3.1, tied": ("Llama", LLAMA | {"rope_parameters": SCALED, "tie_word_embeddings": True}),
    "llama of wide heads": ("Llama", LLAMA | {"head_dim": 10, "num_key_value_heads": 6}),
    "qwen2": ("Qwen2", LLAMA | {"num_key_value_heads": 3}),
    "qwen3": ("Qwen3", LLAMA | {"head_dim": 8}),
    "mistral": ("Mistral", LLAMA | {"sliding_window": 5}),
    "mistral without a window": ("Mistral", LLAMA | {"sliding_window": None}),
    "gemma 2": ("Gemma2", GEMMA),
    "gemma 2 of another pattern": (
        "Gemma2",
        GEMMA | {"layer_types": ["full_attention", "sliding_attention", "sliding_attention"]},
    ),
    "gemma 3": (
        "Gemma3Text",
        GEMMA
        | {
            "num_hidden_layers": 4,
            "attn_logit_softcapping": None,
            "rope_parameters": {
                "sliding_attention": {"rope_type": "default", "rope_theta": 100.0},
                "full_attention": {"rope_type": "linear", "rope_theta": 1e6, "factor": 8.0},
            },
            "layer_types": ["sliding_attention"] * 2 + ["full_attention", "sliding_attention"],
        },
    ),
    "t5": ("T5", T5),
    "t5 1.1": ("T5", T5 | {"feed_forward_proj": "gated-gelu", "tie_word_embeddings": False}),
    "bert": ("Bert", BERT),
    "roberta": ("Roberta", BERT | {"type_vocab_size": 1, "pad_token_id": 1}),
}
SAID = ("mlp_width", "num_kv_heads", "head_dim")  # what a config may leave to a default
CLASSES = {
    "GPT2": "GPT2LMHeadModel", "Bert": "BertForMaskedLM", "Roberta": "RobertaForMaskedLM",
    "Gemma3Text": "Gemma3ForCausalLM", "T5": "T5ForConditionalGeneration",
}  # fmt: skip


@pytest.fixture(scope="module", params=CASES)
def case(request, tmp_path_factory):
    """Their model, and ours from the folder that it was saved in."""
    kind, fields = CASES[request.param]
    torch.manual_seed(0)
    config = getattr(transformers, f"{kind}Config")(**fields, attn_implementation="eager")
    model = getattr(transformers, CLASSES.get(kind, f"{kind}ForCausalLM"))(config).eval()
    with torch.no_grad():  # norms and biases begin as ones and zeros, which would hide mistakes
        for parameter in model.parameters():
            parameter.add_(0.2 * torch.randn_like(parameter))
    folder = tmp_path_factory.mktemp("checkpoint")
    model.save_pretrained(folder)
    return model, interop.load(folder)


TOKENS = np.random.RandomState(0).randint(2, V, (B, T))
SOURCE = np.random.RandomState(2).randint(2, V, (B, 13))


def decodes(ours):
    return isinstance(ours.model, Decoder)


def translates(ours):
    return isinstance(ours.model, EncoderDecoder)


def logits_of(theirs, **kwargs):
    """What their model makes of TOKENS, or of SOURCE and TOKENS."""
    tokens = torch.tensor(TOKENS)
    if theirs.config.is_encoder_decoder:
        return theirs(torch.tensor(SOURCE), decoder_input_ids=tokens, **kwargs)
    return theirs(tokens, **kwargs)


def inputs_of(ours):
    """The same of ours."""
    return (SOURCE, TOKENS) if translates(ours) else (TOKENS,)


def maps_of(ours, out):
    """Pairs of ours and theirs: the weights of every layer."""
    if not translates(ours):
        stack = ours.model if decodes(ours) else ours.model.encoder
        return [(attention_maps(stack, TOKENS), out.attentions)]
    found = encoder_decoder_maps(ours.model, SOURCE, TOKENS)
    return [
        (found["encoder"], out.encoder_attentions),
        (found["decoder"], out.decoder_attentions),
        (alignment_maps(ours.model, SOURCE, TOKENS), out.cross_attentions),
    ]


def test_logits_and_every_layers_weights_are_theirs(case):
    theirs, ours = case
    with torch.no_grad():
        out = logits_of(theirs, output_attentions=True)
    scale = float(out.logits.abs().max())
    found = ours.model(*inputs_of(ours))
    np.testing.assert_allclose(found, out.logits.numpy(), atol=1e-5 * scale)
    for maps, attentions in maps_of(ours, out):
        for found, wanted in zip(maps, attentions, strict=True):
            np.testing.assert_allclose(found, wanted.numpy(), atol=1e-5)


def test_gradients_of_a_loss_are_theirs(case, tmp_path):
    theirs, ours = case
    targets = np.roll(TOKENS, 1, axis=1)
    theirs.zero_grad()
    logits = logits_of(theirs).logits.flatten(0, 1)
    torch.nn.functional.cross_entropy(logits, torch.tensor(targets).flatten()).backward()
    # Saved as a model's parameters, their gradients come back by our names.
    twin = type(theirs)(theirs.config)
    with torch.no_grad():
        for parameter, model in zip(twin.parameters(), theirs.parameters(), strict=True):
            parameter.copy_(model.grad)
    twin.save_pretrained(tmp_path)
    wanted = interop.load(tmp_path).params

    def loss(params):
        logits = nn.merge(ours.graphdef, params)(*inputs_of(ours))
        return optax.softmax_cross_entropy_with_integer_labels(logits, jnp.asarray(targets)).mean()

    found = jax.grad(loss)(ours.params)
    largest = max(float(jnp.abs(x).max()) for x in jax.tree.leaves(wanted))
    jax.tree.map(lambda x, y: np.testing.assert_allclose(x, y, atol=1e-4 * largest), found, wanted)


def test_what_we_save_transformers_loads_and_we_again_to_the_bit(case, tmp_path):
    theirs, ours = case
    interop.save(tmp_path, ours)
    again = interop.load(tmp_path)
    assert again.config == dataclasses.replace(ours.config, **{
        name: getattr(again.config, name) for name in SAID
    })  # fmt: skip
    assert again.token_ids == ours.token_ids
    for name in ("hidden", "kv_heads", "attention_dim"):
        assert getattr(again.config, name) == getattr(ours.config, name)
    jax.tree.map(np.testing.assert_array_equal, again.params, ours.params)
    loaded, said = type(theirs).from_pretrained(
        tmp_path, attn_implementation="eager", output_loading_info=True
    )
    assert not any(said[f"{kind}_keys"] for kind in ("missing", "unexpected", "mismatched"))
    with torch.no_grad():
        found, wanted = (logits_of(model).logits for model in (loaded, theirs))
    assert torch.equal(found, wanted)


def test_shards_are_read_as_one(case, tmp_path):
    theirs, ours = case
    theirs.save_pretrained(tmp_path, max_shard_size="10KB")
    assert len(list(tmp_path.glob("*.safetensors"))) > 1
    jax.tree.map(np.testing.assert_array_equal, interop.load(tmp_path).params, ours.params)


def test_bfloat16_errs_no_more_than_theirs(case, tmp_path):
    theirs, _ = case
    twin = type(theirs)(theirs.config)
    twin.load_state_dict(theirs.state_dict())
    twin.eval().to(torch.bfloat16).save_pretrained(tmp_path)
    whole = interop.load(tmp_path)  # the same rounded parameters
    exact = np.asarray(whole.model(*inputs_of(whole)))
    half = interop.load(tmp_path, param_dtype="bfloat16", dtype="bfloat16")
    assert {x.dtype for x in jax.tree.leaves(half.params)} == {jnp.dtype("bfloat16")}
    with torch.no_grad():
        theirs_half = logits_of(twin).logits.float().numpy()
    error, allowed = (
        np.sqrt(np.square(np.asarray(x) - exact).mean())
        for x in (half.model(*inputs_of(half)), theirs_half)
    )
    assert error <= 1.5 * allowed


def test_greedy_generation_is_theirs(case):
    theirs, ours = case
    if translates(ours):
        # What stands after the end is the end, as ours writes it.
        wanted = theirs.generate(
            torch.tensor(SOURCE), max_new_tokens=64, do_sample=False, eos_token_id=1,
            pad_token_id=1, attention_mask=torch.ones(SOURCE.shape, dtype=torch.int64),
        ).numpy()[:, 1:]  # fmt: skip
        lengths = np.full(B, SOURCE.shape[1])
        found = inference.translate(
            ours.graphdef, ours.params, SOURCE, lengths, begin=0, end=1, num_tokens=64
        )
        np.testing.assert_array_equal(found[:, : wanted.shape[1]], wanted)
        assert wanted.shape[1] == 64 or (np.asarray(found)[:, wanted.shape[1] :] == 1).all()
        return
    if not decodes(ours):
        pytest.skip("an encoder writes nothing")
    prompt = np.random.RandomState(1).randint(2, V, (B, 7))
    wanted = theirs.generate(
        torch.tensor(prompt), max_new_tokens=64, do_sample=False, eos_token_id=-1, pad_token_id=0,
        attention_mask=torch.ones(B, 7, dtype=torch.int64),
    )  # fmt: skip
    found = inference.generate(
        ours.graphdef, ours.params, prompt, num_tokens=64, context=96, rng=jax.random.key(0),
        top_k=1,
    )  # fmt: skip
    np.testing.assert_array_equal(found, wanted.numpy()[:, 7:])


def test_a_padded_row_is_read_as_if_it_were_alone(case):
    theirs, ours = case
    if decodes(ours):
        pytest.skip("a decoder sees nothing after a token")
    inputs = inputs_of(ours)
    mask = torch.ones(inputs[0].shape, dtype=torch.int64)
    mask[1, 6:] = 0
    with torch.no_grad():
        wanted = logits_of(theirs, attention_mask=mask).logits.numpy()[1, :6]
    name = "source_lengths" if translates(ours) else "lengths"
    found = ours.model(*inputs, **{name: np.array([inputs[0].shape[1], 6])})
    found = np.asarray(found)[1, :6]
    np.testing.assert_allclose(found, wanted, atol=1e-5 * np.abs(wanted).max())


def test_the_first_berts_named_their_norms_otherwise(tmp_path):
    model = transformers.BertForMaskedLM(transformers.BertConfig(**BERT))
    model.save_pretrained(tmp_path / "new")
    new = interop.load(tmp_path / "new")
    old = {"LayerNorm.weight": "LayerNorm.gamma", "LayerNorm.bias": "LayerNorm.beta"}
    state = {}
    for name, tensor in model.state_dict().items():
        for now, then in old.items():
            name = name.replace(now, then)
        state[name] = tensor.clone()
    (tmp_path / "old").mkdir()
    (tmp_path / "old/config.json").write_text((tmp_path / "new/config.json").read_text())
    from safetensors.torch import save_file

    save_file(state, tmp_path / "old/model.safetensors")
    jax.tree.map(np.testing.assert_array_equal, interop.load(tmp_path / "old").params, new.params)


@pytest.mark.parametrize("kind", ["Bert", "Roberta"])
def test_an_encoder_without_its_head_is_read_as_one_and_written_back(kind, tmp_path):
    fields = BERT | {"pad_token_id": 1}
    config = getattr(transformers, f"{kind}Config")(**fields)
    model = getattr(transformers, f"{kind}Model")(config, add_pooling_layer=False).eval()
    model.save_pretrained(tmp_path / "theirs")
    ours = interop.load(tmp_path / "theirs")
    assert isinstance(ours.model, Encoder)
    interop.save(tmp_path / "ours", interop.of_model(kind.lower(), ours.model))
    again, said = type(model).from_pretrained(
        tmp_path / "ours", add_pooling_layer=False, output_loading_info=True
    )
    assert not any(said[f"{kind}_keys"] for kind in ("missing", "unexpected", "mismatched"))
    with torch.no_grad():
        wanted, found = (m(torch.tensor(TOKENS)).last_hidden_state for m in (model, again))
    np.testing.assert_allclose(ours.model(TOKENS), wanted.numpy(), atol=1e-4)
    assert torch.equal(found, wanted)


def test_what_a_config_leaves_out_is_what_transformers_makes_of_it():
    kinds = {
        "Bert": "bert", "GPT2": "gpt2", "Gemma2": "gemma2", "Gemma3Text": "gemma3_text",
        "Llama": "llama", "Mistral": "mistral", "Qwen2": "qwen2", "Qwen3": "qwen3",
        "Roberta": "roberta", "T5": "t5",
    }  # fmt: skip
    assert set(kinds.values()) == set(interop.ARCHITECTURES)
    for kind, model_type in kinds.items():
        theirs = getattr(transformers, f"{kind}Config")().to_dict()
        # Not in theirs: how layer_types are made, what T5 was trained on.
        ours = dict(interop.ARCHITECTURES[model_type].defaults)
        assert ours.pop("sliding_window_pattern", None) in (None, 2, 6)
        assert ours.pop("n_positions", 512) in (512, 1024)
        assert ours == {name: theirs[name] for name in ours}


@pytest.mark.parametrize("kind", ["Gemma2", "Gemma3Text", "Mistral", "T5"])
def test_an_empty_config_is_transformers_own(kind, tmp_path):
    whole = getattr(transformers, f"{kind}Config")()
    said, left_out = (
        _read_config(tmp_path, found)[1]
        for found in (whole.to_dict(), {"model_type": whole.model_type})
    )
    assert dataclasses.replace(left_out, head_dim=left_out.attention_dim) == said


def test_a_head_beside_the_embedding_is_read_though_the_config_calls_them_tied(tmp_path):
    """As in Flan-T5, which transformers 5 also calls tied."""
    torch.manual_seed(0)
    fields = T5 | {"feed_forward_proj": "gated-gelu", "tie_word_embeddings": False}
    model = transformers.T5ForConditionalGeneration(transformers.T5Config(**fields)).eval()
    head = torch.randn(V, fields["d_model"])
    model.lm_head.weight = torch.nn.Parameter(head)
    model.save_pretrained(tmp_path)
    ours = interop.load(tmp_path)
    np.testing.assert_array_equal(ours.params["decoder"]["head"]["kernel"], head.numpy().T)
    with torch.no_grad():
        wanted = logits_of(model).logits.numpy()
    np.testing.assert_allclose(ours.model(SOURCE, TOKENS), wanted, atol=1e-5 * np.abs(wanted).max())


def test_a_gpt2_without_its_head_is_a_language_model_too(tmp_path):
    model = transformers.GPT2LMHeadModel(transformers.GPT2Config(**GPT2))
    model.save_pretrained(tmp_path / "whole")
    model.transformer.save_pretrained(tmp_path / "bare")
    whole, bare = (interop.load(tmp_path / name) for name in ("whole", "bare"))
    jax.tree.map(np.testing.assert_array_equal, whole.params, bare.params)
