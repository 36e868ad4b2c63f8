"""Paths, URLs and names of models in configs."""

import re
from dataclasses import dataclass
from typing import Annotated
from urllib.parse import unquote

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

HUB = "hf:"  # how names of the Hugging Face hub begin
_HUB_NAME = re.compile(r"(?P<repository>[\w.-]+/[\w.-]+)(?:@(?P<revision>[^/]+))?(?:/(?P<path>.+))?")


@dataclass(frozen=True)
class HubName:
    """A file or folder in a model repository of the Hugging Face hub.

    Attributes:
        repository: OWNER/NAME.
        revision: branch, tag or commit; None is the default branch.
        path: of the file or folder in the repository; empty for the repository itself.
    """

    repository: str
    revision: str | None
    path: str

    @classmethod
    def parse(cls, name: str) -> "HubName":
        """Read `hf:OWNER/NAME`, `hf:OWNER/NAME/PATH` or `hf:OWNER/NAME@REVISION/PATH`.

        Args:
            name: A slash inside the revision is written %2F.

        Raises:
            ValueError: The name has another form.
        """
        match = _HUB_NAME.fullmatch(name.removeprefix(HUB).removeprefix("//").rstrip("/"))
        parts = match["path"].split("/") if match and match["path"] else []
        parts += unquote(match["revision"]).split("/") if match and match["revision"] else []
        if match is None or any(part in ("", ".", "..") for part in parts):
            raise ValueError(f"{name!r}; expected hf:OWNER/NAME/FILE or hf:OWNER/NAME@REVISION/FILE")
        revision = match["revision"]
        return cls(match["repository"], revision and unquote(revision), match["path"] or "")

    def at(self, revision: str | None, path: str) -> str:
        """Write the name of a file or folder of the same repository.

        Args:
            revision: None leaves it out.
            path: Of the file or folder; empty for the repository itself.
        """
        mark = f"@{revision.replace('/', '%2F')}" if revision else ""
        return "/".join([f"{HUB}{self.repository}{mark}", *([path] if path else [])])


def _check_model(name: str) -> str:
    """Return the name of a model; refuse one of the hub that has another form."""
    if name.startswith(HUB):
        HubName.parse(name)
    return name


ModelName = Annotated[str, AfterValidator(_check_model)]
