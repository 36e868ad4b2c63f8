"""Compiled functions that go on uncompiled where shapes vary too much."""

import logging
from collections.abc import Callable
from functools import cache, wraps
from typing import Any, ParamSpec, TypeVar

import torch

log = logging.getLogger(__name__)

P = ParamSpec("P")
R = TypeVar("R")


def compiled(function: Callable[P, R], most: int, **options: Any) -> Callable[P, R]:
    """Compile a function when it is first called, for static shapes.

    Args:
        function: of tensors; a method of a module is compiled once for all modules of its class.
        most: combinations of shapes to compile for; with others the function runs as it is.
        **options: of `torch.compile`.

    Returns:
        What computes the same.
    """
    settings: dict[str, Any] = {"fullgraph": True, "dynamic": False, "recompile_limit": most} | options

    @cache
    def fast() -> Callable[P, R]:
        return torch.compile(function, **settings)

    @cache
    def warn() -> None:
        log.warning("%s: compiled for %d shapes; with others it runs as it is", function.__qualname__, most)

    @wraps(function)
    def run(*args: P.args, **kwargs: P.kwargs) -> R:
        try:
            return fast()(*args, **kwargs)
        except torch._dynamo.exc.FailOnRecompileLimitHit:
            warn()
            return function(*args, **kwargs)

    return run
