"""The steps of the source texts, against their printed numbers, their loops and their promises."""

import functools
import json
from pathlib import Path

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from qkv_jax.ops import basic
from tests.tolerances import assert_close

# Inputs, weights and printed tensors of "Build a Large Language Model (From Scratch)", chapter 3.
GOLDEN = json.loads((Path(__file__).parent / "golden_ch03.json").read_text())
INPUTS = np.array(GOLDEN["inputs"], np.float32)
WEIGHTS = GOLDEN["weights_replayed"]


def assert_printed(actual, printed):
    """Equal to numbers printed with four decimals: half a unit of the last one, and rounding."""
    assert np.shape(actual) == np.shape(printed)
    np.testing.assert_allclose(actual, np.array(printed, np.float32), rtol=0, atol=5.2e-5)


def linear_weights(name):
    """Query, key and value weights of PyTorch `Linear` layers, as [D_in, D_out]."""
    return [np.array(WEIGHTS[name][key], np.float32).T for key in ("W_query", "W_key", "W_value")]


def random(seed, *shape):
    return np.random.RandomState(seed).randn(*shape).astype(np.float32)


def head_weights(num_heads=3, width_in=5, head_width=2, value_width=7, width_out=11):
    """w_query, w_key, w_value, w_out, b_out with every width a different prime."""
    return (
        random(1, width_in, num_heads * head_width),
        random(2, width_in, num_heads * head_width),
        random(3, width_in, num_heads * value_width),
        random(4, num_heads * value_width, width_out),
        random(5, width_out),
    )


# --- Softmax --------------------------------------------------------------------------------------


def test_naive_softmax_overflows_where_the_stable_one_is_right():
    right = basic.softmax(jnp.array([0.0, 1.0, 2.0]))
    large = jnp.array([1000.0, 1001.0, 1002.0])
    assert np.isinf(jnp.exp(large)).all()
    assert np.isnan(basic.naive_softmax(large)).all()
    assert_close(basic.softmax(large), right)

    small = -large[::-1]
    assert np.isnan(basic.naive_softmax(small)).all()
    assert_close(basic.softmax(small), right)


def test_naive_and_stable_softmax_agree_on_moderate_scores():
    scores = random(0, 3, 5)
    assert_close(basic.naive_softmax(scores), basic.softmax(scores))
    assert_close(basic.softmax(scores), jax.nn.softmax(scores))
    assert_close(basic.softmax(scores, axis=0), jax.nn.softmax(scores, axis=0))


def test_softmax_gradients_agree_with_jax():
    scores, direction = random(0, 3, 5), random(1, 3, 5)

    def gradient(softmax):
        return jax.grad(lambda s: (softmax(s) * direction).sum())(scores)

    assert_close(gradient(basic.softmax), gradient(jax.nn.softmax))


def test_sum_normalized_rows_sum_to_one_even_with_a_negative_weight():
    weights = basic.sum_normalized(jnp.array([2.0, -1.0, 1.0]))
    assert_close(weights, [1.0, -0.5, 0.5])


def test_integer_scores_become_floats():
    assert_close(basic.softmax([1, 2, 3]), basic.softmax([1.0, 2.0, 3.0]))
    assert_close(basic.softmax_weights([[1, 2]], [[True, False]]), [[1.0, 0.0]])


@pytest.mark.parametrize("dtype", [jnp.float16, jnp.bfloat16, jnp.float32])
def test_results_have_the_dtype_of_the_inputs(dtype):
    x, *weights = (jax.ShapeDtypeStruct(a.shape, dtype) for a in (random(0, 3, 5), *head_weights()))
    heads = functools.partial(basic.multi_head_attention, num_heads=3)
    assert jax.eval_shape(basic.causal_self_attention, x, *weights[:3]).dtype == dtype
    assert jax.eval_shape(heads, x, *weights).dtype == dtype


# --- Weights and masks ----------------------------------------------------------------------------


def test_rows_of_weights_sum_to_one():
    scores = 10 * random(0, 2, 5, 7)
    assert_close(basic.softmax_weights(scores).sum(-1), np.ones((2, 5)))
    mask = np.random.RandomState(1).rand(5, 7) < 0.5
    mask[:, 0] = True
    assert_close(basic.softmax_weights(scores, mask).sum(-1), np.ones((2, 5)))


def test_future_weights_are_exactly_zero():
    weights = basic.softmax_weights(100 * random(0, 2, 7, 7), basic.causal_mask(7))
    future = np.triu(np.ones((7, 7), bool), 1)
    assert (np.asarray(weights)[:, future] == 0).all()
    assert (np.asarray(weights)[:, 0, 0] == 1).all()


