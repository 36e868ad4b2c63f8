"""Fixtures that several test modules share."""

from collections.abc import Callable, Iterator
from pathlib import Path
from typing import TYPE_CHECKING, Any

import pytest
from jaxtyping import config as shape_checks
from jaxtyping import install_import_hook

if TYPE_CHECKING:
    from pipeline.config.schema import RunConfig
    from tests.support.object_store import Store
    from tests.support.workers import Workers

TRAINING = "tests/training"

# Shapes in signatures are checked by beartype; before anything imports these packages.
install_import_hook(["pipeline.models", "pipeline.diffusion", "pipeline.sampling"], "beartype.beartype")
_checked: set[str] = set()


@pytest.hookimpl(tryfirst=True)
def pytest_runtest_setup(item: pytest.Item) -> None:
    """Check shapes in the first case of every fast test; checks everywhere would double the suites' time."""
    function = item.nodeid.partition("[")[0]
    shape_checks.update(
        "jaxtyping_disable", function in _checked or item.get_closest_marker("slow") is not None
    )
    _checked.add(function)


@pytest.hookimpl(tryfirst=True)
def pytest_cmdline_main(config: pytest.Config) -> None:
    """Run a whole suite in two processes; named files run in one (see `-n`).

    A process takes whole files. One takes all files of tests/training, whose worker processes it starts once.
    """
    option = config.option
    worker = hasattr(config, "workerinput")
    if worker or option.file_or_dir or option.usepdb or option.markexpr in ("alone", "gpu"):
        return
    if option.numprocesses is None:
        option.numprocesses, option.dist, option.loadscopereorder = 2, "loadfile", False
        option.maxworkerrestart = (
            "0"  # a process that ends early is a failure; restarted, it would wait for ever
        )


def pytest_collection_modifyitems(config: pytest.Config, items: list[pytest.Item]) -> None:
    """Put the largest unit of the two processes first."""
    if hasattr(config, "workerinput"):
        items.sort(key=lambda item: not item.nodeid.startswith(TRAINING))


@pytest.hookimpl(optionalhook=True)
def pytest_xdist_make_scheduler(config: pytest.Config, log: Any) -> Any:
    """Make the scheduler of whole files, but one unit of those that share worker processes."""
    from xdist.scheduler import LoadFileScheduling

    class Files(LoadFileScheduling):
        def _split_scope(self, nodeid: str) -> str:
            return TRAINING if nodeid.startswith(TRAINING) else super()._split_scope(nodeid)

    return Files(config, log) if config.getvalue("dist") == "loadfile" else None


@pytest.fixture(scope="session", autouse=True)
def one_thread() -> None:
    """Tests multiply tiny matrices, where a second thread only waits for the first."""
    import torch

    torch.set_num_threads(1)


@pytest.fixture(scope="session")
def ray_cluster() -> Iterator[None]:
    """A local Ray of two CPUs, started once."""
    import ray

    from tests.support import local_ray

    local_ray.start()
    yield
    ray.shutdown()


@pytest.fixture(scope="session")
def run_storage(tmp_path_factory: pytest.TempPathFactory, ray_cluster: None) -> Path:
    """A folder with prepared text, for runs."""
    from pipeline.run import Run
    from tests.support.tiny_runs import tiny

    storage = tmp_path_factory.mktemp("storage")
    Run(tiny(storage, "prepare")).with_data()
    return storage


@pytest.fixture
def configure(run_storage: Path) -> "Callable[..., RunConfig]":
    """`configure(name, section={key: value})` -> config of a tiny run on the prepared text."""
    from tests.support.tiny_runs import tiny

    def make(name: str, **changes: dict[str, object]) -> "RunConfig":
        return tiny(run_storage, name, **changes)

    return make


@pytest.fixture(scope="session")
def groups() -> "Iterator[dict[int, Workers]]":
    """Groups of one and of two worker processes that stay up for all tests of training."""
    from tests.support.workers import Workers

    both = {count: Workers(count) for count in (1, 2)}
    for group in both.values():
        group.start()
    yield both
    for group in both.values():
        group.close()


@pytest.fixture
def group_of_one() -> "Iterator[None]":
    """A process group of this process alone."""
    import torch.distributed as dist

    dist.init_process_group("gloo", store=dist.HashStore(), rank=0, world_size=1)
    yield
    dist.destroy_process_group()


@pytest.fixture(scope="module")
def store() -> "Iterator[Store]":
    """A server of S3's protocol on this machine, with one bucket."""
    import s3fs

    from tests.support.object_store import object_store

    with object_store("bucket") as running:
        yield running
    s3fs.S3FileSystem.clear_instance_cache()
