"""Convert images to codes and back: with patches found by k-means, or with a published LlamaGen tokenizer."""

import hashlib
import json
import math
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any, Protocol, runtime_checkable

import numpy as np
import torch
import torch.nn.functional as F
from jaxtyping import Float32, Float64, Int, Int64, UInt8
from safetensors.torch import load_file, save_file
from torch import Tensor

from pipeline import storage
from pipeline.errors import CheckpointError, ConfigError, DataError, did_you_mean
from pipeline.models.model_folder import check_shapes
from pipeline.models.released.layouts import SUFFIXES, count_blocks, read, rename, tensor_shape

INFO_FILE, WEIGHTS_FILE = "image_tokenizer.json", "image_tokenizer.safetensors"
FIT_PATCHES = 50_000  # most distinct patches that a codebook is fitted on; more cost time and help little
MAX_DISTANCES = 1 << 23  # that are held in memory at a time

# Name in transformers' Janus -> name in LlamaGen's files.
RENAMES = (
    (r"^encoder\.down\.", "encoder.conv_blocks."),
    (r"^decoder\.up\.", "decoder.conv_blocks."),
    (r"^(..coder\.conv_blocks\.\d+)\.block\.", r"\1.res."),
    (r"^(..coder\.mid)\.block_1\.", r"\1.0."),
    (r"^(..coder\.mid)\.attn_1\.", r"\1.1."),
    (r"^(..coder\.mid)\.block_2\.", r"\1.2."),
)
GROUPS = 32  # of every group norm in the network


@runtime_checkable
class ImageTokenizer(Protocol):
    """Interface of an image tokenizer.

    Attributes:
        name: a name to show; what determines codes and pixels is `hash`.
        codes: C, the size of the codebook; codes are 0..C-1.
        factor: side of a token in pixels, so that the side of the grid is the image's / factor.
        hash: SHA-256 over everything that determines codes and pixels.
    """

    name: str
    codes: int
    factor: int
    hash: str

    def encode(self, images: UInt8[np.ndarray, "n S S 3"]) -> Int64[np.ndarray, "n T"]:
        """Convert images to codes.

        Args:
            images: square pictures in RGB.

        Returns:
            The codes of the grid, row by row, T = (S / factor)^2.

        Raises:
            ConfigError: `factor` does not divide the images' side.
        """

    def decode(self, codes: Int[np.ndarray, "n T"]) -> UInt8[np.ndarray, "n S S 3"]:
        """Convert codes to images.

        Args:
            codes: codes of square grids, row by row.

        Returns:
            The pictures in RGB.

        Raises:
            DataError: the number of codes is not a square, or a code is not one of the codebook.
        """

    def save(self, folder: Path) -> None:
        """Write the files that `load_image_tokenizer` needs to load it again, offline.

        Args:
            folder: where to write; it is made if it does not exist.
        """


