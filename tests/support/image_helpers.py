"""Small labelled images, written in every form that is read."""

import gzip
import io
import json
import tarfile
from pathlib import Path

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
from PIL import Image

CLASSES = 3


def make_images(count: int, side: int = 8, seed: int = 0) -> tuple[np.ndarray, np.ndarray]:
    """Grey images of four shaded quarters with a little noise [n, side, side]; every class occurs."""
    rng = np.random.default_rng(seed)
    quarters = rng.integers(0, 256, (count, 2, 2)).repeat(side // 2, 1).repeat(side // 2, 2)
    noisy = quarters + rng.integers(-20, 21, (count, side, side))
    return noisy.clip(0, 255).astype(np.uint8), np.arange(count) * 7 % CLASSES


def encoded(pixels: np.ndarray, kind: str = "PNG") -> bytes:
    sink = io.BytesIO()
    Image.fromarray(pixels).save(sink, kind)
    return sink.getvalue()


def write_folders(folder: Path, images: np.ndarray, labels: np.ndarray) -> str:
    """Named so that sorting the paths gives the images' order within a class."""
    for number, (image, label) in enumerate(zip(images, labels, strict=True)):
        path = folder / f"class_{label}" / f"{number:05d}.png"
        path.parent.mkdir(parents=True, exist_ok=True)
        path.write_bytes(encoded(image))
    return str(folder)


def write_tar(path: Path, samples: list[dict[str, bytes]], first: int = 0) -> None:
    """A sample is its members' contents by suffix."""
    path.parent.mkdir(parents=True, exist_ok=True)
    with tarfile.open(path, "w") as tar:
        for number, sample in enumerate(samples, first):
            for suffix, content in sample.items():
                member = tarfile.TarInfo(f"s/{number:05d}.{suffix}")
                member.size = len(content)
                tar.addfile(member, io.BytesIO(content))


def write_tars(folder: Path, images: np.ndarray, labels: np.ndarray) -> str:
    """Two files; labels as `cls` in one, in `json` in the other."""
    half = len(images) // 2
    one = [
        {"png": encoded(image), "cls": b"%d" % label}
        for image, label in zip(images[:half], labels[:half], strict=True)
    ]
    two = [
        {"json": json.dumps({"label": int(label)}).encode(), "png": encoded(image)}
        for image, label in zip(images[half:], labels[half:], strict=True)
    ]
    write_tar(folder / "shard-train-0000.tar", one)
    write_tar(folder / "shard-train-0001.tar", two, half)
    return str(folder)


def write_parquet(folder: Path, images: np.ndarray, labels: np.ndarray) -> str:
    """Two files, as Hugging Face stores images in one, plain bytes in the other."""
    half = len(images) // 2
    files = [encoded(image) for image in images]
    structs = [{"bytes": file, "path": f"{i}.png"} for i, file in enumerate(files)]
    (folder / "data").mkdir(parents=True)
    for number, (column, part) in enumerate(((structs[:half], labels[:half]), (files[half:], labels[half:]))):
        table = pa.table({"image": column, "label": pa.array(part)})
        path = folder / "data" / f"train-{number:05d}-of-00002.parquet"
        pq.write_table(table, path, row_group_size=5)
    return str(folder)


def idx(values: np.ndarray) -> bytes:
    sizes = np.array(values.shape, dtype=">i4").tobytes()
    return bytes([0, 0, 8, values.ndim]) + sizes + values.astype(np.uint8).tobytes()


def write_idx(folder: Path, images: np.ndarray, labels: np.ndarray, prefix: str = "train") -> str:
    """Images packed, labels not."""
    folder.mkdir(parents=True, exist_ok=True)
    (folder / f"{prefix}-images-idx3-ubyte.gz").write_bytes(gzip.compress(idx(images)))
    (folder / f"{prefix}-labels-idx1-ubyte").write_bytes(idx(labels))
    return str(folder)
