"""What installs the project: requirements, the package itself, the Makefile."""

import os
import re
import shutil
import subprocess
import sys
import tomllib
from pathlib import Path

import pytest
from packaging.requirements import Requirement
from packaging.utils import canonicalize_name

ROOT = Path(__file__).parents[2]
REQUIREMENTS = [
    "requirements.txt", "requirements-test.txt", "requirements-oracle.txt", "requirements-docs.txt",
]  # fmt: skip


def requirements(name: str) -> list[tuple[Requirement, str]]:
    """The requirements of a file, each with the reason beside it."""
    found = []
    for line in (ROOT / name).read_text(encoding="utf-8").splitlines():
        text, _, reason = line.partition("#")
        if text.strip() and not text.startswith("-r "):
            found.append((Requirement(text.strip()), reason.strip()))
    return found


@pytest.mark.parametrize("name", REQUIREMENTS)
def test_every_requirement_has_a_version_and_a_reason(name):
    for requirement, reason in requirements(name):
        assert requirement.specifier, f"{requirement} accepts any version"
        assert len(reason.split()) >= 2, f"{requirement} does not say what it is for"


def test_the_package_and_the_scripts_ask_for_the_same_versions():
    wanted = {canonicalize_name(r.name): r for r, _ in requirements("requirements.txt")}
    with (ROOT / "pyproject.toml").open("rb") as file:
        declared = tomllib.load(file)["project"]["dependencies"]
    for requirement in map(Requirement, declared):
        assert wanted[canonicalize_name(requirement.name)].specifier == requirement.specifier


def test_the_installed_package_is_whole(tmp_path):
    source, target = tmp_path / "source", tmp_path / "target"
    source.mkdir()  # setuptools builds in the source's own folder
    for name in ("pyproject.toml", "README.md", "LICENSE"):
        shutil.copy(ROOT / name, source)
    shutil.copytree(
        ROOT / "qkv_jax", source / "qkv_jax", ignore=shutil.ignore_patterns("__pycache__")
    )
    command = [sys.executable, "-m", "pip", "install", "--quiet", "--no-deps"]
    command += ["--no-build-isolation", "--no-index", "--target", target, source]
    subprocess.run(command, check=True)
    for path in (source / "qkv_jax").rglob("*"):
        assert (target / path.relative_to(source)).exists(), f"{path.name} was not installed"
    assert (target / "qkv_jax" / "py.typed").exists()
    assert {path.name.split("-")[0] for path in target.iterdir()} == {"qkv_jax"}
    code = "import qkv_jax; print(qkv_jax.__file__)"
    environment = os.environ | {"PYTHONPATH": str(target)}
    done = subprocess.run(
        [sys.executable, "-c", code], cwd=tmp_path, env=environment, capture_output=True, text=True
    )
    assert done.stdout.startswith(str(target)), done.stderr


# --- The Makefile, with a .venv whose Python only writes down how it was called -------------------


@pytest.fixture
def checkout(tmp_path):
    """A folder with the Makefile and the requirements, and no virtual environment."""
    for name in ("Makefile", *REQUIREMENTS):
        shutil.copy(ROOT / name, tmp_path)
    return tmp_path


def make(folder: Path, *arguments: str) -> subprocess.CompletedProcess:
    # Without what the make that runs the tests hands down: its own flags and variables.
    handed_down = {name for name in os.environ if "MAKE" in name} | {"ARGS", "PYTHON"}
    environment = {k: v for k, v in os.environ.items() if k not in handed_down}
    command = ["make", *arguments]
    return subprocess.run(command, cwd=folder, env=environment, capture_output=True, text=True)


def pretend_environment(folder: Path, pip_status: int = 0) -> Path:
    """A .venv whose `python` writes its arguments to the file that is returned."""
    binaries, log = folder / ".venv" / "bin", folder / "log"
    binaries.mkdir(parents=True)
    (binaries / "pip").touch()
    python = binaries / "python"
    python.write_text(f'#!/bin/sh\necho "$@" >> {log}\n[ "$2" != pip ] || exit {pip_status}\n')
    python.chmod(0o755)
    return log


def test_a_missing_python_ends_with_what_to_do(checkout):
    done = make(checkout, "train", "PYTHON=/nonexistent/python")
    assert done.returncode != 0
    assert "found no Python 3.11 or newer (tried: /nonexistent/python)" in done.stderr
    assert "python.org" in done.stderr and "make PYTHON=" in done.stderr
    assert not (checkout / ".venv").exists()


def test_an_old_python_is_passed_over(checkout):
    old = checkout / "python3.10"
    old.write_text("#!/bin/sh\nexit 1\n")  # the answer to `version_info < (3, 11)`
    old.chmod(0o755)
    done = make(checkout, "train", f"PYTHON={old}")
    assert done.returncode != 0 and "found no Python 3.11 or newer" in done.stderr


def test_the_first_python_that_is_new_enough_makes_the_environment(checkout):
    new = checkout / "python3.12"
    new.write_text('#!/bin/sh\n[ "$2" != venv ] || mkdir "$3"\n')
    new.chmod(0o755)
    done = make(checkout, ".venv/bin/pip", f"PYTHON=/nonexistent/python {new}")
    assert done.returncode == 0 and (checkout / ".venv").is_dir()
    assert "Creating .venv with" in done.stdout and str(new) in done.stdout


def test_a_failed_installation_says_what_to_do_and_is_tried_again(checkout):
    pretend_environment(checkout, pip_status=1)
    for _ in range(2):
        done = make(checkout, "train")
        assert done.returncode != 0
        assert "the installation failed" in done.stderr and "rm -rf .venv" in done.stderr


def test_requirements_are_installed_once_and_again_when_they_change(checkout):
    log = pretend_environment(checkout)
    train, install = "-m experiments.train", "-m pip install -r requirements.txt"
    for _ in range(2):
        assert make(checkout, "train").returncode == 0
    assert [line.strip() for line in log.read_text().splitlines()] == [install, train, train]
    installed = (checkout / ".venv" / ".installed-requirements").stat().st_mtime
    os.utime(checkout / "requirements.txt", (installed + 10, installed + 10))
    make(checkout, "train")
    assert [line.strip() for line in log.read_text().splitlines()[3:]] == [install, train]


def test_flags_are_passed_on(checkout):
    log = pretend_environment(checkout)
    make(checkout, "train", 'ARGS=--config.seed=3 --workdir="my runs"')
    assert "-m experiments.train --config.seed=3 --workdir=my runs\n" in log.read_text()


def test_the_oracles_are_installed_for_all_tests_alone(checkout):
    log = pretend_environment(checkout)
    make(checkout, "test")
    assert "oracle.txt" not in log.read_text() and "docs.txt" not in log.read_text()
    assert re.search(r"-m pytest .*not slow and not oracle", log.read_text())
    make(checkout, "test-all")
    assert "-m pip install -r requirements-oracle.txt" in log.read_text()
    assert "-m pip install -r requirements-docs.txt" in log.read_text()
    assert "not oracle" not in log.read_text().splitlines()[-1]


def test_the_pages_are_built_without_what_the_scripts_need(checkout):
    log = pretend_environment(checkout)
    assert make(checkout, "docs").returncode == 0
    install, build = (line.strip() for line in log.read_text().splitlines())
    assert install == "-m pip install -r requirements-docs.txt"
    assert build == "-m mkdocs build --strict"


def test_help_names_every_command(checkout):
    done = make(checkout)
    commands = re.search(r"\.PHONY: (.*)", (ROOT / "Makefile").read_text()).group(1).split()
    assert re.findall(r"^  make ([a-z-]+) ", done.stdout, re.M) == commands
