"""What the sources of text and of images share: listing files, datasets of the Hugging Face hub, problems."""

import contextlib
import fnmatch
import hashlib
import itertools
import logging
import os
import re
import stat
from collections import Counter
from collections.abc import Iterable, Iterator, Sequence, Set
from pathlib import Path
from typing import NamedTuple

from pipeline import storage
from pipeline.config.data import AnyDataConfig
from pipeline.data.manifest import SourceInfo
from pipeline.errors import DataError, PipelineError, did_you_mean, first_line, kind_and_line, printable

log = logging.getLogger(__name__)

HUB = "hf:"
_WILDCARD = re.compile(r"[*?\[]")
# Folders of macOS in archives, and of file systems, which only their owner may read.
_OF_SYSTEMS = {"__MACOSX", "lost+found", "System Volume Information"}

# Words that mean the same split in the names of files.
_SPLIT_WORDS = (
    {"train", "training"},
    {"validation", "valid", "val", "dev"},
    {"test", "testing", "eval", "evaluation"},
)

Found = dict[str, tuple[int, str]]  # by path: size, and what changes with the content


class Problem(NamedTuple):
    """A document, an image, or the rest of a file, that cannot be read.

    Attributes:
        where: the file, and the place in it.
        why: what is wrong with it.
    """

    where: str
    why: str

    def __str__(self) -> str:
        return printable(f"{self.where}: {self.why}")


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
    # Names of files that are not UTF-8 hold surrogates.
    return hashlib.sha256(
        b"".join(part.encode("utf-8", "surrogatepass") + b"\0" for part in parts)
    ).hexdigest()


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


def is_a(path: str, suffixes: tuple[str, ...]) -> bool:
    """Return whether a file's name ends with one of the suffixes, in upper or lower case.

    Args:
        path: of the file.
        suffixes: in lower case.
    """
    return path.lower().endswith(suffixes)


def is_hidden(name: str) -> bool:
    """Return whether a path below a folder is one of those that systems and editors leave beside the data.

    Args:
        name: the path, relative to the folder.
    """
    parts = [part for part in name.split("/") if part not in (".", "..")]
    return any(part.startswith(".") or part in _OF_SYSTEMS for part in parts)


def fault_of_data(error: Exception) -> str:
    """Describe an error of reading data, and raise it again where the data is not its cause.

    Args:
        error: raised while data was read.

    Returns:
        Its type and the first line of its message.

    Raises:
        Exception: the error itself, if it is one of ours or comes from the network; the data is then read again.
    """
    if isinstance(error, PipelineError) or storage.of_network(error):
        raise error
    return kind_and_line(error)


@contextlib.contextmanager
def reached(source: str) -> Iterator[None]:
    """Turn an outage that lasts into an error that names the source.

    Args:
        source: `data.source`.

    Raises:
        DataError: the network or the store did not answer.
    """
    try:
        yield
    except PipelineError:
        raise
    except Exception as error:
        if not storage.of_network(error):
            raise
        raise DataError(f"data.source: {source!r} cannot be reached: {kind_and_line(error)}") from error


def list_files(source: str, root: str | None = None) -> list[SourceFile]:
    """List all files at a path, sorted by path; none if nothing is there.

    A path that exists is taken as it is, whatever characters it has. Linked folders are followed. Hidden files inside
    a folder are left alone.

    Args:
        source: a file, a folder, whose subfolders are listed too, or a glob.
        root: how the paths start (without the protocol of a URL); what follows is the name. None: the folder, or the
            folder that holds the file or all matches of the glob.

    Raises:
        DataError: a folder cannot be listed.
    """
    if storage.is_local(source):
        (found, base), protocol = _list_local(storage.resolve(source)), ""
    else:
        found, base, protocol = _list_remote(source)
    start = len(storage.join(base, "") if root is None else root)
    return [
        SourceFile(protocol + path, path[start:], size, version=digest([version]))
        for path, (size, version) in sorted(found.items())
    ]


