"""How good translations are: exact matches and BLEU, over all pairs and by length of the source."""

from collections.abc import Sequence

import numpy as np

BUCKET = 5  # tokens of a source, from one group of lengths to the next
FEWEST = 10  # pairs that make a group


def score(
    written: Sequence[str], targets: Sequence[str], lengths: np.ndarray, tokenizer: str | None
) -> dict[str, float]:
    """Scores of P translations.

    Args:
      written: by the model.
      targets: wanted.
      lengths: of the sources, in tokens, integers [P].
      tokenizer: sacrebleu's, for BLEU; None: no BLEU.

    Returns:
      `exact_match`: the share that is the target to the letter, and `exact_match_10` of sources of
      6 to 10 tokens, and so on where there are enough; with a tokenizer also `bleu` and `bleu_10`:
      of 100.
    """
    right = np.array([a == b for a, b in zip(written, targets, strict=True)])
    groups = {f"_{top}": rows for top, rows in _by_length(lengths).items()}
    everything = {"": np.arange(len(right)), **groups}
    scores = {f"exact_match{name}": float(right[rows].mean()) for name, rows in everything.items()}
    if tokenizer is not None:
        for name, rows in everything.items():
            pairs = [written[i] for i in rows], [targets[i] for i in rows]
            scores[f"bleu{name}"] = bleu(*pairs, tokenizer)
    return scores


def bleu(written: Sequence[str], targets: Sequence[str], tokenizer: str) -> float:
    """The corpus BLEU of translations, of 100, by sacrebleu with one of its tokenizers.

    Post 2018, arxiv.org/abs/1804.08771: reports are comparable where the tokenizer is the same.
    """
    import sacrebleu

    return sacrebleu.corpus_bleu(list(written), [list(targets)], tokenize=tokenizer).score


def table(scores: dict[str, float]) -> list[str]:
    """What `score` returned, as the lines of a Markdown table."""
    columns = [name for name in ("exact_match", "bleu") if name in scores]
    prefix = "exact_match_"
    tops = [name.removeprefix(prefix) for name in scores if name.startswith(prefix)]
    labels = {"": "all"} | {f"_{top}": f"{int(top) - BUCKET + 1} to {top} tokens" for top in tops}
    lines = [f"| sources | {' | '.join(columns)} |", "|---|" + "---:|" * len(columns)]
    for suffix, label in labels.items():
        cells = " | ".join(f"{scores[name + suffix]:.4f}" for name in columns)
        lines.append(f"| {label} | {cells} |")
    return lines


def _by_length(lengths: np.ndarray) -> dict[int, np.ndarray]:
    """The longest length of a group -> the numbers of its members; groups of a few are left out."""
    tops, sizes = np.unique(-(-lengths // BUCKET) * BUCKET, return_counts=True)
    return {
        int(top): np.flatnonzero((lengths > top - BUCKET) & (lengths <= top))
        for top in tops[sizes >= FEWEST]
    }
