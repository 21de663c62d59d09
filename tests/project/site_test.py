"""What `make docs` writes: every public name, no warning, nothing from the network."""

import importlib
import importlib.util
import os
import re
import subprocess
import sys
from pathlib import Path

import pytest

ROOT = Path(__file__).parents[2]
# Page of the reference -> the module whose public names it shows.
PAGES = {
    "ops": "qkv_jax.ops",
    "masks": "qkv_jax.ops.masks",
    "scores": "qkv_jax.ops.scores",
    "positions": "qkv_jax.ops.positions",
    "cache": "qkv_jax.ops.cache",
    "paged": "qkv_jax.ops.paged",
    "basic": "qkv_jax.ops.basic",
    "measures": "qkv_jax.models.measures",
    **{
        area: f"qkv_jax.{area}"
        for area in ("nn", "models", "data", "training", "inference", "interop", "viz")
    },
}
# Of `scores`, which has no __all__: what stands between it and `attention`.
INTERNAL = {"FromFunction", "apply", "aligned", "uses_positions"}

NEEDED = ("mkdocs", "material", "mkdocstrings_handlers.python", "griffe")


def installed(name: str) -> bool:
    try:
        return importlib.util.find_spec(name) is not None
    except ModuleNotFoundError:
        return False


pytestmark = [
    pytest.mark.slow,
    pytest.mark.skipif(
        not all(map(installed, NEEDED)),
        reason="needs what requirements-docs.txt names; `make docs` installs it",
    ),
]


def build(target: Path, config: Path = ROOT / "mkdocs.yml") -> subprocess.CompletedProcess:
    command = [sys.executable, "-m", "mkdocs", "build", "--strict", "-f", config, "-d", target]
    environment = os.environ | {"NO_MKDOCS_2_WARNING": "1"}
    return subprocess.run(command, cwd=ROOT, env=environment, capture_output=True, text=True)


@pytest.fixture(scope="module")
def site(tmp_path_factory) -> Path:
    """The pages, built as `make docs` does."""
    target = tmp_path_factory.mktemp("site")
    done = build(target)
    assert done.returncode == 0, done.stderr
    return target


def public_functions_and_classes(module) -> set[str]:
    """Those that a module names in __all__; without one, those that it defines."""
    if hasattr(module, "__all__"):
        names = module.__all__
    else:
        own = (
            n for n, x in vars(module).items() if getattr(x, "__module__", "") == module.__name__
        )
        names = [name for name in own if not name.startswith("_") and name not in INTERNAL]
    return {name for name in names if hasattr(getattr(module, name), "__module__")}


@pytest.mark.parametrize("page", PAGES)
def test_the_reference_has_every_public_name(site, page):
    html = (site / "api" / f"{page}.html").read_text(encoding="utf-8")
    module = importlib.import_module(PAGES[page])
    shown = {name.rpartition(".")[2] for name in re.findall(r'id="(qkv_jax\.[\w.]+)"', html)}
    documented = {
        name
        for name in public_functions_and_classes(module)
        if getattr(module, name).__module__.startswith("qkv_jax")  # not an alias such as `Params`
    }
    assert documented and documented <= shown


def test_every_page_of_the_reference_is_checked(site):
    assert {path.stem for path in (site / "api").glob("*.html")} == set(PAGES)


def text(path: Path) -> str:
    return re.sub(r"\s+", " ", re.sub(r"<[^>]+>", "", path.read_text(encoding="utf-8")))


def test_the_signature_of_a_mask_and_of_attention_is_shown(site):
    masks, ops = text(site / "api" / "masks.html"), text(site / "api" / "ops.html")
    assert "SlidingWindow(left: int | Array | None, right: int | Array | None = 0)" in masks
    assert re.search(
        r"attention\( ?q: Array, k: Array, v: Array, \*, mask: Mask \| None = None", ops
    )


def test_the_pages_load_nothing_from_the_network(site):
    for path in site.rglob("*.html"):
        html = path.read_text(encoding="utf-8")
        tags = re.findall(r"<(?:script|link|img|iframe)\b[^>]*>", html)
        assert tags and not [tag for tag in tags if re.search(r"""=["']?(https?:)?//""", tag)]
    for path in site.rglob("*.css"):
        assert not re.search(r"""(url\(|@import )["']?(https?:)?//""", path.read_text("utf-8"))


def test_a_link_out_of_docs_becomes_text_and_others_remain(site):
    html = (site / "architecture.html").read_text(encoding="utf-8")
    assert "../qkv_jax" not in html and "<code>ops/__init__.py</code>" in html
    assert 'href="flex_attention.html"' in (site / "index.html").read_text(encoding="utf-8")


def test_a_broken_link_fails_the_build(tmp_path):
    docs = tmp_path / "docs"
    docs.mkdir()
    (docs / "index.md").write_text("# Title\n\n[nowhere](nowhere.md)\n")
    given = (ROOT / "mkdocs.yml").read_text(encoding="utf-8")
    config = re.sub(r"^nav:\n(  .*\n)+", "nav: [index.md]\n", given, flags=re.M)
    config = config.replace("docs/build.py", str(ROOT / "docs" / "build.py"))
    (tmp_path / "mkdocs.yml").write_text(config)
    done = build(tmp_path / "site", tmp_path / "mkdocs.yml")
    assert done.returncode != 0 and "nowhere.md" in done.stderr
