"""What is the delta rule's own; `chunks_test` compares its forms with loops."""

import jax
import numpy as np
import pytest

from qkv_jax.ops.delta import delta_rule
from tests.tolerances import assert_close

B, T, N, H, h = 2, 37, 3, 5, 7


def test_a_full_correction_replaces_the_value_of_a_key():
    q, v = np.random.RandomState(0).randn(2, 1, 4, 1, 2).astype("f")
    k = np.eye(2, dtype="f")[[0, 1, 0, 1]][None, :, None]
    beta = np.array([1, 1, 1, 0], "f").reshape(1, 4, 1)
    _, state = delta_rule(q, k, v, beta)
    assert_close(state[0, 0], np.stack([v[0, 2, 0], v[0, 1, 0]]))


@pytest.mark.oracle
@pytest.mark.parametrize("chunk_size", [16, 64])
def test_gated_delta_net_is_that_of_transformers(chunk_size):
    torch = pytest.importorskip("torch")
    modeling = pytest.importorskip("transformers.models.qwen3_next.modeling_qwen3_next")
    random = np.random.RandomState(0)
    q, k = random.randn(2, B, T, N, H).astype("f")
    v, w = random.randn(2, B, T, N, h).astype("f")
    k /= np.linalg.norm(k, axis=-1, keepdims=True)
    beta = random.uniform(0, 1, (B, T, N)).astype("f")
    log_decay = -np.abs(random.randn(B, T, N)).astype("f")
    state = random.randn(B, N, H, h).astype("f")
    theirs = [torch.tensor(x, requires_grad=True) for x in (q, k, v, log_decay, beta)]
    out, last = modeling.torch_recurrent_gated_delta_rule(
        *theirs, initial_state=torch.tensor(state), output_final_state=True
    )
    (out * torch.tensor(w)).sum().backward()

    def loss(q, k, v, log_decay, beta):
        found = delta_rule(q, k, v, beta, log_decay=log_decay, state=state, chunk_size=chunk_size)
        return (found[0] * w).sum(), found

    gradients, found = jax.jit(jax.grad(loss, argnums=range(5), has_aux=True))(
        q, k, v, log_decay, beta
    )
    assert_close(found[0], out.detach())
    assert_close(found[1], last.detach())
    for gradient, x in zip(gradients, theirs, strict=True):
        assert_close(gradient, x.grad, scale=3)
