"""What heads look at: heads that do one thing alone are found to do it."""

import numpy as np
import pytest

from experiments import setup
from experiments.studies import training
from experiments.studies.head_roles import ROLES, _follows, head_roles, roles_of
from tests.experiments.studies import study_of

T = 40
SPACE = 7
TOKENS = np.random.RandomState(0).randint(0, 3, (2, T))
TOKENS[:, ::5] = SPACE


def one_head(look):
    """Maps [1, 1, N=1, T, T] of a head that gives all its weight where `look(tokens)` is true."""
    seen = np.stack([look(tokens) for tokens in TOKENS]) & np.tril(np.ones((T, T), bool))
    seen[~seen.any(-1)] = np.tril(np.ones((T, T), bool))[np.nonzero(~seen.any(-1))[1]]
    return (seen / seen.sum(-1, keepdims=True))[None, :, None]


HEADS = {
    "positional": one_head(lambda tokens: np.eye(T, k=-3, dtype=bool)),
    "structural": one_head(lambda tokens: np.broadcast_to(tokens == SPACE, (T, T))),
    "content": one_head(lambda tokens: _follows(tokens[None])[0]),
}


@pytest.mark.parametrize("role", ROLES)
def test_a_head_that_does_one_thing_is_found_to_do_it(role):
    roles = roles_of(HEADS[role], TOKENS, [SPACE])
    assert all(share.shape == (1, 1) for share in roles.values())
    assert roles[role][0, 0] == pytest.approx(1, abs=1e-6)
    assert all(roles[other][0, 0] < 0.7 for other in ROLES if other != role), roles


def test_a_head_that_looks_everywhere_alike_has_no_role():
    alike = one_head(lambda tokens: np.ones((T, T), bool))
    assert all(share == pytest.approx(0) for share in roles_of(alike, TOKENS, [SPACE]).values())


def test_what_followed_the_same_characters_is_found():
    tokens = np.array([[1, 2, 3, 9, 1, 2, 3, 4]])
    t, s = np.nonzero(_follows(tokens)[0])
    assert (t.tolist(), s.tolist()) == ([6], [3])  # after 1 2 3 came 9


def test_roles_are_read_off_a_trained_model(scripts, tmp_path):
    few = {
        "base.train.num_steps": 2, "base.train.eval_every": 2, "base.train.eval_batches": 1,
        "base.train.batch_size": 2, "base.data.corpus": "text_file", "base.data.context": 24,
        "base.data.path": str(scripts.corpus), "base.train.sample_tokens": 3,
    }  # fmt: skip
    run = study_of("heads", tmp_path, **few).runs[0]
    assert training.train([run], jobs=1, say=lambda _: None) == {}
    model = setup.resolve(run.config).model
    for share in head_roles(run).values():
        assert share.shape == (model["num_layers"], model["num_heads"])
        assert np.isfinite(share).all() and (share <= 1).all()
