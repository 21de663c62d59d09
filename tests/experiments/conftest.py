"""Runs that several files of tests look at; each worker process trains them once."""

from pathlib import Path

import pytest

from tests.experiments.runs import Scripts


@pytest.fixture(scope="session")
def scripts(tmp_path_factory) -> Scripts:
    scripts = Scripts(tmp_path_factory.mktemp("scripts"))
    scripts.write_corpus()
    return scripts


@pytest.fixture(scope="session")
def trained(scripts, tmp_path_factory):
    """A run that nothing has interrupted: its directory, and how its process ended."""
    workdir = tmp_path_factory.mktemp("trained") / "run"
    done = scripts.train(workdir)
    assert done.returncode == 0, done.stderr
    return workdir, done


@pytest.fixture(scope="session")
def finished(trained) -> Path:
    """The directory of that run: not to be changed."""
    return trained[0]
