"""What several test modules share."""

from collections.abc import Iterator

import pytest
from jaxtyping import install_import_hook

# Shapes in signatures are checked by beartype in every test; before anything imports these packages.
install_import_hook(["pipeline.models", "pipeline.diffusion", "pipeline.sampling"], "beartype.beartype")


# Fixtures behind which several processes stand.
CROWDED = {"ray_cluster", "run_storage", "groups"}


@pytest.hookimpl(tryfirst=True)  # xdist reads the marks in this same hook
def pytest_collection_modifyitems(items: list[pytest.Item]) -> None:
    """Deal modules to pytest's processes: those that start processes themselves one after the other, in one."""

    def crowded(item: pytest.Item) -> bool:
        return "slow" in item.keywords or bool(CROWDED & set(getattr(item, "fixturenames", ())))

    together = {item.path for item in items if crowded(item)}
    for item in items:
        item.add_marker(pytest.mark.xdist_group("crowded" if item.path in together else str(item.path)))


@pytest.fixture(scope="session", autouse=True)
def one_thread() -> None:
    """Tests multiply tiny matrices, where a second thread only waits for the first."""
    import torch

    torch.set_num_threads(1)


@pytest.fixture(scope="session")
def ray_cluster() -> Iterator[None]:
    """A local Ray of two CPUs, started once."""
    import ray

    ray.init(
        address="local", num_cpus=2, include_dashboard=False, log_to_driver=False, logging_level="warning"
    )
    yield
    ray.shutdown()
