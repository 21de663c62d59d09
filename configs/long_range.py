"""The Long Range Arena in small: is efficient attention as good, as fast and as frugal as claimed?

    python -m experiments.compare --config=configs/long_range.py
    python -m experiments.compare --config=configs/long_range.py:full

Encoders classify whole rows: the value of a nested expression (ListOps), the document that a
passage of bytes is from (Text), whether two passages are from one document (Retrieval), the digit
that 64 pixels show (Image). And some steps each on longer and longer rows of bytes, timed.
"""

from collections.abc import Mapping
from typing import Any

from ml_collections import ConfigDict

from configs import study

OTHER_DATA = (
    "Text: which of 10 documents of Python's instead of a review's sentiment",
    "Retrieval: one encoder reads two passages, of one document or not, instead of two encoders "
    "and citations",
    "Image: 64 pixels of a digit instead of 1,024 of a photo",
)


def models(window: int, rank: int, block: int, features: int) -> dict[str, dict[str, Any]]:
    """Name -> the fields that make the mixer. All others than the first cost O(T)."""
    return {
        "Transformer": {"model.mixer": "attention"},
        "Linformer": {"model.mixer": "linformer", "model.rank": rank},
        "Performer": {"model.mixer": "performer", "model.num_features": features},
        "Longformer": {"model.mixer": "longformer", "model.window": window},
        "BigBird": {"model.mixer": "bigbird", "model.block_size": block},
        "Nystrom": {"model.mixer": "nystrom", "model.rank": rank},
        "Linear": {"model.mixer": "linear"},
        "Local": {"model.mixer": "sliding_window", "model.window": window},
    }


def get_config(size: str = "small") -> ConfigDict:
    config = study.get_config("long_range", size)
    config.claim = (
        "On long rows exact attention is best where order and nesting count (ListOps), efficient "
        "attention comes near it on text, and takes less time and memory the longer the rows are."
    )
    config.published = (
        "ListOps / Text accuracy: Transformer 36.4 / 64.3, Linformer 35.7 / 53.9, Performer 18.0 / "
        "65.4, Longformer 35.6 / 62.9, BigBird 36.1 / 64.0, Linear 16.1 / 65.9, Local 15.8 / 53.0; "
        "at 4K bytes Performer takes 0.18 of the Transformer's time and 0.11 of its memory"
    )
    config.source = (
        "Tay et al. 2020, Long Range Arena, tables 1 and 2, arxiv.org/abs/2011.04006, and "
        "github.com/google-research/long-range-arena"
    )
    base = config.base
    base.model.update(
        num_layers=2, width=64, num_heads=2, mlp_width=128, position="learned", norm="layer",
        qk_norm=False, zero_init_outputs=False, logit_softcap=0.0, activation="gelu",
        use_bias=True,
    )  # fmt: skip
    base.train.sample_tokens = 1
    if size == "small":
        _small(config)
    else:
        _full(config)
    return config


def _small(config: ConfigDict) -> None:
    config.minutes = 23
    config.differences = (
        "2 layers of width 64",
        *OTHER_DATA,
        "rows of 40 to 257 ids, 800 steps by Muon",
        "no Pathfinder",
        "one seed",
    )
    config.seeds = (0,)
    base = config.base
    base.optimizer.update(learning_rate=5e-3, muon_learning_rate=2e-2)
    base.train.update(num_steps=800, batch_size=32, eval_every=10_000, eval_batches=64)
    tasks = {
        "ListOps": {
            "task": "listops", "data.context": 40, "data.min_length": 8, "data.max_args": 5,
        },
        "Text": {"task": "which_document", "data.context": 257, "train.batch_size": 16},
        "Retrieval": {"task": "same_document", "data.context": 257, "train.batch_size": 16},
        "Image": {"task": "digits", "data.context": 65, "data.validation_fraction": 0.2},
    }  # fmt: skip
    config.runs = (
        *_accuracy(tasks, models(window=4, rank=16, block=4, features=64)),
        *_speed((256, 1024, 4096), models(window=32, rank=32, block=32, features=64), 2),
    )


def _full(config: ConfigDict) -> None:
    config.minutes = 420
    config.differences = (
        "2 layers of width 64, as Xiong et al. 2021 reran it",
        *OTHER_DATA,
        "no Pathfinder",
    )
    base = config.base
    base.optimizer.update(name="adamw", learning_rate=1e-3, warmup_steps=1000)
    base.model.dropout_rate = 0.1
    base.train.update(batch_size=32, num_steps=5000, eval_every=1000, eval_batches=64)
    tasks = {
        "ListOps": {"task": "listops", "data.context": 2001, "data.min_length": 500},
        "Text": {"task": "which_document", "data.context": 1001, "train.num_steps": 20_000},
        "Retrieval": {"task": "same_document", "data.context": 4001},
        "Image": {"task": "digits", "data.context": 65, "data.validation_fraction": 0.2},
    }
    config.runs = (
        *_accuracy(tasks, models(window=64, rank=64, block=64, features=128)),
        *_speed((1024, 2048, 4096, 16_384), models(64, 64, 64, 128), 32),
    )


def _accuracy(tasks: Mapping[str, Mapping], mixers: Mapping[str, Mapping]) -> list[tuple]:
    return [
        study.run(f"{task}, {name}", {**fields, **more})
        for task, more in tasks.items()
        for name, fields in mixers.items()
    ]


def _speed(lengths: tuple[int, ...], mixers: Mapping[str, Mapping], batch: int) -> list[tuple]:
    """Too few steps to learn anything, one at a time."""
    few = {
        "task": "which_document", "data.num_documents": 2, "train.num_steps": 8,
        "train.batch_size": batch, "train.eval_batches": 1, "train.steps_per_dispatch": 1,
        "train.log_every": 1, "data.validation_fraction": 0.45,
    }  # fmt: skip
    return [
        study.run(f"speed at {length}, {name}", {**fields, **few, "data.context": length})
        for length in lengths
        for name, fields in mixers.items()
    ]