def test_a_query_that_may_attend_to_nothing_gives_zero_and_zero_gradients():
    x, weights = random(0, 3, 5), head_weights()
    mask = np.array([[True, True, False], [False, False, False], [True, False, True]])

    def second_row(x):
        return basic.multi_head_attention(x, *weights[:4], num_heads=3, mask=mask)[1].sum()

    value, gradient = jax.jit(jax.value_and_grad(second_row))(x)
    assert value == 0
    assert (gradient == 0).all()


def jacobian(attend, x):
    """[T, h, T, D]: how each output depends on each input."""
    return np.asarray(jax.jit(jax.jacobian(attend))(x))


def causal_single_head(x):
    return basic.causal_self_attention(x, *head_weights()[:3])


def causal_heads(x):
    mask = basic.causal_mask(x.shape[-2])
    return basic.multi_head_attention(x, *head_weights(), num_heads=3, mask=mask)


@pytest.mark.parametrize("attend", [causal_single_head, causal_heads])
def test_causal_outputs_have_no_gradient_with_respect_to_later_inputs(attend):
    derivative = np.abs(jacobian(attend, random(0, 7, 5))).max((1, 3))  # [T, T]
    future = np.triu(np.ones((7, 7), bool), 1)
    assert (derivative[future] == 0).all()
    assert (derivative[~future] > 0).all()


def test_self_attention_depends_on_every_input():
    weights = head_weights()[:3]
    derivative = jacobian(lambda x: basic.self_attention(x, *weights), random(0, 7, 5))
    assert (np.abs(derivative).max((1, 3)) > 0).all()


# --- Loop and matrix forms, one head and many -----------------------------------------------------


def test_the_loop_forms_equal_the_matrix_forms():
    x, weights = random(0, 7, 5), head_weights()
    assert_close(basic.simple_self_attention_loop(x), basic.simple_self_attention(x))
    assert_close(
        basic.self_attention_loop(x, *weights[:3]), basic.self_attention(x, *weights[:3]), scale=3
    )


@pytest.mark.parametrize(
    "mask",
    [None, np.tri(7, dtype=bool), np.random.RandomState(0).rand(2, 3, 7, 7) < 0.7],
    ids=["none", "causal", "per batch row and head"],
)
def test_fused_heads_equal_a_loop_over_single_heads(mask):
    x, weights = random(0, 2, 7, 5), head_weights()
    fused = basic.multi_head_attention(x, *weights, num_heads=3, mask=mask)
    looped = basic.multi_head_attention_loop(x, *weights, num_heads=3, mask=mask)
    assert fused.shape == (2, 7, 11)
    assert_close(fused, looped, scale=5)


def test_fused_heads_equal_concatenated_single_heads():
    x = random(0, 2, 7, 5)
    w_query, w_key, w_value, _, _ = head_weights()
    fused = basic.multi_head_attention(x, w_query, w_key, w_value, np.eye(21), num_heads=3)
    heads = [
        basic.self_attention(
            x,
            w_query[:, 2 * n : 2 * n + 2],
            w_key[:, 2 * n : 2 * n + 2],
            w_value[:, 7 * n : 7 * n + 7],
        )
        for n in range(3)
    ]
    assert_close(fused, np.concatenate(heads, -1), scale=3)


def test_one_head_with_an_identity_output_is_self_attention():
    x = random(0, 7, 5)
    weights = head_weights(num_heads=1)[:3]
    one_head = basic.multi_head_attention(x, *weights, np.eye(7), num_heads=1)
    assert_close(one_head, basic.self_attention(x, *weights))


def test_joining_undoes_splitting_heads():
    x = random(0, 2, 7, 15)
    heads = basic.split_heads(x, 3)
    assert_close(heads[1, 2], x[1, :, 10:15])
    assert_close(basic.join_heads(heads), x)


@pytest.mark.parametrize(
    "attend",
    [
        basic.simple_self_attention,
        lambda x: basic.self_attention(x, *head_weights()[:3]),
        lambda x: basic.causal_self_attention(x, *head_weights()[:3]),
        lambda x: basic.cross_attention(x, x[..., ::2, :], *head_weights()[:3]),
        lambda x: basic.multi_head_attention(x, *head_weights(), num_heads=3),
    ],
    ids=["simple", "self", "causal", "cross", "heads"],
)
def test_leading_batch_axes_are_independent_sequences(attend):
    x, attend = random(0, 2, 3, 7, 5), jax.jit(attend)
    batched = attend(x)
    for i, j in np.ndindex(2, 3):
        assert_close(batched[i, j], attend(x[i, j]), scale=5)


