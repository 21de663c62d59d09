"""Imports point one way, and importing the library loads what it declares and no more."""

import ast
import importlib
import importlib.metadata
import json
import subprocess
import sys
import tomllib
from collections.abc import Iterator
from pathlib import Path

import pytest
from packaging.requirements import Requirement
from packaging.utils import canonicalize_name

ROOT = Path(__file__).parents[2]
UP_TO_MODELS = {"ops", "nn", "models"}
# What each area may import of the project, beside itself.
MAY_IMPORT = {
    "ops": set(),
    "nn": {"ops"},
    "models": {"ops", "nn"},
    "data": set(),
    "training": UP_TO_MODELS,
    "inference": UP_TO_MODELS,
    "interop": UP_TO_MODELS | {"data"},  # files and tokenizers
    "viz": UP_TO_MODELS,
    "configs": set(),
    "experiments": UP_TO_MODELS | {"data", "training", "inference", "interop", "viz", "configs"},
}
# Of others' packages, where that is part of the design.
MAY_IMPORT_OF_OTHERS = {
    "ops": {"jax", "numpy", "chex"},
    "data": {"numpy", "tokenizers", "sklearn", "num2words", "babel"},
    "configs": {"ml_collections"},
}
PROJECT = {"qkv_jax", "configs", "experiments", "tests"}


def imported(source: str) -> Iterator[str]:
    """The dotted names that a module imports, wherever in it: `from a import b` is a.b."""
    for node in ast.walk(ast.parse(source)):
        if isinstance(node, ast.Import):
            yield from (alias.name for alias in node.names)
        elif isinstance(node, ast.ImportFrom):
            yield from (f"{'.' * node.level}{node.module or ''}.{a.name}" for a in node.names)


def offences(source: str, area: str) -> list[str]:
    """What a module of `area` imports and may not."""
    found = []
    for name in imported(source):
        top, *rest = name.split(".")
        if top in PROJECT:
            target = rest[0] if top == "qkv_jax" else top
            right = target == area or target in MAY_IMPORT[area] or target == "__version__"
        else:
            of_others = MAY_IMPORT_OF_OTHERS.get(area)
            right = of_others is None or top in of_others or top in sys.stdlib_module_names
        if not right:
            found.append(name)
    return found


def modules() -> Iterator[tuple[Path, str]]:
    """Every module of the project that belongs to an area, and the area."""
    for folder in (*(ROOT / "qkv_jax").iterdir(), ROOT / "configs", ROOT / "experiments"):
        if folder.is_dir() and folder.name != "__pycache__":
            yield from ((path, folder.name) for path in sorted(folder.rglob("*.py")))


MODULES = list(modules())


def short(path: Path) -> str:
    return path.relative_to(ROOT).as_posix()


@pytest.mark.parametrize(("path", "area"), MODULES, ids=[short(path) for path, _ in MODULES])
def test_imports_point_one_way(path, area):
    assert area in MAY_IMPORT, f"{area} has no place among the arrows"
    assert offences(path.read_text(encoding="utf-8"), area) == []


@pytest.mark.parametrize(
    ("source", "area"),
    [
        ("from qkv_jax import nn", "ops"),
        ("import qkv_jax.nn.linear", "ops"),
        ("import flax", "ops"),
        ("def f():\n    from flax import nnx", "ops"),
        ("from ..nn import linear", "ops"),
        ("from qkv_jax.training import TrainState", "viz"),
        ("from qkv_jax.data import split", "training"),
        ("import experiments.setup", "models"),
        ("from qkv_jax import ops", "data"),
        ("import jax", "data"),
        ("from qkv_jax.models import MIXERS", "configs"),
    ],
)
def test_an_import_against_the_arrows_is_seen(source, area):
    assert len(offences(source, area)) == 1


def library_modules() -> list[str]:
    paths = (path.relative_to(ROOT).with_suffix("") for path in (ROOT / "qkv_jax").rglob("*.py"))
    return sorted(".".join(path.parts).removesuffix(".__init__") for path in paths)


@pytest.mark.parametrize("name", library_modules())
def test_every_module_imports(name):
    importlib.import_module(name)


REFUSE = """
import json, sys, time

class Refuse:
    def find_spec(self, name, path=None, target=None):
        if name.split(".")[0] in refused:
            raise ModuleNotFoundError(f"No module named {name!r}", name=name)

refused = set(json.loads(sys.argv[1]))
sys.meta_path.insert(0, Refuse())
start = time.perf_counter()
"""


def loaded_by(statement: str, refused: set[str]) -> set[str]:
    """The modules that a statement loads into a Python that lacks some; prints the time it took."""
    code = (
        f"{REFUSE}{statement}\nprint(json.dumps([time.perf_counter() - start, list(sys.modules)]))"
    )
    done = subprocess.run(
        [sys.executable, "-c", code, json.dumps(sorted(refused))],
        cwd=ROOT, capture_output=True, text=True,
    )  # fmt: skip
    assert done.returncode == 0, done.stderr
    seconds, names = json.loads(done.stdout)
    print(f"{statement}: {seconds:.2f} s, {len(names)} modules")
    return set(names)


def declared_closure() -> set[str]:
    """The distributions that pyproject.toml's dependencies bring, by canonical name."""
    with (ROOT / "pyproject.toml").open("rb") as file:
        waiting = tomllib.load(file)["project"]["dependencies"]
    seen: set[str] = set()
    while waiting:
        requirement = Requirement(waiting.pop())
        name = canonicalize_name(requirement.name)
        marker = requirement.marker
        if name not in seen and (marker is None or marker.evaluate({"extra": ""})):
            seen.add(name)
            waiting += importlib.metadata.requires(name) or []
    return seen


def undeclared() -> set[str]:
    """The top-level modules installed here that pyproject.toml's dependencies do not bring."""
    declared = declared_closure()
    return {
        top
        for top, owners in importlib.metadata.packages_distributions().items()
        if not {canonicalize_name(owner) for owner in owners} & declared and top not in PROJECT
    }


@pytest.mark.parametrize(
    "statement",
    ["import qkv_jax", "from qkv_jax import data, inference, models, nn, ops, training, viz"],
)
def test_importing_the_library_needs_only_what_it_declares(statement):
    refused = undeclared()
    assert "pytest" in refused and not refused & {"jax", "numpy", "flax", "yaml"}
    loaded = loaded_by(statement, refused)
    heavy = {"torch", "tensorflow", "orbax", "tensorboardX", "matplotlib", "tokenizers"}
    heavy |= {"num2words", "babel", "sacrebleu"}
    assert loaded & heavy == set()


def undocumented(source: str) -> list[str]:
    """The module itself and its public functions and classes, where they have no docstring."""
    tree = ast.parse(source)
    public = [
        node
        for node in tree.body
        if isinstance(node, ast.FunctionDef | ast.ClassDef) and not node.name.startswith("_")
    ]
    names = [node.name for node in public if ast.get_docstring(node) is None]
    return names if ast.get_docstring(tree) is not None or not tree.body else ["module", *names]


@pytest.mark.parametrize("path", sorted((ROOT / "qkv_jax").rglob("*.py")), ids=short)
def test_everything_public_has_a_docstring(path):
    assert undocumented(path.read_text(encoding="utf-8")) == []


def test_a_missing_docstring_is_seen():
    assert undocumented("def f():\n    return 1\nclass C:\n    x = 1\n") == ["module", "f", "C"]
    assert undocumented('"""m"""\ndef _f():\n    return 1\n') == []
