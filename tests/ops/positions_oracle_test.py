"""Positions against the code of Hugging Face's transformers."""

import jax
import numpy as np
import pytest

from qkv_jax.ops import positions
from tests.tolerances import assert_close

NEEDED = "is not installed; `make test-all` installs it"
torch = pytest.importorskip("torch", reason=f"PyTorch {NEEDED}")
pytest.importorskip("transformers", reason=f"transformers {NEEDED}")
pytestmark = pytest.mark.oracle


@pytest.mark.parametrize("bidirectional", [True, False])
@pytest.mark.parametrize(("num_buckets", "max_distance"), [(32, 128), (16, 40), (8, 20)])
def test_t5_buckets(bidirectional, num_buckets, max_distance):
    from transformers.models.t5.modeling_t5 import T5Attention

    relative = np.arange(-300, 301)
    expected = T5Attention._relative_position_bucket(
        torch.tensor(relative), bidirectional, num_buckets, max_distance
    )
    buckets = positions.t5_buckets(
        relative, num_buckets=num_buckets, max_distance=max_distance, bidirectional=bidirectional
    )
    np.testing.assert_array_equal(buckets, expected.numpy())


@pytest.mark.parametrize("num_heads", [1, 2, 3, 8, 12, 20])
def test_alibi_slopes(num_heads):
    from transformers.models.bloom.modeling_bloom import build_alibi_tensor

    bias = build_alibi_tensor(torch.ones(1, 2), num_heads, torch.float32)  # [N, 1, S]: slope * s
    assert_close(positions.alibi_slopes(num_heads), bias[:, 0, 1].numpy())


def test_rotary_of_llama():
    from transformers.models.llama.modeling_llama import apply_rotary_pos_emb

    B, T, N, H = 2, 5, 3, 14
    x = np.random.RandomState(0).randn(B, T, N, H)
    where = np.array([[0, 1, 2, 3, 4], [7, 3, 90, 4, 5]])
    angles = where[..., None] * positions.rotary_frequencies(H, 500.0)
    angles = torch.tensor(np.concatenate([angles, angles], axis=-1))
    turned, _ = apply_rotary_pos_emb(
        torch.tensor(x).transpose(1, 2), torch.tensor(x).transpose(1, 2), angles.cos(), angles.sin()
    )
    with jax.enable_x64(True):
        ours = positions.rotary(x, where, base=500.0, layout="half_split")
        assert_close(ours, turned.transpose(1, 2).numpy(), scale=10)


@pytest.mark.parametrize("truncate", [True, False])
@pytest.mark.parametrize(
    ("base", "factor", "length"), [(10_000.0, 4.0, 4096), (150_000.0, 32.0, 4096)]
)
def test_yarn(base, factor, length, truncate):
    from transformers import LlamaConfig
    from transformers.modeling_rope_utils import ROPE_INIT_FUNCTIONS

    width = 64
    config = LlamaConfig(
        hidden_size=2 * width,
        num_attention_heads=2,
        max_position_embeddings=int(length * factor),
        rope_parameters={
            "rope_type": "yarn",
            "rope_theta": base,
            "factor": factor,
            "original_max_position_embeddings": length,
            "truncate": truncate,
        },
    )
    expected, attention_factor = ROPE_INIT_FUNCTIONS["yarn"](config, "cpu")
    ours = positions.yarn_frequencies(
        width, base, factor=factor, original_length=length, truncate=truncate
    )
    assert_close(ours / expected.numpy(), np.ones(width // 2), dtype="float32")
    assert positions.yarn_attention_factor(factor) == pytest.approx(attention_factor)
