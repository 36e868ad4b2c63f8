"""Calls to stores and networks that are repeated after errors that may pass."""

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
FIRST_WAIT = 0.5  # seconds; doubled after every attempt
OVERLOAD_FACTOR = 4  # on the wait, where the store answered that it is overloaded
_PERMANENT = (FileNotFoundError, FileExistsError, IsADirectoryError, NotADirectoryError, PermissionError)
# EREMOTEIO is s3fs's name for an internal error of the store; Linux only.
_TRANSIENT = {errno.EIO, errno.EAGAIN, errno.EBUSY, errno.EINTR, errno.ESTALE, errno.ENETUNREACH}
_TRANSIENT |= {errno.EHOSTUNREACH, getattr(errno, "EREMOTEIO", errno.EIO)}
# Broken connections as the stores' drivers call them; they are no OSError. By name, so that no driver is needed.
_BROKEN = {"HTTPClientError", "EndpointConnectionError", "ServerDisconnectedError", "ClientPayloadError"}
_BROKEN |= {"IncompleteRead", "TransportError", "RetryError"}
# Libraries that talk to stores and servers, whose errors are none of the data.
_NETWORK = {
    "aiohttp",
    "aiobotocore",
    "botocore",
    "gcsfs",
    "httpcore",
    "httpx",
    "httpx2",
    "huggingface_hub",
    "requests",
    "urllib3",
}


def status(error: BaseException) -> int | None:
    """Return the HTTP status with which a store answered, or None if the error does not carry one."""
    for origin in (error, error.__cause__, error.__context__):
        response = getattr(origin, "response", None)  # botocore, requests
        metadata = response.get("ResponseMetadata", {}) if isinstance(response, dict) else {}
        code = metadata.get("HTTPStatusCode") or getattr(response, "status_code", None)
        code = code or getattr(origin, "code", None)  # gcsfs
        code = str(code or getattr(origin, "status", None))  # aiohttp
        if code.isdigit() and 400 <= int(code) < 600:
            return int(code)
    return None


def transient(error: BaseException) -> bool:
    """Return whether another attempt may help: broken connections, time-outs, stores that are down or overloaded."""
    if isinstance(error, _PERMANENT):
        return False
    code = status(error)
    if code is not None:
        return code in (408, 409, 429) or code >= 500
    if isinstance(error, ConnectionError | TimeoutError):
        return True
    if isinstance(error, OSError):
        return error.errno is None or error.errno in _TRANSIENT
    return any(kind.__name__ in _BROKEN for kind in type(error).__mro__)


def of_network(error: BaseException) -> bool:
    """Return whether an error comes from the network or a store, and not from the data that was read.

    Args:
        error: raised while data was read.
    """
    if isinstance(error, ConnectionError | TimeoutError):
        return True
    # Drivers of stores raise an OSError for an answer of the store, which is then its cause.
    origins = [error, error.__cause__, error.__context__] if isinstance(error, OSError) else [error]
    kinds = [kind for origin in origins for kind in type(origin).__mro__]
    return any(kind.__module__.partition(".")[0] in _NETWORK for kind in kinds)


def retry(function: Callable[P, R]) -> Callable[P, R]:
    """Make a function repeat itself after transient errors, with jittered waits that double.

    Args:
        function: may be called up to `ATTEMPTS` times.

    Returns:
        The repeating function; it raises the last error.
    """
    name = getattr(function, "__name__", "call")

    @functools.wraps(function)
    def repeated(*args: P.args, **kwargs: P.kwargs) -> R:
        for attempt in range(1, ATTEMPTS):
            try:
                return function(*args, **kwargs)
            except Exception as error:
                if not transient(error):
                    raise
                wait = FIRST_WAIT * 2 ** (attempt - 1) * random.SystemRandom().uniform(0.5, 1.5)
                wait *= OVERLOAD_FACTOR if status(error) in (429, 503) else 1
                log.warning("%s failed (%s); attempt %d follows in %.1f s", name, error, attempt + 1, wait)
                time.sleep(wait)
        return function(*args, **kwargs)

    return repeated
