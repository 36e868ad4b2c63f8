"""Files by path or URL (anything that fsspec opens), read with retries and written completely or not at all."""

# ruff: noqa: F401  these imports are the package's interface

from pipeline.storage.cache import read_cached
from pipeline.storage.files import (
    COMPLETE,
    arrow,
    check_writable,
    exists,
    explained,
    fetch,
    filesystem,
    folder_complete,
    follow_umask,
    is_local,
    join,
    listing,
    open_read,
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
    scratch,
    sha256,
    size,
    sweep,
)
from pipeline.storage.retries import of_network, retry