class PatchVQ:
    """An image tokenizer that replaces every patch of factor x factor pixels by the nearest one of a codebook.

    Patches and codebook are whole numbers, so distances are exact: codes depend on neither batch nor machine.
    Methods and attributes are those of `ImageTokenizer`.

    Args:
        patches: the codebook.
    """

    def __init__(self, patches: UInt8[np.ndarray, "C factor factor 3"]):
        self.codes, self.factor = patches.shape[:2]
        self.name = "patches"
        self._patches = patches
        self._centres = torch.from_numpy(patches.reshape(self.codes, -1).astype(np.float64))
        self.hash = digest("patches", {"patches": torch.from_numpy(patches)})

    def encode(self, images: UInt8[np.ndarray, "n S S 3"]) -> Int64[np.ndarray, "n T"]:
        """See `ImageTokenizer.encode`."""
        patches = torch.from_numpy(_cut(images, self.factor).astype(np.float64))
        tokens = (images.shape[1] // self.factor) ** 2
        return nearest(patches, self._centres).numpy().reshape(len(images), tokens)

    def decode(self, codes: Int[np.ndarray, "n T"]) -> UInt8[np.ndarray, "n S S 3"]:
        """See `ImageTokenizer.decode`."""
        grid = _check_codes(codes, self.codes)
        side = grid * self.factor
        rows = self._patches[codes].reshape(-1, grid, grid, self.factor, self.factor, 3)
        return rows.transpose(0, 1, 3, 2, 4, 5).reshape(-1, side, side, 3)

    def save(self, folder: Path) -> None:
        """See `ImageTokenizer.save`."""
        _save(folder, "patches", self, {"patches": torch.from_numpy(self._patches)})


class LlamaGen:
    """The VQ tokenizer of LlamaGen, whose size is read from its tensors.

    Encoding and decoding run at one batch shape, the last batch padded, so that an image's codes do not depend
    on how many others a call gets. Other batch shapes differ only where two codes are equally near, up to
    rounding; `hash` leaves batch and device out. Methods and attributes are those of `ImageTokenizer`, and the
    steps that they consist of.

    Args:
        name: a name to show.
        tensors: weights by LlamaGen's names.
        batch: number of images that go through the network at a time.
        device: where the network runs.
        origin: where the tensors are from, for messages.

    Raises:
        CheckpointError: tensors are missing, extra or misshapen; every one is named.

    Source:
        Sun et al. 2024, arXiv 2406.06525, section 2.1.
    """

    def __init__(
        self, name: str, tensors: Mapping[str, Tensor], batch: int, device: str | torch.device, origin: str
    ):
        from transformers import JanusVQVAE, JanusVQVAEConfig  # takes seconds

        # Without the list of codes that the last training steps used.
        used = {key: value for key, value in tensors.items() if key != "quantize.codebook_used"}
        # Copies: what the reader gives may be views of the file.
        tensors = {key: value.to(torch.float32, copy=True).contiguous() for key, value in used.items()}
        sizes = _network_sizes(tensors, origin)
        with torch.device("meta"):
            model = JanusVQVAE(JanusVQVAEConfig(**sizes, double_latent=False))
        shapes = {rename(key, RENAMES): value.shape for key, value in model.state_dict().items()}
        check_shapes(shapes, tensors, origin)
        model.load_state_dict({key: tensors[rename(key, RENAMES)] for key in model.state_dict()}, assign=True)
        self.name = name
        self.codes = sizes["num_embeddings"]
        self.factor = 2 ** (len(sizes["channel_multiplier"]) - 1)
        self.hash = digest("llamagen", tensors)
        self._batch, self._device = batch, torch.device(device)
        self._model = model.to(self._device).eval()
        rows = self._model.quantize.embedding.weight.detach()
        self._codebook, self._centres = F.normalize(rows, dim=1), F.normalize(rows.double(), dim=1)

    def encode(self, images: UInt8[np.ndarray, "n S S 3"]) -> Int64[np.ndarray, "n T"]:
        """See `ImageTokenizer.encode`."""
        _check_side(images, self.factor)
        scaled = images.transpose(0, 3, 1, 2).astype(np.float32) / np.float32(127.5) - 1
        return self.quantise(self.latents(scaled))

    def decode(self, codes: Int[np.ndarray, "n T"]) -> UInt8[np.ndarray, "n S S 3"]:
        """See `ImageTokenizer.decode`."""
        pixels = (self.pixels(codes) + 1) * 127.5
        return pixels.round().clamp(0, 255).to(torch.uint8).permute(0, 2, 3, 1).contiguous().numpy()

    def latents(self, scaled: Float32[np.ndarray, "n 3 S S"]) -> Float32[Tensor, "n D grid grid"]:
        """Return the encoder's vectors for images whose values are in [-1, 1]."""
        return self._in_batches(scaled, lambda part: self._model.quant_conv(self._model.encoder(part)))

    def quantise(self, latents: Float32[Tensor, "n D grid grid"]) -> Int64[np.ndarray, "n T"]:
        """Return the codes whose vectors point most nearly in the directions of latent vectors."""
        vectors = latents.permute(0, 2, 3, 1).reshape(-1, latents.shape[1])
        unit = F.normalize(vectors.to(self._device).double(), dim=1)
        codes = nearest(unit, self._centres).cpu().numpy()
        return codes.reshape(len(latents), latents.shape[2] * latents.shape[3])

    def pixels(self, codes: Int[np.ndarray, "n T"]) -> Float32[Tensor, "n 3 S S"]:
        """Return the decoder's images, whose values are roughly in [-1, 1]."""
        grid = _check_codes(codes, self.codes)

        def run(batch: Tensor) -> Tensor:
            vectors = self._codebook[batch].view(len(batch), grid, grid, -1).permute(0, 3, 1, 2)
            return self._model.decoder(self._model.post_quant_conv(vectors.contiguous()))

        return self._in_batches(codes, run)

    def save(self, folder: Path) -> None:
        """See `ImageTokenizer.save`."""
        state = self._model.state_dict().items()
        _save(folder, "llamagen", self, {rename(key, RENAMES): value.cpu() for key, value in state})

    @torch.no_grad()
    def _in_batches(self, rows: np.ndarray, run: Callable[[Tensor], Tensor]) -> Tensor:
        """Call `run` on the rows in batches of one size, filled up with zeros; results are on the CPU."""
        results = []
        # TF32, which torch allows in convolutions, would change codes; so would an algorithm chosen by timing.
        with torch.backends.cudnn.flags(enabled=True, benchmark=False, deterministic=True, allow_tf32=False):
            for start in range(0, max(1, len(rows)), self._batch):  # no rows: one batch shows the shape
                part = rows[start : start + self._batch]
                filled = np.zeros((self._batch, *rows.shape[1:]), rows.dtype)
                filled[: len(part)] = part
                results.append(run(torch.from_numpy(filled).to(self._device))[: len(part)].cpu())
        return torch.cat(results)


def nearest(vectors: Float64[Tensor, "n D"], centres: Float64[Tensor, "C D"]) -> Int64[Tensor, "n"]:
    """Find the nearest centre of each vector.

    Args:
        vectors: points.
        centres: points of the same space.

    Returns:
        The index of the nearest centre, the lowest one of several.
    """
    norms = centres.square().sum(1)
    parts = vectors.split(max(1, MAX_DISTANCES // len(centres)))
    return torch.cat([(norms - 2 * part @ centres.T).argmin(1) for part in parts])


def fit_patches(images: UInt8[np.ndarray, "n S S 3"], codes: int, factor: int, seed: int) -> PatchVQ:
    """Fit a codebook to images by k-means.

    The result depends on which patches the images have and how often, not on the images' order.

    Args:
        images: the images to fit; a few thousand are enough.
        codes: C, the number of clusters.
        factor: side of a patch in pixels.
        seed: of the first centres, and of the choice of patches if there are more than `FIT_PATCHES`.

    Returns:
        The tokenizer with this codebook.

    Raises:
        ConfigError: there are fewer different patches than codes, or `factor` does not divide the images' side.
    """
    from sklearn.cluster import KMeans
    from threadpoolctl import threadpool_limits

    patches, counts = np.unique(_cut(images, factor), axis=0, return_counts=True)
    if len(patches) < codes:
        raise ConfigError(
            f"data.codes: {codes} codes, but the images have only {len(patches)} different patches of "
            f"{factor} x {factor} pixels; expected at most {len(patches)}"
        )
    if len(patches) > max(FIT_PATCHES, codes):
        kept = np.random.default_rng(seed).permutation(len(patches))[: max(FIT_PATCHES, codes)]
        patches, counts = patches[kept], counts[kept]
    means = KMeans(codes, n_init=1, max_iter=50, random_state=seed)
    with threadpool_limits(1):  # sums of several threads would depend on their number
        means.fit(patches.astype(np.float64), sample_weight=counts)
    centres = means.cluster_centers_.round().clip(0, 255).astype(np.uint8)
    return PatchVQ(centres.reshape(codes, factor, factor, 3))


def load_image_tokenizer(
    spec: str, factor: int | None, batch: int, device: str | torch.device
) -> ImageTokenizer:
    """Load an image tokenizer.

    Args:
        spec: path or URL of LlamaGen weights (`.pt` or `.safetensors`), or of a folder that `save` wrote.
        factor: expected side of a token in pixels; None accepts any.
        batch: number of images that go through a network at a time.
        device: where a network runs.

    Returns:
        The tokenizer.

    Raises:
        ConfigError: there is no such tokenizer, or its factor is another one.
        CheckpointError: the file is damaged, or not a tokenizer.
    """
    if not storage.exists(spec):
        folder, _, name = spec.rstrip("/").rpartition("/")
        near = did_you_mean(name, storage.listing(folder or "."))
        raise ConfigError(f"data.tokenizer: {spec!r} does not exist{near}")
    path = storage.fetch(spec)
    if path.is_dir():
        tokenizer = _load_folder(path, batch, device)
    elif path.suffix in SUFFIXES:
        tokenizer = LlamaGen(path.stem, read(path).tensors, batch, device, origin=spec)
    else:
        raise ConfigError(
            f"data.tokenizer: {spec!r} is neither a file of LlamaGen weights ({', '.join(SUFFIXES)}) nor a "
            f"folder with {INFO_FILE}{did_you_mean(path.suffix, SUFFIXES)}"
        )
    if factor is not None and factor != tokenizer.factor:
        raise ConfigError(
            f"data.factor: {factor}, but a token of {spec!r} is {tokenizer.factor} pixels wide; "
            f"expected data.factor={tokenizer.factor}"
        )
    return tokenizer


def _load_folder(path: Path, batch: int, device: str | torch.device) -> ImageTokenizer:
    """Load what `ImageTokenizer.save` wrote."""
    if not (path / INFO_FILE).is_file():
        raise ConfigError(
            f"data.tokenizer: folder {str(path)!r} has no {INFO_FILE}; expected one that a run or "
            "the preparation of data wrote, or a file of LlamaGen weights"
        )
    tokenizer: ImageTokenizer
    try:
        info = json.loads((path / INFO_FILE).read_text(encoding="utf-8"))
        tensors = load_file(path / WEIGHTS_FILE)
        if info["kind"] == "patches":
            tokenizer = PatchVQ(tensors["patches"].numpy())
        elif info["kind"] == "llamagen":
            tokenizer = LlamaGen(info["name"], tensors, batch, device, origin=str(path / WEIGHTS_FILE))
        else:
            raise CheckpointError(
                f"{path / INFO_FILE}: kind {info['kind']!r}; expected 'patches' or 'llamagen'"
            )
        if tokenizer.hash != info["hash"]:
            raise CheckpointError(f"{path}: {WEIGHTS_FILE} is not the one that {INFO_FILE} was written for")
        return tokenizer
    except CheckpointError:
        raise
    except Exception as error:  # JSON, safetensors and shapes fail each in its own way
        raise CheckpointError(f"{path}: damaged image tokenizer: {type(error).__name__}: {error}") from None


def _save(folder: Path, kind: str, tokenizer: ImageTokenizer, tensors: dict[str, Tensor]) -> None:
    """Write tensors, and a description that names their hash."""
    folder.mkdir(parents=True, exist_ok=True)
    save_file(tensors, folder / WEIGHTS_FILE)
    storage.follow_umask(folder / WEIGHTS_FILE)
    info = {"kind": kind, "name": tokenizer.name, "codes": tokenizer.codes, "factor": tokenizer.factor}
    text = json.dumps(info | {"hash": tokenizer.hash}, indent=2) + "\n"
    (folder / INFO_FILE).write_text(text, encoding="utf-8")


def digest(kind: str, tensors: Mapping[str, Tensor]) -> str:
    """Return the SHA-256 of a kind, and of the names, shapes and values of tensors.

    Args:
        kind: what the tensors are; tensors of different kinds have different digests.
        tensors: tensors on the CPU, in any order.
    """
    sha = hashlib.sha256(kind.encode())
    for name, value in sorted(tensors.items()):
        sha.update(f"\n{name} {value.dtype} {list(value.shape)}\n".encode())
        sha.update(value.contiguous().view(-1).view(torch.uint8).numpy().data)  # bf16 too
    return sha.hexdigest()


def _check_side(images: UInt8[np.ndarray, "n S S 3"], factor: int) -> None:
    """Refuse images whose side is not a multiple of the factor."""
    side = images.shape[1]
    if side % factor:
        divisors = [divisor for divisor in range(1, side + 1) if side % divisor == 0]
        raise ConfigError(
            f"data.factor: {factor} does not divide the images' side, {side} pixels; "
            f"nearest: {min(divisors, key=lambda divisor: abs(divisor - factor))}"
        )


def _cut(images: UInt8[np.ndarray, "n S S 3"], factor: int) -> UInt8[np.ndarray, "N D"]:
    """Cut images into patches, row by row and flattened, D = 3 factor^2."""
    _check_side(images, factor)
    grid = images.shape[1] // factor
    tiles = images.reshape(-1, grid, factor, grid, factor, 3).transpose(0, 1, 3, 2, 4, 5)
    return tiles.reshape(-1, 3 * factor * factor)


def _check_codes(codes: Int[np.ndarray, "n T"], size: int) -> int:
    """Return the grid's side; refuse what no encoder yields, such as a BOS or a mask that was left in."""
    grid = math.isqrt(codes.shape[1])
    if grid * grid != codes.shape[1]:
        raise DataError(f"{codes.shape[1]} codes an image are no square grid; was BOS left in?")
    if codes.size and not 0 <= codes.min() <= codes.max() < size:
        raise DataError(f"image codes from {codes.min()} to {codes.max()}; expected 0 to {size - 1}")
    return grid


def _network_sizes(tensors: Mapping[str, Tensor], origin: str) -> dict[str, Any]:
    """Return the sizes of LlamaGen's network, as `JanusVQVAEConfig` calls them."""

    def shape(name: str, dimensions: int = 4) -> tuple[int, ...]:
        return tensor_shape(tensors, name, dimensions, f"{origin}: not a LlamaGen tokenizer")

    base = shape("encoder.conv_in.weight")[0]
    num_levels = count_blocks(tensors, r"encoder\.conv_blocks\.(\d+)\.")
    channels = [shape(f"encoder.conv_blocks.{i}.res.0.conv1.weight")[0] for i in range(num_levels)]
    if any(count % base or count % GROUPS for count in (base, *channels)):
        raise CheckpointError(
            f"{origin}: the encoder has {base} channels, then {channels}; expected multiples of {GROUPS} and of "
            "the first number"
        )
    num_codes, embed_dim = shape("quantize.embedding.weight", dimensions=2)
    return {
        "base_channels": base,
        "channel_multiplier": [count // base for count in channels],
        "num_res_blocks": count_blocks(tensors, r"encoder\.conv_blocks\.0\.res\.(\d+)\."),
        "latent_channels": shape("encoder.conv_out.weight")[0],
        "num_embeddings": num_codes,
        "embed_dim": embed_dim,
    }
