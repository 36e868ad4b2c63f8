"""Patience: calls into stores and networks that are tried again after errors that pass."""

import errno
import functools
import logging
import random
import time
from collections.abc import Callable
from typing import ParamSpec, TypeVar

log = logging.getLogger(__name__)
P = ParamSpec("P")
R = TypeVar("R")

ATTEMPTS = 5
FIRST_WAIT = 0.5  # seconds; doubled at every attempt
SLOWER = 4  # times as long, where the store said that it is asked too much
_FINAL = (FileNotFoundError, FileExistsError, IsADirectoryError, NotADirectoryError, PermissionError)
_PASSING = {
    errno.EIO,
    errno.EAGAIN,
    errno.EBUSY,
    errno.EINTR,
    errno.ESTALE,
    errno.ENETUNREACH,
    errno.EHOSTUNREACH,
    getattr(errno, "EREMOTEIO", errno.EIO),  # s3fs's name for an internal error of the store; Linux only
}
_OVERLOAD = {429, 503}
# Broken connections as the stores' drivers call them, which are no OSError. By name: no driver need be installed.
_BROKEN = {
    "HTTPClientError",
    "EndpointConnectionError",
    "ServerDisconnectedError",
    "ClientPayloadError",
    "IncompleteRead",
}


def status(error: BaseException) -> int | None:
    """The HTTP status with which a store answered, if that is what the error says."""
    for origin in (error, error.__cause__):
        response = getattr(origin, "response", None)  # botocore
        found = (
            response.get("ResponseMetadata", {}).get("HTTPStatusCode") if isinstance(response, dict) else None
        )
        found = found or getattr(origin, "code", None) or getattr(origin, "status", None)  # gcsfs; aiohttp
        if str(found).isdigit() and 400 <= int(found) < 600:  # type: ignore[arg-type]
            return int(found)  # type: ignore[arg-type]
    return None


def transient(error: BaseException) -> bool:
    """Whether trying again may help: broken connections, time-outs, stores that are down or asked too much."""
    if isinstance(error, _FINAL):
        return False
    answered = status(error)
    if answered is not None:
        return answered in (408, 409, 429) or answered >= 500
    if isinstance(error, ConnectionError | TimeoutError):
        return True
    if isinstance(error, OSError):
        return error.errno in {None, *_PASSING}
    return any(kind.__name__ in _BROKEN for kind in type(error).__mro__)


def retry(function: Callable[P, R]) -> Callable[P, R]:
    """Call again after a transient error, with waits that double and are jittered."""

    name = getattr(function, "__name__", "call")

    @functools.wraps(function)
    def again(*args: P.args, **kwargs: P.kwargs) -> R:
        for attempt in range(1, ATTEMPTS):
            try:
                return function(*args, **kwargs)
            except Exception as error:
                if not transient(error):
                    raise
                wait = FIRST_WAIT * 2 ** (attempt - 1) * random.SystemRandom().uniform(0.5, 1.5)
                wait *= SLOWER if status(error) in _OVERLOAD else 1
                log.warning("%s failed (%s); attempt %d in %.1f s", name, error, attempt + 1, wait)
                time.sleep(wait)
        return function(*args, **kwargs)

    return again
