"""Paths and URLs in configs."""

from typing import Annotated

from pydantic import AfterValidator

# By scheme of the stores whose first folder is a bucket: the package that drives them.
BUCKET_STORES = {"s3": "s3fs", "s3a": "s3fs", "gs": "gcsfs", "gcs": "gcsfs", "abfs": "adlfs", "az": "adlfs"}


def check_bucket(path: str) -> str:
    """Return a path or URL; refuse that of a store without a bucket, where the next folder would be taken for one.

    Args:
        path: of a file or folder.

    Raises:
        ValueError: the URL names no bucket.
    """
    scheme, mark, rest = path.partition("://")
    if mark and scheme in BUCKET_STORES and not rest.split("/")[0]:
        raise ValueError(f"{path!r} names no bucket; expected {scheme}://BUCKET/FOLDER")
    return path


def _check(path: str) -> str:
    """Return a path or URL; refuse one that no manifest and no MLflow store could hold."""
    try:
        path.encode("utf-8")
    except UnicodeEncodeError:
        raise ValueError(f"{path!r} is not UTF-8; expected a name that is, such as that of a link") from None
    return check_bucket(path)


Location = Annotated[str, AfterValidator(_check)]
