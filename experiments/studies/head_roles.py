"""What the heads of a trained language model of characters look at: place, structure, content."""

from collections.abc import Collection

import numpy as np

from experiments import setup
from experiments.studies.study import Run
from qkv_jax import nn
from qkv_jax.models import attention_maps

ROLES = ("positional", "structural", "content")
OFFSETS = 9  # distances at which a head may look by place: 0 to 8 tokens back
CONTEXT = 3  # characters that must have occurred before, for what followed them to count
DELIMITERS = frozenset(" \n\t.,:;!?()[]{}<>'\"`=-_/|*#@")


def head_roles(run: Run) -> dict[str, np.ndarray]:
    """Role -> [L, N]: how much of each head's attention goes where the role looks."""
    trained = setup.load_run(run.directory.path)
    task, batch = trained.task, next(trained.task.eval_batches())
    maps = np.asarray(attention_maps(nn.merge(trained.graphdef, trained.params), batch["inputs"]))
    vocabulary = [task.tokenizer.decode([token]) for token in range(task.vocab_size)]
    structure = [token for token, text in enumerate(vocabulary) if set(text) <= DELIMITERS]
    return roles_of(maps, np.asarray(batch["inputs"]), structure)


def roles_of(
    maps: np.ndarray, tokens: np.ndarray, structure: Collection[int]
) -> dict[str, np.ndarray]:
    """The roles from attention weights; each 0 for a head that looks everywhere alike, at most 1.

        positional      the weight at the one distance that has most, of 0 to 8 tokens
        structural      the weight on delimiters: spaces, brackets, punctuation
        content         the weight on what followed earlier occurrences of the last characters

    less what a head gives that looks at all earlier tokens alike, as a share of what it could give
    more. The same measures as Voita et al. 2019 (arxiv.org/abs/1905.09418) for positional heads,
    and as prefix matching (Olsson et al. 2022) for content; a model of characters has no words, so
    structure takes the place of syntax.

    Args:
      maps: [L, B, N, T, T], of a decoder.
      tokens: integers [B, T].
      structure: the ids that are delimiters.
    """
    T = tokens.shape[1]
    alike = np.tril(np.ones((T, T))) / np.arange(1, T + 1)[:, None]
    weights = np.concatenate([maps, np.broadcast_to(alike, (1, *maps.shape[1:]))])
    at = np.arange(T)
    late = at >= OFFSETS - 1  # all distances exist there
    by_offset = [
        np.stack([weights[..., t, t - offset] for t in at[late]], -1).mean((1, -1))
        for offset in range(OFFSETS)
    ]
    delimits = np.isin(tokens, list(structure))
    follows = _follows(tokens)
    some = follows.any(-1)  # [B, T]
    content = np.einsum("lbnts,bts->lbnt", weights, follows)
    found = {
        "positional": np.max(by_offset, axis=0),
        "structural": np.einsum("lbnts,bs->lbnt", weights, delimits)[..., late].mean((1, -1)),
        "content": np.einsum("lbnt,bt->ln", content, some) / max(some.sum(), 1),
    }
    return {
        role: (share[:-1] - share[-1:]) / np.maximum(1 - share[-1:], 1e-9)
        for role, share in found.items()
    }


def _follows(tokens: np.ndarray) -> np.ndarray:
    """Whether the characters before s are those up to t: bool [B, t, s], where s <= t."""
    B, T = tokens.shape
    same = tokens[:, :, None] == tokens[:, None, :]  # [B, t, s]
    run = np.ones((B, T, T), bool)
    for back in range(CONTEXT):  # tokens[s - 1 - back] == tokens[t - back]
        shifted = np.zeros_like(same)
        shifted[:, back:, back + 1 :] = same[:, : T - back, : T - back - 1]
        run &= shifted
    return run & np.tril(np.ones((T, T), bool))