def test_cross_attention_asks_one_sequence_and_reads_another():
    x, context = random(0, 2, 7, 5), random(1, 2, 11, 3)
    w_query, w_key, w_value = random(2, 5, 13), random(3, 3, 13), random(4, 3, 13)
    output = basic.cross_attention(x, context, w_query, w_key, w_value)
    expected = jax.nn.dot_product_attention(
        (x @ w_query)[:, :, None], (context @ w_key)[:, :, None], (context @ w_value)[:, :, None]
    )[:, :, 0]
    assert output.shape == (2, 7, 13)
    assert_close(output, expected, scale=3)


def test_cross_attention_to_itself_is_self_attention():
    x, w_qkv = random(0, 7, 5), head_weights()[:3]
    assert_close(basic.cross_attention(x, x, *w_qkv), basic.self_attention(x, *w_qkv))


# --- Printed numbers ------------------------------------------------------------------------------


def test_the_book_simplified_self_attention():
    printed = GOLDEN["simple"]
    scores = basic.attention_scores(INPUTS, INPUTS)
    assert_printed(scores[1], printed["attn_scores_2"])
    assert_printed(scores, printed["attn_scores"])
    assert_printed(basic.sum_normalized(scores)[1], printed["attn_weights_2_norm"])
    assert_printed(basic.naive_softmax(scores)[1], printed["attn_weights_2"])
    weights = basic.softmax_weights(scores)
    assert_printed(weights, printed["attn_weights"])
    assert_printed(basic.context_vectors(weights, INPUTS)[1], printed["context_vec_2"])
    assert_printed(basic.simple_self_attention(INPUTS), printed["all_context_vecs"])
    assert_printed(basic.simple_self_attention_loop(INPUTS), printed["all_context_vecs"])


def test_the_book_trainable_self_attention():
    printed = GOLDEN["trainable_seed123"]
    w_qkv = [
        np.array(WEIGHTS["v1_seed123_rand(3,2)"][name], np.float32)
        for name in ("W_query", "W_key", "W_value")
    ]
    q, k, v = basic.project_qkv(INPUTS, *w_qkv)
    assert_printed(q[1], printed["query_2"])
    scores = basic.attention_scores(q, k)
    assert_printed(scores[1, 1:2], printed["attn_score_22"])
    assert_printed(scores[1], printed["attn_scores_2"])
    weights = basic.softmax_weights(basic.attention_scores(q, k, scale=2**-0.5))
    assert_printed(weights[1], printed["attn_weights_2"])
    assert_printed(basic.context_vectors(weights, v)[1], printed["context_vec_2"])
    assert_printed(basic.self_attention(INPUTS, *w_qkv), printed["SelfAttention_v1"])
    assert_printed(basic.self_attention_loop(INPUTS, *w_qkv), printed["SelfAttention_v1"])


def test_the_book_masks_the_future_of_its_second_version():
    printed = GOLDEN["SelfAttention_v2_seed789"]
    w_qkv = linear_weights("v2_seed789_linear(out2,in3)")
    assert_printed(basic.self_attention(INPUTS, *w_qkv), printed["context"])
    q, k, _ = basic.project_qkv(INPUTS, *w_qkv)
    scores, mask = basic.attention_scores(q, k), basic.causal_mask(6)
    hidden = np.array(printed["masked_scores"], np.float32)  # null, nan here: the future
    assert (np.isnan(hidden) == ~np.asarray(mask)).all()
    assert_printed(np.where(mask, scores, 0), np.nan_to_num(hidden))
    scaled = basic.attention_scores(q, k, scale=2**-0.5)
    weights = basic.softmax_weights(scaled)
    assert_printed(weights, printed["attn_weights"])
    assert_printed(basic.sum_normalized(weights * mask), printed["masked_renorm"])
    assert_printed(basic.softmax_weights(scaled, mask), printed["causal_softmax"])


def test_the_book_causal_attention_in_a_batch_of_two():
    w_qkv = linear_weights("causal_seed123_linear(out2,in3)")
    output = basic.causal_self_attention(np.stack([INPUTS, INPUTS]), *w_qkv)
    assert_printed(output, [GOLDEN["CausalAttention_seed123"]] * 2)


def test_the_book_concatenates_two_causal_heads():
    first = linear_weights("causal_seed123_linear(out2,in3)")
    second = linear_weights("wrapper_head2_seed123_continued")
    w_qkv = [np.concatenate(pair, axis=1) for pair in zip(first, second, strict=True)]
    output = basic.multi_head_attention(
        INPUTS, *w_qkv, np.eye(4), num_heads=2, mask=basic.causal_mask(6)
    )
    assert_printed(output, GOLDEN["MultiHeadAttentionWrapper_seed123_2heads"])


