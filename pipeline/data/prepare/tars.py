"""Samples in tar files: hidden members left out, links resolved, joined archives, and a name for every damage."""

import posixpath
import tarfile
from collections.abc import Iterator
from typing import IO, NamedTuple

from pipeline.data.prepare.source_files import is_hidden

_BLOCK = tarfile.BLOCKSIZE
_CHUNK = 1 << 16


class Member(NamedTuple):
    """A file in a tar file.

    Attributes:
        name: its path in the archive.
        start: its first byte in the tar file.
        size: in bytes.
        fault: why its bytes cannot be read; empty if they can.
    """

    name: str
    start: int
    size: int
    fault: str = ""

    def read(self, file: IO[bytes]) -> bytes | None:
        """Return the content, or None if the tar file ends before it.

        Args:
            file: the tar file.
        """
        file.seek(self.start)
        content = file.read(self.size)
        return content if len(content) == self.size else None


Sample = dict[str, Member | bytes]  # by suffix


def collect(file: IO[bytes], samples: list[tuple[str, Sample]], read: set[str]) -> None:
    """Collect the samples of a tar file: its members by what stands in front of the first dot of their names.

    The members of a sample need not stand next to each other. A suffix that comes again begins another sample of the
    same name.

    Args:
        file: the tar file, at its start.
        samples: is extended by the name and the members of every sample, in the order in which they begin.
        read: suffixes of members whose content is collected.

    Raises:
        tarfile.TarError: the archive is damaged; `samples` has what is in front of the damage.
    """
    newest: dict[str, Sample] = {}
    stem, member = "", None
    try:
        for member in members(file):
            stem, suffix = _split(member.name)
            if stem not in newest or suffix in newest[stem]:
                newest[stem] = {}
                samples.append((stem, newest[stem]))
            is_read = suffix in read and not member.fault
            newest[stem][suffix] = (member.read(file) or b"") if is_read else member
    except tarfile.TarError:
        if member and (len(newest[stem]) == 1 or member.read(file) is None):
            samples.remove((stem, newest[stem]))  # the damage is inside it
        raise


def _split(name: str) -> tuple[str, str]:
    """Split a member's name at the first dot of its last part."""
    folder, slash, base = name.rpartition("/")
    stem, _, suffix = base.partition(".")
    return folder + slash + stem, suffix.lower()


def members(file: IO[bytes]) -> Iterator[Member]:
    """Yield the files in a tar file in order, also those of archives that were joined to it.

    Args:
        file: the tar file, at its start.

    Raises:
        tarfile.ReadError: the archive is damaged, or ends without the blocks that close it.
    """
    start: int | None = 0
    while start is not None:
        file.seek(start)
        known: dict[str, Member] = {}
        with tarfile.open(fileobj=file, mode="r:") as tar:
            for info in tar:
                if (info.isreg() or info.islnk() or info.issym()) and not is_hidden(info.name):
                    member = _resolved(info, known)
                    known[posixpath.normpath(info.name)] = member
                    yield member
            start = _start_of_next(file, tar.offset)


def _resolved(info: tarfile.TarInfo, known: dict[str, Member]) -> Member:
    """Return where the bytes of a member are; those of a link are where its target's are."""
    if info.issparse():
        return Member(info.name, 0, 0, "stored as a sparse file; expected a plain one")
    if info.isreg():
        return Member(info.name, info.offset_data, info.size)
    folder = posixpath.dirname(info.name) if info.issym() else ""
    target = known.get(posixpath.normpath(posixpath.join(folder, info.linkname)))
    if target is None:
        return Member(info.name, 0, 0, f"a link to {info.linkname!r}, which is not in front of it")
    return target._replace(name=info.name)


def _start_of_next(file: IO[bytes], end: int) -> int | None:
    """Return where another archive begins behind the end of one, or None if only zeros follow.

    Args:
        file: the tar file.
        end: where the last member of an archive ends.
    """
    file.seek(end)
    block = file.read(_BLOCK)
    if len(block) < _BLOCK:
        what = "is cut inside a header" if block else "ends without the blocks that close it"
        raise tarfile.ReadError(f"the archive {what} at byte {end}")
    if block.strip(b"\0"):
        raise tarfile.ReadError(f"damaged header at byte {end}")
    while block:
        if block.strip(b"\0"):
            return end + (len(block) - len(block.lstrip(b"\0"))) // _BLOCK * _BLOCK
        end += len(block)
        block = file.read(_CHUNK)
    return None
