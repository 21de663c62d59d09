"""Runs that several files of tests look at; each worker process trains them once."""

from collections.abc import Iterator
from pathlib import Path

import pytest

from tests.experiments.runs import Scripts, finish


@pytest.fixture(scope="session")
def scripts(tmp_path_factory) -> Iterator[Scripts]:
    scripts = Scripts(tmp_path_factory.mktemp("scripts"))
    scripts.write_corpus()
    yield scripts
    scripts.close()


@pytest.fixture(scope="session")
def trained(scripts, tmp_path_factory):
    """A run that nothing has interrupted: its directory, and how its process ended."""
    workdir = tmp_path_factory.mktemp("trained") / "run"
    done = finish(scripts.start_training(workdir))  # as a person starts it
    assert done.returncode == 0, done.stderr
    return workdir, done


@pytest.fixture(scope="session")
def finished(trained) -> Path:
    """The directory of that run: not to be changed."""
    return trained[0]