def _list_local(path: str) -> tuple[Found, str]:
    """Return the files at a path of this machine, and the folder below which they have their names."""
    literal = _literal(path)
    try:
        if literal != path:
            matches = list(_matches(literal, path[len(literal) :].strip("/").split("/")))
        else:
            matches, literal = [path], path if os.path.isdir(path) else os.path.dirname(path)
        files = (_below(match) if os.path.isdir(match) else _regular(match) for match in matches)
        return {file: facts for group in files for file, facts in group}, literal
    except OSError as error:
        raise DataError(f"{error.filename or path}: cannot be listed: {error.strerror}") from error


def _literal(path: str) -> str:
    """Return a local path, or of a glob the folder in front of the first wildcard.

    What exists as it is written has no wildcards.
    """
    parts = path.split("/")
    for count, part in enumerate(parts):
        if _WILDCARD.search(part) and not os.path.lexists("/".join(parts[: count + 1])):
            return "/".join(parts[:count]) or "/"
    return path


def _matches(folder: str, parts: list[str]) -> Iterator[str]:
    """Yield what matches the parts of a glob below a local folder."""
    if not parts:
        yield folder
        return
    first, rest = parts[0], parts[1:]
    if not os.path.isdir(folder):
        return
    if first == "**":
        for below in [inner for inner, _ in _walk(folder)] if rest else [folder]:
            yield from _matches(below, rest)
    elif _WILDCARD.search(first):
        for name in fnmatch.filter(os.listdir(folder), first):
            if first.startswith(".") or not is_hidden(name):
                yield from _matches(storage.join(folder, name), rest)
    else:
        yield from _matches(storage.join(folder, first), rest)


def _walk(root: str) -> Iterator[tuple[str, list[str]]]:
    """Yield a local folder and those below it, linked ones too and hidden ones not, with the names of their files."""

    def fail(error: OSError) -> None:
        raise error

    above: dict[str, frozenset[tuple[int, int]]] = {root: frozenset()}
    for folder, inner, names in os.walk(root, onerror=fail, followlinks=True):
        info = os.stat(folder)
        chain = above.pop(folder) | {(info.st_dev, info.st_ino)}
        followed = []
        for name in itertools.filterfalse(is_hidden, inner):
            path = os.path.join(folder, name)
            info = os.stat(path)
            if (info.st_dev, info.st_ino) in chain:
                log.info("%s leads back to a folder that it lies in, and is not followed", path)
            else:
                above[path] = chain
                followed.append(name)
        inner[:] = followed
        yield folder, [name for name in names if not is_hidden(name)]


def _below(root: str) -> Iterator[tuple[str, tuple[int, str]]]:
    """Yield the files below a local folder."""
    for folder, names in _walk(root):
        for name in names:
            yield from _regular(os.path.join(folder, name))


def _regular(path: str) -> Iterator[tuple[str, tuple[int, str]]]:
    """Yield a local file; a link without a target too, which is named when it is read, but no pipe and no device."""
    try:
        info = os.stat(path)
    except OSError:
        if not os.path.lexists(path):
            return
        info = os.lstat(path)
    if stat.S_ISREG(info.st_mode) or stat.S_ISLNK(info.st_mode):
        yield path, (info.st_size, f"{info.st_size} {info.st_mtime_ns} {info.st_ctime_ns} {info.st_ino}")


@storage.retry
def _list_remote(source: str) -> tuple[Found, str, str]:
    """Return the files at a URL, the folder below which they have their names, and how their URLs start."""
    fs, inner = storage.filesystem(source)
    fs.invalidate_cache()
    with storage.explained(source):
        try:
            tops, base = {inner: fs.info(inner)}, inner
            if tops[inner]["type"] != "directory":
                base = inner.rpartition("/")[0]
        except FileNotFoundError as error:
            if error.__cause__ is not None and storage.of_network(error.__cause__):  # how HTTP's driver fails
                raise error.__cause__ from None
            tops = fs.glob(inner, detail=True) if _WILDCARD.search(inner) else {}
            base = _WILDCARD.split(inner)[0].rpartition("/")[0]
        found: Found = {}
        for top, info in tops.items():
            below = fs.find(top, detail=True) if info["type"] == "directory" else {top: info}
            files = {path: info for path, info in below.items() if not is_hidden(path[len(top) :])}
            found |= {path: (info.get("size") or 0, str(info)) for path, info in files.items()}
    return found, base, fs.unstrip_protocol(inner).removesuffix(inner)