def test_the_book_multi_head_attention_with_an_output_projection():
    w_out = np.array(WEIGHTS["mha_seed123"]["out_proj_weight"], np.float32).T
    b_out = np.array(WEIGHTS["mha_seed123"]["out_proj_bias"], np.float32)
    w_qkv = linear_weights("mha_seed123")
    for form in (basic.multi_head_attention, basic.multi_head_attention_loop):
        output = form(INPUTS, *w_qkv, w_out, b_out, num_heads=2, mask=basic.causal_mask(6))
        assert_printed(output, GOLDEN["MultiHeadAttention_seed123_2heads_dout2"])


def test_the_book_batched_scores():
    a = np.array(
        [
            [
                [0.2745, 0.6584, 0.2775, 0.8573],
                [0.8993, 0.0390, 0.9268, 0.7388],
                [0.7179, 0.7058, 0.9156, 0.4340],
            ],
            [
                [0.0772, 0.3565, 0.1479, 0.5331],
                [0.4066, 0.2318, 0.4545, 0.9737],
                [0.4606, 0.5159, 0.4220, 0.5786],
            ],
        ],
        np.float32,
    )[None]
    scores = basic.attention_scores(a, a)
    assert scores.shape == (1, 2, 3, 3)
    assert_printed(scores.reshape(6, 3), GOLDEN["batched_matmul_demo"]["out"])


def test_the_three_token_example_recomputed_in_numpy():
    x = np.array([[1, 0, 0.5, 0.2], [0, 1, 0.3, 0.8], [0.5, 0.3, 1, 0.1]])
    random_state = np.random.RandomState(42)
    w_query, w_key, w_value = (random_state.randn(4, 3) * 0.1 for _ in range(3))
    assert w_query[0, 0] == pytest.approx(0.04967142)  # the first draw after np.random.seed(42)

    q, k, v = x @ w_query, x @ w_key, x @ w_value
    exps = np.exp(q @ k.T / np.sqrt(3))
    expected = exps / exps.sum(axis=1, keepdims=True) @ v

    assert_close(basic.self_attention(x, w_query, w_key, w_value), expected, "float32")
    assert_close(basic.self_attention_loop(x, w_query, w_key, w_value), expected, "float32")
    with jax.enable_x64(True):
        assert_close(basic.self_attention(x, w_query, w_key, w_value), expected, "float64")


# --- Bad input ------------------------------------------------------------------------------------


def bad_heads(num_heads=3, **changes):
    names = ("w_query", "w_key", "w_value", "w_out", "b_out")
    weights = dict(zip(names, head_weights(), strict=True)) | changes
    return basic.multi_head_attention(random(0, 7, 5), **weights, num_heads=num_heads)


@pytest.mark.parametrize(
    "call, message",
    [
        (lambda: basic.simple_self_attention(np.ones(5)), r"two axes.*\(5,\)"),
        (lambda: basic.simple_self_attention(np.ones((0, 5))), r"not empty.*\(0, 5\)"),
        (lambda: basic.simple_self_attention_loop(np.ones((2, 3, 5))), r"x must.*\(2, 3, 5\)"),
        (lambda: basic.self_attention_loop(np.ones((3, 5)), *[np.ones((7, 2))] * 3), "w_query"),
        (lambda: basic.attention_scores(np.ones((3, 5)), np.ones((7, 2))), r"q and k.*\(7, 2\)"),
        (lambda: basic.context_vectors(np.ones((3, 5)), np.ones((7, 2))), r"v must.*5, h.*\(7, 2"),
        (lambda: bad_heads(w_query=np.ones((7, 6))), r"w_query must.*\[5, width\].*\(7, 6\)"),
        (lambda: bad_heads(w_value=np.ones((2, 5, 21))), r"w_value must.*\(2, 5, 21\)"),
        (lambda: bad_heads(w_key=np.ones((5, 9))), "q and k must have the same width"),
        (lambda: bad_heads(w_out=np.ones((20, 11))), r"w_out must.*\[21, width\].*\(20, 11\)"),
        (lambda: bad_heads(b_out=np.ones(7)), r"b_out must.*\(11,\).*\(7,\)"),
        (lambda: bad_heads(num_heads=4), r"num_heads must divide.*6; got 4"),
        (lambda: bad_heads(num_heads=0), r"num_heads must divide.*got 0"),
        (lambda: bad_heads(mask=np.ones((7, 7))), "mask must be bool.*float"),
        (lambda: bad_heads(mask=np.ones((5, 7), bool)), r"mask must.*\(3, 7, 7\).*\(5, 7\)"),
    ],
)
def test_bad_input_is_a_value_error_that_names_the_argument(call, message):
    with pytest.raises(ValueError, match=message):
        call()
