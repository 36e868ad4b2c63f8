"""A device for the tests of this folder."""

import pytest
import torch


@pytest.fixture(scope="session", autouse=True)
def cuda() -> torch.device:
    """The device; without one, `pytest -m gpu` fails."""
    if not torch.cuda.is_available():
        pytest.fail(
            f"torch {torch.__version__} finds no CUDA device; expected a GPU and a CUDA build of torch"
        )
    return torch.device("cuda")
