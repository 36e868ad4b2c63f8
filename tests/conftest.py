"""What several test modules share."""

from collections.abc import Iterator

import pytest
from jaxtyping import install_import_hook

# Shapes in signatures are checked by beartype in every test; before anything imports these packages.
install_import_hook(["pipeline.models", "pipeline.diffusion", "pipeline.sampling"], "beartype.beartype")


@pytest.fixture(scope="session", autouse=True)
def one_thread() -> None:
    """Tests multiply tiny matrices, where a second thread only waits for the first."""
    import torch

    torch.set_num_threads(1)


@pytest.fixture(scope="session")
def ray_cluster() -> Iterator[None]:
    """A local Ray of two CPUs, started once."""
    import local_ray
    import ray

    local_ray.start()
    yield
    ray.shutdown()
