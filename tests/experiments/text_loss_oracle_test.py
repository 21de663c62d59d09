"""The loss of hidden tokens is the one that transformers' models have on the same hidden tokens."""

import math
import re

import numpy as np
import pytest

from experiments import text_loss
from experiments.pretrained import Pretrained
from tests.experiments import runs

torch = pytest.importorskip("torch", reason="PyTorch is not installed; `make test-all` installs it")
transformers = pytest.importorskip("transformers")
tokenizers = pytest.importorskip("tokenizers")

pytestmark = pytest.mark.oracle

WORDS = sorted(set(runs.WORDS.split()))
TEXT = " ".join(WORDS[i * i % 17 % len(WORDS)] for i in range(101))
CONTEXT = 13
SIZES = {
    "hidden_size": 12, "intermediate_size": 19, "num_hidden_layers": 2, "num_attention_heads": 3,
}  # fmt: skip
CASES = {  # kind: (marks of a text's begin and end, and of what is hidden; positions)
    "Bert": (("[CLS]", "[SEP]", "[MASK]"), {"max_position_embeddings": CONTEXT}),
    "Roberta": (
        ("<s>", "</s>", "<mask>"),
        {"max_position_embeddings": CONTEXT + 2, "type_vocab_size": 1, "pad_token_id": 1},
    ),
}


@pytest.fixture(scope="module", params=CASES)
def case(request, tmp_path_factory):
    """Their model, its tokenizer, the mask's id, and a folder with both."""
    (first, last, mask), sizes = CASES[request.param]
    vocabulary = [first, "[PAD]", last, "[UNK]", mask, *WORDS]
    ids = {word: i for i, word in enumerate(vocabulary)}
    tokenizer = tokenizers.Tokenizer(tokenizers.models.WordLevel(ids, unk_token="[UNK]"))
    tokenizer.add_special_tokens(vocabulary[:5])
    tokenizer.pre_tokenizer = tokenizers.pre_tokenizers.Whitespace()
    tokenizer.post_processor = tokenizers.processors.BertProcessing((last, 2), (first, 0))
    tokenizer.enable_truncation(CONTEXT)  # as saved after training, in many a repository
    torch.manual_seed(0)
    config = getattr(transformers, f"{request.param}Config")(
        vocab_size=len(vocabulary), **SIZES, **sizes
    )
    model = getattr(transformers, f"{request.param}ForMaskedLM")(config).eval()
    with torch.no_grad():
        for parameter in model.parameters():
            parameter.add_(0.2 * torch.randn_like(parameter))
    folder = tmp_path_factory.mktemp("checkpoint")
    model.save_pretrained(folder)
    tokenizer.save(str(folder / "tokenizer.json"))
    return model, ids, mask, folder


def numbers(table):
    """{column: number} of the one row."""
    names, values = re.findall(r"^\| (.+) \|$", table, re.M)
    return dict(zip(names.split(" | "), map(float, values.split(" | ")), strict=True))


@pytest.mark.parametrize("batch_size", [1, 4])
def test_the_loss_and_the_accuracy_are_theirs_where_other_labels_are_ignored(case, batch_size):
    theirs, ids, mask, folder = case
    pretrained = Pretrained.load(str(folder))
    tokens = np.array([ids[word] for word in TEXT.split()])
    losses, right, covered, hidden = [], [], 0, 0
    for batch in text_loss.masked_windows(pretrained, tokens, batch_size):
        chosen = batch["weights"] == 1
        hidden += chosen.sum()
        assert (batch["inputs"][chosen] == ids[mask]).all()
        assert (batch["inputs"] == batch["targets"])[~chosen].all()
        assert (batch["inputs"][:, 0] == 0).all() and (batch["inputs"][:, -1] == 2).all()
        for inputs, targets, row in zip(batch["inputs"], batch["targets"], chosen, strict=True):
            if row.any():
                labels = torch.tensor(np.where(row, targets, -100).astype("int64"))[None]
                with torch.no_grad():
                    out = theirs(torch.tensor(inputs)[None].long(), labels=labels)
                losses += [float(out.loss)] * row.sum()
                right += list((out.logits[0].argmax(-1).numpy() == targets)[row])
                covered += 1
    assert covered == math.ceil(101 / (CONTEXT - 2))
    assert hidden == 2 * (covered - 1) + 1  # round(0.15 * 11); of two that are left at least one
    found = numbers(text_loss.describe(pretrained, TEXT, name="x", batch_size=batch_size))
    loss = np.mean(losses)
    assert found["nats per hidden token"] == pytest.approx(loss, abs=1e-4)
    assert found["perplexity per hidden token"] == pytest.approx(math.exp(loss), rel=1e-3)
    assert found["accuracy"] == pytest.approx(np.mean(right), abs=1e-4)
    assert found["hidden tokens"] == len(losses) == hidden
