"""The folder of prepared data: its name, whether it is complete and fits the config, and how it is made.

The intermediate files of a preparation lie in a folder beside the shards, which is named by its plan, so that an
interrupted preparation is continued, and one of another input is not. The manifest is written last.
"""

import contextlib
import logging
import os
import re
from collections.abc import Callable
from pathlib import Path
from typing import Any

import ray

from pipeline import storage
from pipeline.config.data import AnyDataConfig, TextDataConfig
from pipeline.data import mixture
from pipeline.data.manifest import MANIFEST, TOKENIZER, Manifest, differences, hash_content
from pipeline.data.prepare import images, text, workflow
from pipeline.data.prepare.image_sources import ImageSource, open_images
from pipeline.data.prepare.source_files import HUB
from pipeline.data.prepare.text_sources import TextSource, open_source
from pipeline.errors import DataError
from pipeline.runtime import claims
from pipeline.runtime.ray_cluster import join, start

log = logging.getLogger(__name__)

_WORK = "_work-"
_SHARD = re.compile(r"(train|validation)-\d{5}\.parquet")


def data_path(data: AnyDataConfig, root: str) -> str:
    """Return the folder of the prepared data: `data.path`, or one named by what determines its contents.

    Args:
        data: the data section of the config.
        root: the folder that `cluster.storage` names, as `storage.resolve` returns it.
    """
    if data.path is not None:
        return storage.resolve(data.path)
    return storage.join(root, "data", _folder_name(data))


def ensure(data: AnyDataConfig, path: str) -> Manifest:
    """Return the manifest of the data in a folder, which is prepared first if it is not there.

    A local source that has changed since the preparation causes only a warning: a run that is continued keeps
    the data that it started with.

    Args:
        data: the data section of the config.
        path: folder of the prepared data, as `data_path` returns it.

    Raises:
        DataError: the folder holds other data, or the preparation failed.
        ConfigError: the folder cannot be written, or the tokenizer does not exist.
    """
    if data.kind == "text" and data.mix is not None:
        return _mixed(data, path, ensure)
    manifest = _prepared(data, path)
    if manifest is None:
        return prepare(data, path)
    if storage.is_local(data.source) and not data.source.startswith(HUB):
        with contextlib.suppress(DataError):  # the source may be gone: its shards are enough
            if _open(data).info.fingerprint != manifest.source.fingerprint:
                log.warning("%s has changed since %s was prepared from it", data.source, path)
    return manifest


def prepare(data: AnyDataConfig, path: str) -> Manifest:
    """Make the shards of the data, or finish them where an interrupted preparation stopped.

    While another job prepares the same folder, this one waits.

    Args:
        data: the data section of the config.
        path: folder of the prepared data, as `data_path` returns it.

    Returns:
        The manifest of the complete folder.

    Raises:
        DataError: the source is empty, unreadable or changed, or the folder holds other data.
        ConfigError: the folder cannot be written, or the tokenizer does not exist.
    """
    if data.kind == "text" and data.mix is not None:
        return _mixed(data, path, prepare)
    manifest = _prepared(data, path)
    source = _open(data)
    if manifest is not None:
        return _known(data, source, path, manifest)
    # A sweep fills in data.path with the derived folder: the name tells which key the path came from.
    derived = data.path is None or path.endswith(f"/data/{_folder_name(data)}")
    key = "cluster.storage" if derived else "data.path"
    with claims.held(path, key, f"the data in {path}", "prepared", wait=True):
        manifest = _prepared(data, path)  # by the job that this one has waited for
        return _make(data, source, path) if manifest is None else _known(data, source, path, manifest)


def _mixed(data: TextDataConfig, path: str, prepared: Callable[[AnyDataConfig, str], Manifest]) -> Manifest:
    """Prepare every source of a mixture in a folder of its own beside `path`, where only a manifest is written.

    A source's folder is that of a run on this source alone, so that runs share it.
    """
    manifest = _prepared(data, path)
    folders = [storage.join(path.rpartition("/")[0], _folder_name(part)) for part in data.parts]
    parts = [prepared(part, folder) for part, folder in zip(data.parts, folders, strict=True)]
    fresh = mixture.manifest_of(data, _content(data), folders, parts)
    if manifest is None:
        derived = data.path is None or path.endswith(f"/data/{_folder_name(data)}")
        key = "cluster.storage" if derived else "data.path"
        with claims.held(path, key, f"the data in {path}", "prepared", wait=True):
            tokenizer = text.cached_tokenizer(storage.join(folders[0], TOKENIZER))
            workflow.save_tokenizer(tokenizer, storage.join(path, TOKENIZER))
            fresh.publish(path)
        log.info("%s mixes %d sources", path, len(parts))
    elif manifest.splits != fresh.splits:
        raise DataError(
            f"data.mix: the sources are not what they were when {path} was made of them; remove that folder, or set "
            "data.path to another one"
        )
    return fresh


