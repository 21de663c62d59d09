"""What README.md, docs/ and the configs say is true: code runs, flags and files exist."""

import io
import json
import re
import subprocess
import sys
from contextlib import redirect_stdout
from pathlib import Path

import matplotlib
import numpy as np
import pytest

from configs import char_lm

ROOT = Path(__file__).parents[2]
README = (ROOT / "README.md").read_text(encoding="utf-8")
PAGES = [
    *sorted(ROOT.glob("README*.md")),
    *sorted(path for path in (ROOT / "docs").rglob("*.md") if path.parent.name != "api"),
]


def run(blocks: list[str]) -> str:
    """Executes blocks of Python in one namespace; returns what they print."""
    namespace, printed = {"__name__": "__main__"}, io.StringIO()
    with redirect_stdout(printed):
        for i, block in enumerate(blocks):
            exec(compile(block, f"<block {i}>", "exec"), namespace)
    return printed.getvalue()


def python_blocks(text: str) -> list[str]:
    return re.findall(r"^```python\n(.*?)^```", text, re.M | re.S)


def test_the_code_of_the_readme_runs():
    blocks = python_blocks(README)
    assert len(blocks) >= 4
    printed = run(blocks)
    assert "the cat sat on the mat" in printed  # what the model of the last block has learned


def test_the_code_of_the_home_page_runs():
    blocks = python_blocks((ROOT / "docs" / "index.md").read_text(encoding="utf-8"))
    assert blocks
    run(blocks)


def test_the_code_of_the_page_on_many_devices_runs():
    printed = run(python_blocks((ROOT / "docs/scaling.md").read_text(encoding="utf-8")))
    assert printed.startswith("(('fsdp',), ('tensor',))\n")
    assert "| embedding/embedding | 64 x 32 | tensor, fsdp | 8,192 | 8,192 |" in printed


@pytest.mark.parametrize("page", ["docs/qkv.md", "docs/ja/qkv.md", "docs/looking.md"])
def test_the_explanation_prints_what_it_shows(page):
    text = (ROOT / page).read_text(encoding="utf-8")
    namespace: dict = {}
    blocks = re.findall(r"^```(python|text)\n(.*?)^```", text, re.M | re.S)
    assert {language for language, _ in blocks} == {"python", "text"}
    with np.printoptions():  # the page sets some
        for language, block in blocks:
            if language == "python":
                with redirect_stdout(io.StringIO()) as printed:
                    exec(compile(block, page, "exec"), namespace)
            else:
                shown = "".join(line.rstrip() + "\n" for line in printed.getvalue().splitlines())
                assert shown == block


def test_the_explanation_is_the_same_in_both_languages():
    pages = [
        (ROOT / page).read_text(encoding="utf-8") for page in ("docs/qkv.md", "docs/ja/qkv.md")
    ]
    english, japanese = ([len(block.splitlines()) for block in python_blocks(p)] for p in pages)
    assert english == japanese
    assert len(re.findall("^## ", pages[0], re.M)) == len(re.findall("^## ", pages[1], re.M))


def test_the_code_of_the_japanese_readme_runs():
    blocks = python_blocks((ROOT / "README.ja.md").read_text(encoding="utf-8"))
    assert blocks
    run(blocks)


FLEX = (ROOT / "docs" / "flex_attention.md").read_text(encoding="utf-8")
# What stands before the first heading, which all recipes share; then heading -> section.
SHARED, *SECTIONS = re.split(r"^## (.+)\n", FLEX, flags=re.M)
RECIPES = dict(zip(SECTIONS[::2], SECTIONS[1::2], strict=True))
CONTRACT = RECIPES.pop("What else holds")


@pytest.mark.parametrize("implementation", ["blockwise", "reference"])
@pytest.mark.parametrize("name", RECIPES)
def test_a_recipe_equals_the_attention_that_it_writes_out(name, implementation):
    shared, recipe = python_blocks(SHARED), python_blocks(RECIPES[name])
    assert shared and any("check(" in block for block in recipe)
    if implementation == "reference":
        readable = [block.replace("ops.Blockwise(64, 64)", '"reference"') for block in shared]
        assert readable != shared
        shared = readable
    run(shared + recipe)


def test_what_the_guide_to_flexible_attention_promises_holds():
    assert len(RECIPES) == 12
    blocks = python_blocks(CONTRACT)
    assert len(blocks) == CONTRACT.count("\n**") == 4  # a block for each promise
    run(python_blocks(SHARED) + blocks)


