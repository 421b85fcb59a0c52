"""Shared fixtures; nothing here reaches the network, and nothing writes outside pytest's folders."""

from __future__ import annotations

import gc
import os
from collections.abc import Iterator
from pathlib import Path

import pytest

os.environ["HF_HUB_OFFLINE"] = "1"
os.environ.setdefault("OMP_NUM_THREADS", "1")
os.environ.setdefault("TOKENIZERS_PARALLELISM", "false")

from tests import factories


@pytest.fixture(scope="session", autouse=True)
def _caches(tmp_path_factory: pytest.TempPathFactory) -> None:
    home = tmp_path_factory.mktemp("home")
    os.environ["HFCOMPRESS_HOME"] = str(home / "hfcompress")
    os.environ["HF_DATASETS_CACHE"] = str(home / "datasets")


@pytest.fixture(scope="session", autouse=True)
def _progress() -> Iterator[None]:
    """Prints what the package logs, as the command line does."""
    from hfcompress.utils.logging import log_to_terminal

    with log_to_terminal():
        yield


@pytest.fixture(scope="module", autouse=True)
def _short_collections() -> None:
    """Takes the objects of the libraries out of garbage collection: each training collects, which took 0.3 s."""
    gc.collect()
    gc.freeze()


@pytest.fixture(scope="session")
def data(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A directory with train, dev and test files."""
    return factories.write_data(tmp_path_factory.mktemp("data"))


@pytest.fixture(scope="session")
def teacher(tmp_path_factory: pytest.TempPathFactory, data: Path) -> Path:
    """A fine-tuned two-layer BERT."""
    return factories.fine_tuned(tmp_path_factory.mktemp("teacher"), data)


@pytest.fixture
def recipe(tmp_path: Path, teacher: Path, data: Path) -> Path:
    """A recipe of three stages on the tiny world."""
    return factories.recipe(tmp_path / "recipe.yaml", teacher, data)


@pytest.fixture
def in_process() -> Iterator[None]:
    """Models are measured and verified in this process, in place of fresh ones."""
    from tests.in_process import in_this_process

    with in_this_process():
        yield


@pytest.fixture(autouse=os.environ.get("HFCOMPRESS_TEST_KERNELS") == "other")
def _another_processor(monkeypatch: pytest.MonkeyPatch) -> Iterator[None]:
    """A processor with few abilities, whose kernels round in another way, where `make test-portable` asks for it."""
    from hfcompress.measure import environment
    from tests import kernels

    monkeypatch.setattr(environment, "FLAGS", ("avx2",))
    with kernels.simulated(monkeypatch):
        yield
