"""Files by path or URL (anything that fsspec opens), read with retries and written completely or not at all."""

# ruff: noqa: F401  these imports are the package's interface

from pipeline.storage.cache import fetch, node_lock, read_cached
from pipeline.storage.files import (
    COMPLETE,
    arrow,
    check_writable,
    create,
    exists,
    filesystem,
    folder_complete,
    is_local,
    join,
    listing,
    modified,
    node_folder,
    open_read,
    present_time,
    publish_bytes,
    publish_file,
    publish_folder,
    publish_text,
    publishing_folder,
    read_bytes,
    read_json,
    read_text,
    remove,
    resolve,
    sha256,
    size,
    sweep,
    touch,
)
from pipeline.storage.retries import retry
