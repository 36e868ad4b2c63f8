"""What the sources of text and of images share: listing files, datasets of the Hugging Face hub, problems."""

import hashlib
import logging
import re
from collections.abc import Iterable
from pathlib import Path
from typing import Any, NamedTuple

from pipeline import storage
from pipeline.config.data import AnyDataConfig
from pipeline.data.manifest import SourceInfo
from pipeline.errors import DataError, did_you_mean

log = logging.getLogger(__name__)

HUB = "hf:"
_WILDCARD = re.compile(r"[*?\[]")


class Problem(NamedTuple):
    """A document, an image, or the rest of a file, that cannot be read.

    Attributes:
        where: the file, and the place in it.
        why: what is wrong with it.
    """

    where: str
    why: str

    def __str__(self) -> str:
        return f"{self.where}: {self.why}"


class SourceFile(NamedTuple):
    """A file of a source.

    Attributes:
        path: path or URL.
        name: the path below the source's folder.
        size: in bytes.
        version: changes when the content does.
    """

    path: str
    name: str
    size: int
    version: str


def leave_out(problem: Problem, data: AnyDataConfig) -> str:
    """Return the description of what is left out, or refuse the source where `data.on_error` is fatal.

    Args:
        problem: what cannot be read.
        data: the data section of the config.

    Raises:
        DataError: `data.on_error` is fatal.
    """
    if data.on_error == "fatal":
        raise DataError(f"data.source: {problem} (data.on_error: skip counts and leaves out such items)")
    return str(problem)


def digest(parts: Iterable[str]) -> str:
    """Return the SHA-256 of a sequence of texts, in hexadecimal.

    Args:
        parts: the texts.
    """
    return hashlib.sha256(b"".join(part.encode("utf-8") + b"\0" for part in parts)).hexdigest()


def describe(data: AnyDataConfig, parts: Iterable[str], revision: str | None = None) -> SourceInfo:
    """Return what the manifest says of a source.

    Args:
        data: the data section of the config.
        parts: texts that identify the content, such as `names_and_sizes`.
        revision: of a dataset of the hub.
    """
    return SourceInfo(name=data.source, revision=revision, fingerprint=digest(parts))


def names_and_sizes(files: Iterable[SourceFile]) -> list[str]:
    """Return the name and the size of every file, which are the same for a copy elsewhere.

    Args:
        files: of a source.
    """
    return [f"{file.name} {file.size}" for file in files]


def has_wildcard(source: str) -> bool:
    """Return whether a path is a glob.

    Args:
        source: path or URL.
    """
    return bool(_WILDCARD.search(source))


def list_files(source: str, root: str = "") -> list[SourceFile]:
    """List all files at a path, sorted by path; none if nothing is there.

    Args:
        source: a file, a folder, whose subfolders are listed too, or a glob.
        root: how the paths start (without the protocol of a URL); what follows is the name.
    """
    fs, inner = storage.filesystem(source)
    infos: dict[str, Any] = {}
    for path, info in fs.glob(inner, detail=True).items():  # also of a path without wildcards
        infos |= fs.find(path, detail=True) if info["type"] == "directory" else {path: info}
    protocol = "" if storage.is_local(source) else fs.unstrip_protocol(inner).removesuffix(inner)
    return [
        SourceFile(protocol + path, path[len(root) :], info["size"], version=digest([str(info)]))
        for path, info in sorted(infos.items())
    ]


def find(source: str, suffixes: tuple[str, ...], *embedded: str) -> list[SourceFile]:
    """List the files of a source that can be read, sorted by path.

    Args:
        source: a file, a folder, whose subfolders are read too, or a glob.
        suffixes: of what can be read, in lower case.
        embedded: sources that are no files, for the message.

    Raises:
        DataError: nothing is there, or nothing that can be read.
    """
    inner = storage.filesystem(source)[1]
    root = _WILDCARD.split(inner)[0]
    if root != inner or root.lower().endswith(suffixes):
        root = root.rpartition("/")[0]
    files = list_files(source, storage.join(root, ""))
    if not files:
        folder, _, name = source.rstrip("/").rpartition("/")
        near = did_you_mean(name, [*storage.listing(folder or "."), *embedded])
        raise DataError(f"data.source: nothing at {source!r}{near}")
    readable = [file for file in files if file.path.lower().endswith(suffixes)]
    if not readable:
        raise DataError(
            f"data.source: no file to read among {len(files)} at {source!r}, such as {files[0].path!r}; "
            f"expected {', '.join(suffixes)}"
        )
    if others := len(files) - len(readable):
        log.info("%s: %d files of other kinds are ignored", source, others)
    return readable


def hub_folder(data: AnyDataConfig) -> str | None:
    """Return the local folder in the layout of a dataset of the hub that `hf:` names.

    Args:
        data: the data section of the config.

    Returns:
        Absolute path of the folder; None if there is none, so that the dataset comes from the hub.
    """
    name = data.source.removeprefix(HUB)
    folder = storage.resolve(name)
    return folder if storage.is_local(name) and Path(folder).is_dir() else None


def pinned_revision(data: AnyDataConfig) -> str | None:
    """Return the commit of a dataset of the hub that `data.revision` means now.

    Args:
        data: the data section of the config.

    Raises:
        DataError: there is none, or the hub cannot be reached.
    """
    from huggingface_hub import HfApi  # slow to import, and other sources do without

    try:
        return HfApi().dataset_info(data.source.removeprefix(HUB), revision=data.revision).sha
    except Exception as error:  # errors of several libraries, which have no base class in common
        raise DataError(f"data.source: {data.source!r} cannot be opened: {error}") from error
