"""Files by path or URL (anything that fsspec opens), read with retries and written completely or not at all."""

# ruff: noqa: F401  these imports are the package's interface

from pipeline.storage.cache import fetch, node_lock, read_cached, read_ranges
from pipeline.storage.files import (
    COMPLETE,
    check_writable,
    create,
    exists,
    folder_complete,
    follow_umask,
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
    scratch,
    sha256,
    size,
    sizes,
    sweep,
    touch,
)
from pipeline.storage.paths import arrow, explained, filesystem, is_local, join, resolve
from pipeline.storage.retries import of_network, retry
