"""Distributed training of Partition Generative Models on Ray."""

from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from pipeline.api import Model, load_model

__all__ = ["Model", "load_model"]


def __getattr__(name: str) -> Any:
    """Import the API at first use: reading a config needs no torch."""
    if name in __all__:
        from pipeline import api

        return getattr(api, name)
    raise AttributeError(f"module 'pipeline' has no attribute {name!r}")
