"""What heads do, as numbers."""

import numpy as np
import pytest
import scipy.optimize
import scipy.stats

from qkv_jax.models import measures
from tests.tolerances import assert_close

L, B, N, T = 3, 2, 5, 7
RNG = np.random.RandomState(0)
RAW = np.tril(RNG.rand(L, B, N, T, T)) ** 3
MAPS = (RAW / RAW.sum(-1, keepdims=True)).astype("f")  # a decoder's


def test_entropy_is_scipys():
    wanted = scipy.stats.entropy(MAPS, axis=-1).mean((1, 3))
    assert_close(measures.entropy(MAPS), wanted)
    wide = np.full((1, 1, 1, T, 11), 1 / 11, "f")
    assert_close(measures.entropy(wide), [[np.log(11)]])


def test_the_mean_distance_is_that_of_what_is_looked_at():
    wanted = np.zeros((L, N))
    for t in range(T):
        for s in range(T):
            wanted += MAPS[:, :, :, t, s].mean(1) * abs(t - s) / T
    assert_close(measures.mean_distance(MAPS), wanted)


def test_a_sink_is_what_the_later_tokens_give_to_the_first():
    maps = np.zeros((1, 1, 2, T, T), "f")
    maps[0, 0, 0, :, 0] = 1  # all to the first
    maps[0, 0, 1] = np.eye(T)  # each to itself: the first too
    assert_close(measures.first_token(maps), [[1, 0]])


def test_rollout_is_the_product_of_the_layers_with_what_they_keep():
    found = np.asarray(measures.rollout(MAPS))
    assert found.shape == (L, B, T, T)
    for b in range(B):
        product = np.eye(T)
        for layer in range(L):
            product = (MAPS[layer, b].mean(0) / 2 + np.eye(T) / 2) @ product
            assert_close(found[layer, b], product)
    assert_close(found.sum(-1), np.ones((L, B, T)))


def test_flow_is_the_maximum_of_the_linear_programme():
    token, maps = T - 2, MAPS[:, 0]
    capacity = [(layer.mean(0) + np.eye(T)) / 2 for layer in maps]
    # Flows f[l, t, s] from t above layer l to s below; nothing is lost between the two ends.
    bounds = [(0, float(c)) for layer in capacity for c in layer.ravel()]
    for s in range(T):
        conserved, gain = [], np.zeros(L * T * T)
        of = np.arange(L * T * T).reshape(L, T, T)
        gain[of[-1, token]] = 1
        for layer in range(L):
            for t in range(T):
                row = np.zeros(L * T * T)
                row[of[layer, t]] += 1  # down from t
                if layer < L - 1:
                    row[of[layer + 1, :, t]] -= 1  # down to t
                    conserved.append(row)
                elif t != token:
                    conserved.append(row)
        for other in set(range(T)) - {s}:
            row = np.zeros(L * T * T)
            row[of[0, :, other]] = 1
            conserved.append(row)
        best = scipy.optimize.linprog(
            -gain, A_eq=np.array(conserved), b_eq=np.zeros(len(conserved)), bounds=bounds
        )
        assert measures.flow(maps, token)[s] == pytest.approx(-best.fun, abs=1e-5)


def test_what_flows_is_at_most_what_the_last_layer_reads():
    one = measures.flow(MAPS[:1, 0], 3)
    np.testing.assert_allclose(one, (MAPS[0, 0].mean(0) / 2 + np.eye(T) / 2)[3], atol=1e-6)
    with pytest.raises(ValueError, match=r"token: wanted a place in \[0, 7\), got 7"):
        measures.flow(MAPS[:, 0], T)


def test_prefix_matching_is_the_weight_on_what_followed_the_same_token():
    rng = np.random.RandomState(0)
    maps = np.tril(rng.rand(L, B, N, 11, 11)).astype("f")
    tokens = np.array([[3, 1, 2, 3, 1, 3, 0, 0, 4, 5, 6], np.arange(11)])  # one row never repeats
    found = np.asarray(measures.prefix_matching(maps, tokens))
    # By hand: the places of tokens that came before, with the places after those.
    after = {3: [1], 4: [2], 5: [1, 4], 7: [7]}
    wanted = sum(maps[:, 0, :, t, places].sum(0) for t, places in after.items()) / len(after)
    assert found.shape == (L, N)
    assert_close(found, wanted)
    assert np.isnan(np.asarray(measures.prefix_matching(maps, tokens[[1, 1]]))).all()


def test_a_head_that_looks_at_the_token_before_is_seen_to():
    maps = np.zeros((L, B, N, T, T), "f")
    maps[..., 0, 0] = 1
    for t in range(1, T):
        maps[..., t, t - 1] = 1
    maps[1] = np.eye(T)
    maps[2, 1, 0] = np.eye(T)
    np.testing.assert_allclose(
        measures.previous_token(maps), [[1] * N, [0] * N, [0.5] + [1] * (N - 1)], atol=1e-6
    )
