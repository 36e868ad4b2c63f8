"""What a Tracker has still to send, and its form as a line of JSON."""

import base64
import json
from dataclasses import asdict, dataclass
from typing import Any


@dataclass(frozen=True)
class Point:
    """One value of one metric, with the time at which it was measured."""

    key: str
    value: float
    step: int
    timestamp: int  # milliseconds


@dataclass(frozen=True)
class Content:
    """An artifact that exists only here."""

    file: str
    data: bytes


@dataclass(frozen=True)
class Upload:
    """An artifact that is a file or folder on disk."""

    path: str
    folder: str


Item = Point | Content | Upload


def size(item: Item) -> int:
    """Bytes in memory, roughly."""
    return 300 + (len(item.data) if isinstance(item, Content) else 0)


def label(item: Item) -> str:
    """What a warning calls it."""
    if isinstance(item, Point):
        return f"metric {item.key!r}"
    return f"artifact {item.file if isinstance(item, Content) else item.path!r}"


_KINDS: dict[str, Any] = {"point": Point, "content": Content, "upload": Upload}


def to_line(item: Item) -> str:
    """One line of the spill file."""
    fields = asdict(item)
    if isinstance(item, Content):
        fields["data"] = base64.b64encode(item.data).decode()
    kind = next(name for name, kind in _KINDS.items() if kind is type(item))
    return json.dumps({"kind": kind} | fields) + "\n"


def from_line(line: str) -> Item:
    """The inverse of `to_line`."""
    fields = json.loads(line)
    kind = fields.pop("kind")
    if kind == "content":
        fields["data"] = base64.b64decode(fields["data"])
    return _KINDS[kind](**fields)
