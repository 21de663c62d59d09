"""What a model learns: it decides the model, its batches, and what is measured and shown.

Another task is another class in this package, with a name in `TASKS`, which `config.task` uses.
"""

from experiments.tasks.addition import ModularAddition
from experiments.tasks.classification import Digits, ListOps, SameDocument, WhichDocument
from experiments.tasks.generated import Copying, Cue, GeneratedTask, Recall
from experiments.tasks.masked import MaskedLM
from experiments.tasks.repeats import Repeats
from experiments.tasks.senses import Senses
from experiments.tasks.spans import Spans
from experiments.tasks.task import Example, Task
from experiments.tasks.text import CausalLM, TextTask
from experiments.tasks.translation import LabelledPair, Translation

TASKS: dict[str, type[Task]] = {
    "causal_lm": CausalLM,
    "masked_lm": MaskedLM,
    "recall": Recall,
    "cue": Cue,
    "copying": Copying,
    "repeats": Repeats,
    "modular_addition": ModularAddition,
    "listops": ListOps,
    "which_document": WhichDocument,
    "same_document": SameDocument,
    "digits": Digits,
    "senses": Senses,
    "spans": Spans,
    "translation": Translation,
}

__all__ = [
    "TASKS",
    "CausalLM",
    "Example",
    "GeneratedTask",
    "LabelledPair",
    "MaskedLM",
    "Recall",
    "Senses",
    "Spans",
    "Task",
    "TextTask",
    "Translation",
]
