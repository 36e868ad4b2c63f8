"""Paths and the stores that they lead to."""

import contextlib
import os
from collections.abc import Iterator
from typing import Any

import fsspec
from pyarrow.fs import FileSystem, FSSpecHandler, PyFileSystem

from pipeline.config.location import BUCKET_STORES, check_bucket
from pipeline.errors import DataError, PipelineError
from pipeline.storage.retries import of_network, transient


def is_local(path: str) -> bool:
    """Return whether a path is a plain path or starts with `file://`."""
    return "://" not in path or path.startswith("file://")


def resolve(path: str) -> str:
    """Make a local path absolute (`~` and `file://` included); URLs are returned unchanged."""
    return os.path.abspath(os.path.expanduser(path.removeprefix("file://"))) if is_local(path) else path


def join(path: str, *parts: str) -> str:
    """Return `path/part/part`, for paths and URLs alike."""
    return "/".join([path[:-1] if path.endswith("://") else path.rstrip("/"), *parts])


def filesystem(path: str) -> tuple[Any, str]:
    """Open the fsspec filesystem of a path or URL.

    Args:
        path: file or folder, which need not exist.

    Returns:
        The filesystem, and the path inside it.

    Raises:
        DataError: the URL's scheme is unknown, its driver is not installed, or it names no bucket.
    """
    if is_local(path):  # any character may stand in a path
        return fsspec.filesystem("file"), resolve(path)
    scheme = path.split("://")[0]
    try:
        check_bucket(path)
    except ValueError as error:
        raise DataError(str(error)) from None
    try:
        if _is_chain(path):
            return fsspec.core.url_to_fs(path)
        kind = fsspec.get_filesystem_class(scheme)
        return kind(**kind._get_kwargs_from_urls(path)), kind._strip_protocol(path)
    except ImportError as error:
        driver = BUCKET_STORES.get(scheme)
        how = f"; run `pip install {driver}` on every node" if driver else ""
        raise DataError(f"{path}: {scheme}:// needs a driver that is not installed ({error}){how}") from None
    except ValueError as error:
        raise DataError(f"{path}: cannot be opened: {error}") from None


def _is_chain(path: str) -> bool:
    """Return whether a URL goes through several filesystems, as `zip://file::s3://bucket/a.zip` does."""
    known = fsspec.available_protocols()
    return "::" in path and all("://" in part or part in known for part in path.split("::"))


def arrow(path: str) -> tuple[FileSystem | None, str]:
    """Open the filesystem of a path or URL for libraries that write through Arrow.

    Arrow's own driver of S3 asks Amazon for the bucket's region, whatever endpoint the environment names.

    Args:
        path: file or folder, which need not exist.

    Returns:
        The filesystem (None stands for Arrow's own, of local paths), and the path inside it.

    Raises:
        DataError: the URL's scheme is unknown or its driver is not installed.
    """
    if is_local(path):
        return None, resolve(path)
    fs, inner = filesystem(path)
    return PyFileSystem(FSSpecHandler(fs)), inner


@contextlib.contextmanager
def explained(path: str) -> Iterator[None]:
    """Name path and reason where a store refuses access or a name; outages and other errors pass."""
    try:
        yield
    except Exception as error:
        if is_local(path) or isinstance(error, PipelineError):
            raise
        if isinstance(error, PermissionError) or "Credentials" in type(error).__name__:
            how = "credentials come from the environment or the node's role"
            raise DataError(f"{path}: the store refuses access ({error}); {how}") from error
        if isinstance(error, OSError) or not of_network(error) or transient(error):
            raise
        raise DataError(f"{path}: {' '.join(str(error).split())}") from error
