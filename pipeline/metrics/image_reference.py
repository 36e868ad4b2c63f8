"""What images are compared with: statistics and features of real images, computed once, or read from an .npz file."""

import hashlib
import logging
import zipfile
import zlib
from collections.abc import Callable, Iterable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from typing import IO

import numpy as np
import safetensors.numpy
from jaxtyping import Float, Shaped, UInt8
from safetensors import SafetensorError

from pipeline import storage
from pipeline.errors import ConfigError, DataError
from pipeline.metrics.image_features import FeatureNet, Outputs
from pipeline.metrics.images import Gaussian, gaussian
from pipeline.metrics.precision_recall import LEAST_IMAGES

log = logging.getLogger(__name__)

MOST_FEATURES = 50_000  # images whose own features are kept, as precision and recall are published
_LAYOUT = "expected mu and sigma, or images as arr_0, or all three"
_DAMAGE = (OSError, ValueError, EOFError, KeyError, zipfile.BadZipFile, zlib.error, NotImplementedError)


@dataclass(frozen=True)
class Reference:
    """What samples are compared with.

    Attributes:
        statistics: of the features of all real images.
        features: of up to `MOST_FEATURES` of them, evenly spread; None where they are not known.
    """

    statistics: Gaussian
    features: Float[np.ndarray, "n D"] | None


def reference(
    outputs: Callable[[], Iterable[Outputs]], net: str, data: str, count: int, cache: str
) -> Reference:
    """Compute the reference of real images, or read it where it was kept.

    Args:
        outputs: gives the net's outputs for exactly `count` images; called only where nothing is kept yet.
        net: name of the feature net.
        data: a key of the images, such as the hash of a manifest.
        count: number of images.
        cache: folder, or URL of one, that keeps references.

    Raises:
        DataError: the number of images differs, or the kept file is damaged.
    """
    key = hashlib.sha256(f"{data}\n{net}\n{count}\n{MOST_FEATURES}".encode()).hexdigest()
    path = storage.join(cache, f"features-{key[:32]}.safetensors")
    if storage.exists(path):
        return _read(path, count)
    storage.check_writable(cache, "data.path")
    chosen = np.unique(np.linspace(0, count - 1, min(count, MOST_FEATURES)).astype(np.int64))
    kept: list[np.ndarray] = []

    def watched() -> Iterator[Float[np.ndarray, "n D"]]:
        first = 0
        for part in outputs():
            last = first + len(part.features)
            kept.append(part.features[chosen[(first <= chosen) & (chosen < last)] - first])
            first = last
            yield part.features

    statistics = gaussian(watched())
    if statistics.count != count:
        raise DataError(f"reference statistics: {statistics.count} images of {data}; expected {count}")
    features = np.concatenate(kept)
    tensors = {"mean": statistics.mean, "covariance": statistics.covariance, "count": np.array([count])}
    storage.publish_bytes(path, safetensors.numpy.save(tensors | {"features": features}))
    log.info("wrote the statistics of %d reference images under %s to %s", count, net, path)
    return Reference(statistics, features)