def folders_in(path: str) -> set[str]:
    """Return the names of the folders in a folder, linked ones included, and hidden ones left out.

    Args:
        path: path or URL of the folder.
    """
    fs, inner = storage.filesystem(path)
    if storage.is_local(path):
        names = {name for name in os.listdir(inner) if os.path.isdir(storage.join(inner, name))}
    else:
        found = (info["name"] for info in fs.ls(inner, detail=True) if info["type"] == "directory")
        names = {name.rstrip("/").rpartition("/")[2] for name in found}
    return {name for name in names if not is_hidden(name)}


def find(source: str, suffixes: tuple[str, ...], *embedded: str) -> list[SourceFile]:
    """List the files of a source that can be read, sorted by path.

    Args:
        source: a file, a folder, whose subfolders are read too, or a glob.
        suffixes: of what can be read, in lower case.
        embedded: sources that are no files, for the message.

    Raises:
        DataError: nothing is there, or nothing that can be read.
    """
    try:
        with reached(source):
            files = list_files(source)
    except DataError as error:
        raise DataError(f"data.source: {str(error).removeprefix('data.source: ')}") from error
    if not files and storage.exists(source):
        raise DataError(f"data.source: no file at {source!r}, besides hidden ones, pipes and devices")
    if not files:
        folder, _, name = source.rstrip("/").rpartition("/")
        near = did_you_mean(name, [*storage.listing(folder or "."), *embedded])
        raise DataError(f"data.source: nothing at {source!r}{near}")
    readable = [file for file in files if is_a(file.path, suffixes)]
    if not readable:
        raise DataError(
            f"data.source: no file to read among {len(files)} at {source!r}, such as {files[0].path!r}; "
            f"expected {', '.join(suffixes)}"
        )
    if others := len(files) - len(readable):
        first = next(file.path for file in files if not is_a(file.path, suffixes))
        log.info("%s: %d files of other kinds are ignored, such as %r", source, others, first)
    return readable


def by_split(files: Sequence[SourceFile], *splits: str) -> dict[str, list[SourceFile]]:
    """Divide files by the splits that their names, or those of their folders, have as a word of their own.

    The rule is that of the `datasets` library: `train-00000.parquet`, `data/test.jsonl` and `Dev/a.txt` say their
    split, and a word counts like its usual other forms. Files of other splits are left alone.

    Args:
        files: of a source.
        splits: names of the splits.

    Returns:
        The files of every split, in order.

    Raises:
        DataError: a split has no file, or a file belongs to two splits.
    """
    words = {file: _words(file) for file in files}
    found: dict[str, list[SourceFile]] = {}
    for split in splits:
        found[split] = [file for file in files if words[file] & _forms(split)]
        if not found[split]:
            names = ", ".join(file.name for file in files[:6])
            near = did_you_mean(split, sorted(set().union(*words.values())))
            raise DataError(
                f"data.source: no file with the split {split!r} in its name among {len(files)}, such as {names}; "
                f"expected one such as {split}-00000.parquet{near}"
            )
    counts = Counter(file for part in found.values() for file in part)
    if both := [file for file in files if counts[file] > 1]:
        raise DataError(f"data.source: {both[0].path!r} has more than one of the splits {splits} in its name")
    if others := len(files) - sum(map(len, found.values())):
        log.info("%d files of other splits than %s are ignored", others, ", ".join(splits))
    return found


def has_split(files: Sequence[SourceFile], split: str) -> bool:
    """Tell whether a split is named in the names of any files, as `by_split` reads them.

    Args:
        files: of a source.
        split: name of the split.
    """
    return any(_words(file) & _forms(split) for file in files)


def _words(file: SourceFile) -> set[str]:
    """Words of letters in the name of a file and of its folders."""
    return set(re.split(r"[^a-z]+", file.name.lower()))


def _forms(split: str) -> Set[str]:
    """The name of a split, in all its usual forms."""
    return next((forms for forms in _SPLIT_WORDS if split.lower() in forms), {split.lower()})


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
        raise DataError(f"data.source: {data.source!r} cannot be opened: {first_line(error)}") from error
