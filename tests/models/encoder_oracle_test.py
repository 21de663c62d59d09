"""The encoder and its heads against the BERT of transformers, with the same parameters."""

import jax.numpy as jnp
import numpy as np
import pytest
from flax import nnx

from qkv_jax import nn
from qkv_jax.models.encoder import Classifier, EncoderConfig, MaskedLanguageModel, SpanClassifier
from tests.tolerances import assert_close

NEEDS = "{} is not installed; `make test-all` installs it"
torch = pytest.importorskip("torch", reason=NEEDS.format("PyTorch"))
transformers = pytest.importorskip("transformers", reason=NEEDS.format("transformers"))
pytestmark = pytest.mark.oracle

B, T, V = 3, 7, 13
CONFIG = EncoderConfig(
    vocab_size=V, context=11, num_layers=2, width=12, num_heads=2, mlp_width=17, num_classes=5,
    num_segments=2,
)  # fmt: skip
RANDOM = np.random.RandomState(0)
TOKENS = RANDOM.randint(0, V, (B, T))
SEGMENTS = RANDOM.randint(0, 2, (B, T))
LENGTHS = np.array([7, 4, 2])
REAL = np.arange(T) < LENGTHS[:, None]


def theirs(name):
    """A small BERT with random parameters, biases and norms too."""
    config = transformers.BertConfig(
        vocab_size=V, hidden_size=12, num_hidden_layers=2, num_attention_heads=2,
        intermediate_size=17, max_position_embeddings=11, num_labels=5 if "Seq" in name else 2,
        layer_norm_eps=1e-5, pad_token_id=None, attn_implementation="eager",
    )  # fmt: skip
    torch.manual_seed(0)
    model = getattr(transformers, name)(config).eval()
    with torch.no_grad():
        for parameter in model.parameters():
            parameter.copy_(torch.randn(parameter.shape) * 0.3)
    return model


def copied(model, kind):
    """Our model with their parameters; PyTorch's matrices are [outputs, inputs]."""
    arrays = {name: jnp.asarray(p.detach().numpy()) for name, p in model.named_parameters()}

    def linear(name):
        return {"kernel": arrays.pop(f"{name}.weight").T, "bias": arrays.pop(f"{name}.bias")}

    def norm(name):
        return {"scale": arrays.pop(f"{name}.weight"), "bias": arrays.pop(f"{name}.bias")}

    def block(layer):
        at = f"bert.encoder.layer.{layer}"
        attention = {n: linear(f"{at}.attention.self.{n}") for n in ("query", "key", "value")}
        return {
            "mixer": attention | {"out": linear(f"{at}.attention.output.dense")},
            "mixer_norm": norm(f"{at}.attention.output.LayerNorm"),
            "feed_forward": {
                "up": linear(f"{at}.intermediate.dense"), "down": linear(f"{at}.output.dense")
            },
            "feed_forward_norm": norm(f"{at}.output.LayerNorm"),
        }  # fmt: skip

    at = "bert.embeddings"
    params = {
        "encoder": {
            "embedding": {"embedding": arrays.pop(f"{at}.word_embeddings.weight")},
            "segments": {"embedding": arrays.pop(f"{at}.token_type_embeddings.weight")},
            "positions": {"table": arrays.pop(f"{at}.position_embeddings.weight")},
            "embedding_norm": norm(f"{at}.LayerNorm"),
            "blocks": {layer: block(layer) for layer in range(2)},
        }
    }
    if kind is MaskedLanguageModel:
        at = "cls.predictions"
        params["dense"] = linear(f"{at}.transform.dense")
        params["norm"] = norm(f"{at}.transform.LayerNorm")
        params["bias"] = arrays.pop(f"{at}.bias")
    elif kind is Classifier:
        params["pooler"], params["head"] = linear("bert.pooler.dense"), linear("classifier")
    else:
        params["head"] = linear("qa_outputs")
    assert not arrays, f"not copied: {list(arrays)}"
    graphdef, own = nn.split(kind(CONFIG, rngs=nnx.Rngs(0)))
    assert nn.count(own) == nn.count(params)
    return nn.merge(graphdef, params)


def outputs(model):
    with torch.no_grad():
        return model(
            torch.tensor(TOKENS), token_type_ids=torch.tensor(SEGMENTS),
            attention_mask=torch.tensor(REAL.astype("i")), output_hidden_states=True,
        )  # fmt: skip


def test_hidden_states_and_masked_logits():
    model = theirs("BertForMaskedLM")
    ours, expected = copied(model, MaskedLanguageModel), outputs(model)
    hidden = ours.encoder(TOKENS, segments=SEGMENTS, lengths=LENGTHS)
    assert_close(hidden[REAL], expected.hidden_states[-1].numpy()[REAL])
    logits = ours(TOKENS, segments=SEGMENTS, lengths=LENGTHS)
    assert_close(logits[REAL], expected.logits.numpy()[REAL])


def test_classes():
    model = theirs("BertForSequenceClassification")
    logits = copied(model, Classifier)(TOKENS, segments=SEGMENTS, lengths=LENGTHS)
    assert_close(logits, outputs(model).logits.numpy())


def test_spans():
    model = theirs("BertForQuestionAnswering")
    start, end = copied(model, SpanClassifier)(TOKENS, segments=SEGMENTS, lengths=LENGTHS)
    expected = outputs(model)
    assert_close(start[REAL], expected.start_logits.numpy()[REAL])
    assert_close(end[REAL], expected.end_logits.numpy()[REAL])