class ReferenceFile:
    """An .npz file with a published reference.

    Two layouts are read: that of guided-diffusion, with `mu`, `sigma` and images as `arr_0`, and that of pytorch-fid,
    with `mu` and `sigma` alone. Images alone are enough, too.

    Args:
        spec: path or URL of the file.
        side: of the images, in pixels.

    Attributes:
        name: of the file.
        key: hash of its content.
        count: number of images in it; 0 where it has none.
        statistics: of the features, of `count` images; None where the file has images alone.

    Raises:
        ConfigError: there is no such file.
        DataError: it is damaged, or its arrays are not those of a reference.
    """

    def __init__(self, spec: str, side: int):
        self._origin = f"evaluation.reference: {spec!r}"
        if not storage.exists(spec):
            raise ConfigError(f"{self._origin} does not exist; expected an .npz file")
        self._file, self.name = storage.fetch(spec), spec.rpartition("/")[2]
        with self._reading():
            self.key = storage.sha256(str(self._file))
            if not zipfile.is_zipfile(self._file):
                raise self._wrong(f"is no .npz file; {_LAYOUT}")
            with np.load(self._file, allow_pickle=False) as arrays:
                names = set(arrays.files)
                if not names & {"mu", "arr_0"} or ("mu" in names) != ("sigma" in names):
                    raise self._wrong(f"has {', '.join(sorted(names)) or 'no arrays'}; {_LAYOUT}")
                pair = (arrays["mu"], arrays["sigma"]) if "mu" in names else None
            self.count = self._count(side) if "arr_0" in names else 0
        self.statistics = None if pair is None else self._gaussian(*pair)

    def check_fits(self, net: FeatureNet, side: int) -> None:
        """Refuse statistics of another network's features.

        Args:
            net: the feature net.
            side: of the images, in pixels.

        Raises:
            DataError: the numbers of features differ.
        """
        width = net(np.zeros((1, side, side, 3), np.uint8)).features.shape[1]
        if self.statistics is not None and width != (known := len(self.statistics.mean)):
            raise self._wrong(
                f"has statistics of {known} features, and evaluation.features {net.spec!r} gives {width}; "
                "expected those of the same network"
            )

    def images(self, block: int) -> Iterator[UInt8[np.ndarray, "n S S 3"]]:
        """Read the images in blocks, so that not all of them are in memory.

        Args:
            block: images of a block, at most.

        Raises:
            DataError: the file is damaged.
        """
        with self._reading(), zipfile.ZipFile(self._file) as archive, archive.open("arr_0.npy") as file:
            shape, _ = _header(file)
            for first in range(0, shape[0], block):
                part = (min(block, shape[0] - first), *shape[1:])
                yield np.frombuffer(file.read(int(np.prod(part))), np.uint8).reshape(part)

    def _count(self, side: int) -> int:
        """Check the images by the header of their array, and return their number."""
        with zipfile.ZipFile(self._file) as archive, archive.open("arr_0.npy") as file:
            shape, dtype = _header(file)
        if dtype != np.uint8 or len(shape) != 4 or shape[1:] != (side, side, 3) or shape[0] < LEAST_IMAGES:
            raise self._wrong(
                f"has {dtype} {list(shape)} as arr_0; expected at least {LEAST_IMAGES} images of data.size {side}, "
                f"uint8 [n, {side}, {side}, 3]"
            )
        return shape[0]

    def _gaussian(self, mean: Shaped[np.ndarray, "..."], covariance: Shaped[np.ndarray, "..."]) -> Gaussian:
        """Check statistics and convert them to float64."""
        shapes = f"mu {mean.dtype} {list(mean.shape)}, sigma {covariance.dtype} {list(covariance.shape)}"
        if mean.ndim != 1 or covariance.shape != (len(mean), len(mean)):
            raise self._wrong(f"has {shapes}; expected [D] and [D, D]")
        if mean.dtype.kind != "f" or covariance.dtype.kind != "f":
            raise self._wrong(f"has {shapes}; expected floating-point numbers")
        if not (np.isfinite(mean).all() and np.isfinite(covariance).all()):
            raise self._wrong("has statistics that are not finite; expected numbers")
        if not np.allclose(covariance, covariance.T, atol=1e-6 * np.abs(covariance).max()):
            raise self._wrong("has a sigma that is not symmetric; expected a covariance")
        return Gaussian(self.count, mean.astype(np.float64), covariance.astype(np.float64))

    @contextmanager
    def _reading(self) -> Iterator[None]:
        """Raise what a damaged file leads to as our own error."""
        try:
            yield
        except DataError:
            raise
        except _DAMAGE as error:
            raise self._wrong(f"cannot be read as .npz: {error}; {_LAYOUT}") from None

    def _wrong(self, what: str) -> DataError:
        return DataError(f"{self._origin} {what}")


def _header(file: IO[bytes]) -> tuple[tuple[int, ...], np.dtype]:
    """Read shape and type of an array, as far as its values."""
    version = np.lib.format.read_magic(file)
    read = np.lib.format.read_array_header_1_0 if version == (1, 0) else np.lib.format.read_array_header_2_0
    shape, fortran, dtype = read(file)
    if fortran:
        raise ValueError("arr_0 is in Fortran order")
    return shape, dtype


def _read(path: str, count: int) -> Reference:
    """Read a kept reference and check it."""
    try:
        tensors = safetensors.numpy.load(storage.read_bytes(path))
        kept = Gaussian(int(tensors["count"][0]), tensors["mean"], tensors["covariance"])
        features = tensors["features"]
    except (SafetensorError, KeyError) as error:
        raise DataError(f"{path}: damaged statistics of features ({error}); remove it") from None
    width = len(kept.mean)
    if kept.count != count or kept.covariance.shape != (width, width) or features.shape[1:] != (width,):
        raise DataError(
            f"{path}: {kept.count} images, mean {list(kept.mean.shape)}, covariance {list(kept.covariance.shape)}, "
            f"features {list(features.shape)}; expected {count} images and fitting widths; remove it"
        )
    return Reference(kept, features)