def notebook_cells() -> list[str]:
    """The code of the notebook, without IPython's magic lines."""
    notebook = json.loads((ROOT / "docs" / "quickstart.ipynb").read_text(encoding="utf-8"))
    cells = ["".join(c["source"]) for c in notebook["cells"] if c["cell_type"] == "code"]
    return [re.sub(r"^%.*$", "", cell, flags=re.M) for cell in cells]


@pytest.mark.slow
def test_the_notebook_runs():
    matplotlib.use("Agg")
    printed = run(notebook_cells())
    assert "largest influence of a later value: 0.0" in printed
    assert float(re.search(r"validation loss ([\d.]+)", printed).group(1)) < 2.4  # bigram: 2.6


def first_cell(folder: Path) -> subprocess.CompletedProcess:
    """Runs the notebook's first cell in a folder, then imports the library there."""
    code = notebook_cells()[0] + "\nimport qkv_jax; print(qkv_jax.__file__)"
    script = folder / "cell.py"
    script.write_text(code, encoding="utf-8")
    return subprocess.run(
        [sys.executable, "-P", script], cwd=folder, capture_output=True, text=True
    )


def test_the_notebook_finds_a_clone_beside_it_and_above_it(tmp_path):
    (tmp_path / "a clone").symlink_to(ROOT)
    inside = tmp_path / "inside" / "docs"
    inside.mkdir(parents=True)
    (tmp_path / "inside" / "qkv_jax").symlink_to(ROOT / "qkv_jax")
    for folder in (tmp_path, inside):
        assert "__init__.py" in first_cell(folder).stdout


def test_the_notebook_says_so_where_there_is_no_clone(tmp_path):
    done = first_cell(tmp_path)
    assert done.returncode != 0 and "found no clone of qkv_jax" in done.stderr


def fields() -> set[str]:
    """Every field of a config, dotted."""
    config = char_lm.get_config()
    names = {name for name in config if not hasattr(config[name], "keys")}
    for group in set(config) - names:
        names |= {f"{group}.{name}" for name in config[group]}
    return names


MENTIONING = [
    *PAGES, ROOT / "Makefile", *(ROOT / "configs").glob("*.py"),
    *(ROOT / "experiments").glob("*.py"), ROOT / "docs" / "quickstart.ipynb",
]  # fmt: skip


@pytest.mark.parametrize("path", MENTIONING, ids=lambda path: path.name)
def test_every_flag_that_is_mentioned_is_a_field(path):
    text = path.read_text(encoding="utf-8")
    mentioned = set(re.findall(r"--config\.([a-z_.0-9]*[a-z0-9])=", text))
    mentioned = {name.removeprefix("base.") for name in mentioned}  # of a study's runs
    assert mentioned - {"field"} <= fields()  # --config.field=value stands for any


@pytest.mark.parametrize("path", PAGES, ids=lambda path: path.name)
def test_every_link_leads_to_a_file(path):
    text = re.sub(r"^```.*?^```", "", path.read_text(encoding="utf-8"), flags=re.M | re.S)
    targets = re.findall(r"\]\(([^)#]+)", text)
    assert targets
    for target in targets:
        assert target.startswith("https://") or (path.parent / target).exists(), target


@pytest.mark.parametrize("path", PAGES, ids=lambda path: path.name)
def test_every_file_that_is_named_exists(path):
    text = path.read_text(encoding="utf-8")
    named = re.findall(r"`((?:qkv_jax|ops|nn|models|experiments|configs|tests)/[\w/.]+)`", text)
    for name in named:
        assert (ROOT / name).exists() or (ROOT / "qkv_jax" / name).exists(), name


def tree() -> dict[str, str]:
    """The README's tree: path -> what stands beside it."""
    block = re.search(r"^```text\n(qkv_jax/.*?)^```", README, re.M | re.S).group(1)
    found, folders = {}, []
    for line in block.splitlines():
        name, _, said = line.strip().partition(" ")
        depth = (len(line) - len(line.lstrip())) // 2
        folders = folders[:depth]
        if name.endswith("/"):
            folders.append(name)
            name = ""
        found["".join(folders) + name] = said.strip()
    return found


def test_the_tree_of_the_readme_has_a_line_for_every_file():
    said = tree()
    assert all(said.values())
    missing = [name for name in said if not (ROOT / name).exists()]
    assert not missing, f"README.md's tree names what does not exist: {missing}"
    for folder in ("qkv_jax", "experiments", "configs"):
        for path in (ROOT / folder).rglob("*.py"):
            name = path.relative_to(ROOT).as_posix()
            if path.name != "__init__.py":
                assert name in said, f"README.md's tree lacks {name}"