def _known(data: AnyDataConfig, source: TextSource | ImageSource, path: str, manifest: Manifest) -> Manifest:
    """Return the manifest of data that is prepared; refuse a source that has changed since."""
    if manifest.source.fingerprint != source.info.fingerprint:
        raise DataError(
            f"data.source: {data.source!r} is not what it was when {path} was prepared from it; "
            "remove that folder to prepare it again, or set data.path to another one"
        )
    log.info("%s is already prepared", path)
    _clean(path, manifest)
    return manifest


def _make(data: AnyDataConfig, source: TextSource | ImageSource, path: str) -> Manifest:
    """Make the shards in a folder that this process owns."""
    plan: dict[str, Any] = {"content": _content(data), "plan": source.plan}
    if data.kind != "text":  # units of one size cannot be continued with those of another
        plan["unit_size"] = images.unit_size(data)
    else:
        plan["units"] = text.UNIT_FORMAT
    work = storage.join(path, f"{_WORK}{hash_content(plan)[:16]}")
    if not ray.is_initialized():
        if address := os.environ.get("RAY_ADDRESS"):
            join(address)
        else:
            start(address="local", include_dashboard=False, log_to_driver=False)
    log.info("preparing %s in %s", data.source, path)
    build: Callable[..., Manifest] = text.build if data.kind == "text" else images.build
    manifest = build(data, source, path, work=work)
    manifest.publish(path)
    _clean(path, manifest)
    _report(path, manifest)
    return manifest


def _folder_name(data: AnyDataConfig) -> str:
    """Return the name of the folder where `data.path` gives none, derived from what determines its contents."""
    extent = data.length if data.kind == "text" else data.size
    source = "mix" if data.kind == "text" and data.mix is not None else data.source
    names: tuple[str, ...] = (source.rstrip("/*").rpartition("/")[2], Path(data.tokenizer).stem, str(extent))
    names += ("captions",) if data.kind == "pair" else ()
    slug = "-".join(re.sub(r"[^A-Za-z0-9]+", "_", name).strip("_") for name in names)
    return f"{slug}-{hash_content(_content(data))[:10]}"


def _content(data: AnyDataConfig) -> dict[str, Any]:
    """Return every setting that determines what the shards hold."""
    if data.kind == "text" and data.mix is not None:
        contents = [text.content(part) for part in data.parts]
        return {
            "mix": [content | {"weight": m.weight} for content, m in zip(contents, data.mix, strict=True)]
        }
    return text.content(data) if data.kind == "text" else images.content(data)


def _open(data: AnyDataConfig) -> TextSource | ImageSource:
    """List what `data.source` names, without reading it."""
    return open_source(data) if data.kind == "text" else open_images(data)


def _prepared(data: AnyDataConfig, path: str) -> Manifest | None:
    """Return the manifest of the data in `path`, or None if there is none yet; refuse other data."""
    # A mixture that was interrupted has left its tokenizer.
    names = [name for name in storage.listing(path) if name not in (claims.FOLDER, TOKENIZER)]
    if MANIFEST in names:
        manifest, wants = Manifest.read(path), _content(data)
        has = manifest.content
        pairs = {f"data.{key}": (has.get(key), wants.get(key)) for key in {**wants, **has}}
        if lines := differences(pairs, "config"):
            raise DataError(
                f"data.path: {path!r} holds data of another config; set another path, or remove the folder:\n"
                + "\n".join(lines)
            )
        return manifest
    if names and not any(name.startswith(_WORK) for name in names):
        raise DataError(
            f"data.path: {path!r} holds other files, such as {names[0]!r}; expected a new or empty folder"
        )
    return None


def _clean(path: str, manifest: Manifest) -> None:
    """Remove intermediate files, unfinished ones, and shards of an interrupted run on another input."""
    known = {file.name for split in manifest.splits.values() for file in split.files}
    for name in storage.listing(path):
        if name.startswith(_WORK) or (_SHARD.fullmatch(name) and name not in known):
            storage.remove(storage.join(path, name))
    storage.sweep(path)


def _report(path: str, manifest: Manifest) -> None:
    """Log what was prepared."""
    kind = "documents" if manifest.grid is None else "images"
    counts = (manifest.documents, kind, manifest.skipped.count, manifest.documents_empty)
    log.info("prepared %s: %d %s, besides %d that cannot be read and %d empty ones", path, *counts)
    if manifest.answer_block is not None:
        cut, full = manifest.rows_cut, manifest.rows_full
        log.info("%d answers are cut to the row; %d prompts fill theirs and are left out", cut, full)
    if manifest.caption is not None:
        log.info("%d captions do not fit with an end of text, and are cut", manifest.rows_cut)
    for name, split in manifest.splits.items():
        rows, dropped = manifest.rows(name), split.tokens_dropped
        log.info("%s: %d rows of %d tokens, %d tokens dropped", name, rows, manifest.length, dropped)
