"""Paths and URLs in configs."""

from typing import Annotated

from pydantic import AfterValidator

BUCKET_STORES = ("s3", "s3a", "gs", "gcs", "abfs", "az")  # schemes of stores whose first folder is a bucket


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


Location = Annotated[str, AfterValidator(check_bucket)]
