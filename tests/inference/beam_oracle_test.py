"""Beams against those of transformers, to the token and to the score."""

import numpy as np
import pytest

from qkv_jax import inference, interop
from tests.interop.checkpoint_oracle_test import GPT2, T5, V

torch = pytest.importorskip("torch", reason="PyTorch is not installed; `make test-all` installs it")
transformers = pytest.importorskip("transformers")

pytestmark = pytest.mark.oracle

B, BEAMS, RESULTS, NEW = 3, 5, 2, 13
RANDOM = np.random.RandomState(0)
PROMPT, SOURCE = RANDOM.randint(2, V, (B, 7)), RANDOM.randint(2, V, (B, 11))
SOURCE_LENGTHS = np.array([11, 5, 7])


def pair(kind, name, fields, folder):
    """Their model, with all its parameters random, and ours."""
    torch.manual_seed(0)
    config = getattr(transformers, f"{kind}Config")(**fields)
    model = getattr(transformers, name)(config).eval()
    with torch.no_grad():
        for parameter in model.parameters():
            parameter.add_(0.2 * torch.randn_like(parameter))
    model.save_pretrained(folder)
    return model, interop.load(folder)


def theirs_of(model, inputs, mask, length_penalty, stop):
    """Tokens [B, RESULTS, NEW], after the end filled with it, and scores."""
    found = model.generate(
        torch.tensor(inputs), attention_mask=torch.tensor(mask), num_beams=BEAMS, do_sample=False,
        num_return_sequences=RESULTS, max_new_tokens=NEW, early_stopping="never",
        length_penalty=length_penalty, eos_token_id=stop, pad_token_id=stop,
        return_dict_in_generate=True, output_scores=True,
    )  # fmt: skip
    read = 1 if model.config.is_encoder_decoder else inputs.shape[1]
    tokens = found.sequences[:, read:].numpy()
    tokens = np.pad(tokens, ((0, 0), (0, NEW - tokens.shape[1])), constant_values=stop)
    return tokens.reshape(B, RESULTS, NEW), found.sequences_scores.numpy().reshape(B, RESULTS)


@pytest.mark.parametrize("kind", ["gpt2", "t5"])
def test_beams_are_theirs(kind, tmp_path):
    shared = {"num_tokens": NEW, "beams": BEAMS, "num_results": RESULTS, "context": 64}
    if kind == "gpt2":
        theirs, ours = pair("GPT2", "GPT2LMHeadModel", GPT2, tmp_path)
        inputs, mask, prompt = PROMPT, np.ones_like(PROMPT), PROMPT
    else:
        theirs, ours = pair("T5", "T5ForConditionalGeneration", T5, tmp_path)
        inputs, prompt = SOURCE, np.zeros((B, 1), int)
        mask = (np.arange(SOURCE.shape[1]) < SOURCE_LENGTHS[:, None]).astype(int)
        shared |= {"sources": SOURCE, "source_lengths": SOURCE_LENGTHS}
    free = inference.beam_search(ours.graphdef, ours.params, prompt, **shared)
    stop, ended = int(free.tokens[0, 0, 7]), 0  # one that is written
    for length_penalty in (-0.5, 0.0, 1.0, 2.0):
        wanted, scores = theirs_of(theirs, inputs, mask, length_penalty, stop)
        found = inference.beam_search(
            ours.graphdef,
            ours.params,
            prompt,
            length_penalty=length_penalty,
            stop=(stop,),
            **shared,
        )
        np.testing.assert_array_equal(found.tokens, wanted)
        np.testing.assert_allclose(found.scores, scores, rtol=1e-4, atol=1e-4)
        ended += (wanted[..., -1] == stop).sum()
    assert 0 < ended < 4 * B * RESULTS
