"""Tiny prepared text, configs and worker processes for tests of training."""

from collections.abc import Callable, Iterator
from pathlib import Path

import pytest
from tiny_runs import tiny
from workers import Workers

from pipeline.config.schema import RunConfig
from pipeline.data.prepared import ensure

Configure = Callable[..., RunConfig]


@pytest.fixture(scope="session")
def run_storage(tmp_path_factory: pytest.TempPathFactory, ray_cluster: None) -> Path:
    """A folder with prepared text, for runs."""
    storage = tmp_path_factory.mktemp("storage")
    ensure(tiny(storage, "prepare"))
    return storage


@pytest.fixture
def configure(run_storage: Path) -> Configure:
    """`configure(name, section={key: value})` -> config of a tiny run on the prepared text."""

    def make(name: str, **changes: dict[str, object]) -> RunConfig:
        return tiny(run_storage, name, **changes)

    return make


@pytest.fixture(scope="session")
def groups() -> Iterator[dict[int, Workers]]:
    """Groups of one and of two worker processes that stay up for all tests of training."""
    both = {count: Workers(count) for count in (1, 2)}
    for group in both.values():
        group.start()
    yield both
    for group in both.values():
        group.close()
