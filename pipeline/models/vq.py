"""Images to codes and back: patches by k-means, or the published LlamaGen VQ tokenizers."""

import hashlib
import json
import math
import re
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
from pipeline.models.released.layouts import PICKLES, SAFETENSORS, read

INFO_FILE, WEIGHTS_FILE = "image_tokenizer.json", "image_tokenizer.safetensors"
FIT_PATCHES = 50_000  # distinct patches that a codebook is fitted on; more of them cost time, and help little
_CELLS = 1 << 23  # distances held at a time

# Janus's name -> LlamaGen's.
RENAMES = (
    (r"^encoder\.down\.", "encoder.conv_blocks."),
    (r"^decoder\.up\.", "decoder.conv_blocks."),
    (r"^(..coder\.conv_blocks\.\d+)\.block\.", r"\1.res."),
    (r"^(..coder\.mid)\.block_1\.", r"\1.0."),
    (r"^(..coder\.mid)\.attn_1\.", r"\1.1."),
    (r"^(..coder\.mid)\.block_2\.", r"\1.2."),
)
UNUSED = ("quantize.codebook_used",)  # which codes the last training steps used
CODEBOOK = "quantize.embedding.weight"
GROUPS = 32  # of every group norm in it


@runtime_checkable
class ImageTokenizer(Protocol):
    """What the pipeline asks of an image tokenizer.

    Attributes:
        name: for people; what determines codes and pixels is `hash`.
        codes: C, the size of the codebook; codes are 0..C-1.
        factor: pixels of a token's side, so that the grid's side is the image's / factor.
        hash: SHA-256 over everything that determines codes and pixels.
    """

    name: str
    codes: int
    factor: int
    hash: str

    def encode(self, images: UInt8[np.ndarray, "n S S 3"]) -> Int64[np.ndarray, "n T"]:
        """Codes of the grid, row by row, T = (S / factor)^2."""

    def decode(self, codes: Int[np.ndarray, "n T"]) -> UInt8[np.ndarray, "n S S 3"]:
        """The pictures of codes."""

    def save(self, folder: Path) -> None:
        """Write what `load_image_tokenizer(folder)` needs, offline and on another machine."""


class PatchVQ:
    """Every patch of factor x factor pixels is replaced by the nearest one of a codebook.

    Patches and codebook are whole numbers, so distances are exact: codes depend on neither batch nor machine.

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
        grid = _grid_side(images.shape[1], self.factor)
        vectors = torch.from_numpy(_cut(images, self.factor).astype(np.float64))
        return nearest(vectors, self._centres).numpy().reshape(len(images), grid * grid)

    def decode(self, codes: Int[np.ndarray, "n T"]) -> UInt8[np.ndarray, "n S S 3"]:
        grid = _check_codes(codes, self.codes)
        rows = self._patches[codes].reshape(-1, grid, grid, self.factor, self.factor, 3)
        side = grid * self.factor
        return rows.transpose(0, 1, 3, 2, 4, 5).reshape(-1, side, side, 3)

    def save(self, folder: Path) -> None:
        _save(folder, "patches", self, {"patches": torch.from_numpy(self._patches)})


class LlamaGen:
    """The VQ tokenizer of LlamaGen, whose size is read from its tensors.

    Encoding and decoding run at one batch shape, the last batch padded, so that an image's codes do not depend
    on how many others a call gets. Other batch shapes differ only where two codes are equally near, up to
    rounding; `hash` leaves batch and device out.

    Args:
        name: for people.
        tensors: weights by LlamaGen's names.
        batch: images that go through the network at a time.
        origin: where the tensors are from, for messages.

    Raises:
        CheckpointError: names every missing, extra and misshapen tensor.

    Source: Sun et al. 2024, arXiv 2406.06525, section 2.1.
    """

    def __init__(
        self, name: str, tensors: Mapping[str, Tensor], batch: int, device: str | torch.device, origin: str
    ):
        from transformers import JanusVQVAE, JanusVQVAEConfig  # takes seconds

        # Copies: what the reader gives may be views of the file.
        tensors = {
            key: value.to(torch.float32, copy=True).contiguous()
            for key, value in tensors.items()
            if key not in UNUSED
        }
        sizes = _infer(tensors, origin)
        with torch.device("meta"):
            model = JanusVQVAE(JanusVQVAEConfig(**sizes, double_latent=False))
        names = {key: _llamagen_name(key) for key in model.state_dict()}
        check_shapes({names[key]: value.shape for key, value in model.state_dict().items()}, tensors, origin)
        model.load_state_dict({key: tensors[theirs] for key, theirs in names.items()}, assign=True)
        self.name = name
        self.codes = sizes["num_embeddings"]
        self.factor = 2 ** (len(sizes["channel_multiplier"]) - 1)
        self.hash = digest("llamagen", tensors)
        self._batch, self._device = batch, torch.device(device)
        self._model = model.to(self._device).eval()
        rows = self._model.quantize.embedding.weight.detach()
        self._codebook, self._centres = F.normalize(rows, dim=1), F.normalize(rows.double(), dim=1)

    def encode(self, images: UInt8[np.ndarray, "n S S 3"]) -> Int64[np.ndarray, "n T"]:
        _grid_side(images.shape[1], self.factor)
        scaled = images.transpose(0, 3, 1, 2).astype(np.float32) / np.float32(127.5) - 1
        return self.quantise(self.latents(scaled))

    def decode(self, codes: Int[np.ndarray, "n T"]) -> UInt8[np.ndarray, "n S S 3"]:
        pixels = (self.pixels(codes) + 1) * 127.5
        return pixels.round().clamp(0, 255).to(torch.uint8).permute(0, 2, 3, 1).contiguous().numpy()

    def latents(self, scaled: Float32[np.ndarray, "n 3 S S"]) -> Float32[Tensor, "n D grid grid"]:
        """The encoder's vectors for images in [-1, 1]."""
        return self._in_batches(scaled, lambda part: self._model.quant_conv(self._model.encoder(part)))

    def quantise(self, latents: Float32[Tensor, "n D grid grid"]) -> Int64[np.ndarray, "n T"]:
        """Codes whose vectors point most nearly in the same direction."""
        vectors = latents.permute(0, 2, 3, 1).reshape(-1, latents.shape[1])
        unit = F.normalize(vectors.to(self._device).double(), dim=1)
        codes = nearest(unit, self._centres).cpu().numpy()
        return codes.reshape(len(latents), latents.shape[2] * latents.shape[3])

    def pixels(self, codes: Int[np.ndarray, "n T"]) -> Float32[Tensor, "n 3 S S"]:
        """What the decoder draws, about in [-1, 1]."""
        grid = _check_codes(codes, self.codes)

        def run(batch: Tensor) -> Tensor:
            vectors = self._codebook[batch].view(len(batch), grid, grid, -1).permute(0, 3, 1, 2)
            return self._model.decoder(self._model.post_quant_conv(vectors.contiguous()))

        return self._in_batches(codes, run)

    def save(self, folder: Path) -> None:
        state = self._model.state_dict()
        _save(folder, "llamagen", self, {_llamagen_name(key): value.cpu() for key, value in state.items()})

    @torch.no_grad()
    def _in_batches(self, rows: np.ndarray, run: Callable[[Tensor], Tensor]) -> Tensor:
        """`run` over the rows in batches of one size, filled up with zeros; results on the CPU."""
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
    """Index of the nearest centre of each vector, the lowest one of several."""
    norms = centres.square().sum(1)
    rows = max(1, _CELLS // len(centres))
    found = [(norms - 2 * part @ centres.T).argmin(1) for part in vectors.split(rows)]
    return torch.cat(found)


def fit_patches(images: UInt8[np.ndarray, "n S S 3"], codes: int, factor: int, seed: int) -> PatchVQ:
    """A codebook by k-means, for the images at hand.

    The result depends on which patches the images have and how often, not on the images' order.

    Args:
        images: what to fit on; a few thousand do.
        codes: C, the number of clusters.
        factor: pixels of a patch's side.
        seed: of the first centres, and of the choice of patches where there are more than `FIT_PATCHES`.

    Raises:
        ConfigError: fewer different patches than codes, or a factor that does not divide the images' side.
    """
    from sklearn.cluster import KMeans
    from threadpoolctl import threadpool_limits

    _grid_side(images.shape[1], factor)
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
    """Read an image tokenizer.

    Args:
        spec: path or URL of LlamaGen weights (`.pt` or `.safetensors`), or of a folder that `save` wrote.
        factor: pixels of a token's side that are expected; None takes what the file has.
        batch: images that go through a network at a time.
        device: where a network runs.

    Raises:
        ConfigError: no such tokenizer, or one of another factor.
        CheckpointError: the file is damaged, or is no tokenizer.
    """
    if not storage.exists(spec):
        folder, _, name = spec.rstrip("/").rpartition("/")
        near = did_you_mean(name, storage.listing(folder or "."))
        raise ConfigError(f"data.tokenizer: {spec!r} does not exist{near}")
    path = storage.fetch(spec)
    tokenizer: ImageTokenizer
    if path.is_dir():
        tokenizer = _load_folder(path, batch, device)
    elif path.suffix in (*PICKLES, SAFETENSORS):
        tokenizer = LlamaGen(path.stem, read(path).tensors, batch, device, origin=spec)
    else:
        known = (*PICKLES, SAFETENSORS)
        raise ConfigError(
            f"data.tokenizer: {spec!r} is neither a file of LlamaGen weights ({', '.join(known)}) nor a folder "
            f"with {INFO_FILE}{did_you_mean(path.suffix, known)}"
        )
    if factor is not None and factor != tokenizer.factor:
        raise ConfigError(
            f"data.factor: {factor}, but a token of {spec!r} is {tokenizer.factor} pixels wide; "
            f"expected data.factor={tokenizer.factor}"
        )
    return tokenizer


def _load_folder(path: Path, batch: int, device: str | torch.device) -> ImageTokenizer:
    if not (path / INFO_FILE).is_file():
        raise ConfigError(
            f"data.tokenizer: folder {str(path)!r} has no {INFO_FILE}; expected one that a run or "
            "the preparation of data wrote, or a file of LlamaGen weights"
        )
    tokenizer: ImageTokenizer
    try:
        info = json.loads((path / INFO_FILE).read_text(encoding="utf-8"))
        kind, name, expected = info["kind"], str(info["name"]), info["hash"]
        tensors = load_file(path / WEIGHTS_FILE)
        if kind == "patches":
            tokenizer = PatchVQ(tensors["patches"].numpy())
        elif kind == "llamagen":
            tokenizer = LlamaGen(name, tensors, batch, device, origin=str(path / WEIGHTS_FILE))
        else:
            raise CheckpointError(f"{path / INFO_FILE}: kind {kind!r}; expected 'patches' or 'llamagen'")
    except CheckpointError:
        raise
    except Exception as error:  # JSON, safetensors and shapes fail each in its own way
        raise CheckpointError(f"{path}: damaged image tokenizer: {type(error).__name__}: {error}") from None
    if tokenizer.hash != expected:
        raise CheckpointError(f"{path}: {WEIGHTS_FILE} is not the one that {INFO_FILE} was written for")
    return tokenizer


def _save(folder: Path, kind: str, tokenizer: ImageTokenizer, tensors: dict[str, Tensor]) -> None:
    folder.mkdir(parents=True, exist_ok=True)
    save_file(tensors, folder / WEIGHTS_FILE)
    info = {"kind": kind, "name": tokenizer.name, "codes": tokenizer.codes, "factor": tokenizer.factor}
    text = json.dumps(info | {"hash": tokenizer.hash}, indent=2) + "\n"
    (folder / INFO_FILE).write_text(text, encoding="utf-8")


def digest(kind: str, tensors: Mapping[str, Tensor]) -> str:
    """SHA-256 of a kind, and of the names, shapes and values of tensors on the CPU."""
    sha = hashlib.sha256(kind.encode())
    for name, value in sorted(tensors.items()):
        sha.update(f"\n{name} {value.dtype} {list(value.shape)}\n".encode())
        sha.update(value.contiguous().view(-1).view(torch.uint8).numpy().data)  # bf16 too
    return sha.hexdigest()


def _grid_side(side: int, factor: int) -> int:
    if side % factor:
        fits = [f for f in range(1, side + 1) if side % f == 0]
        near = min(fits, key=lambda f: abs(f - factor))
        raise ConfigError(
            f"data.factor: {factor} does not divide the images' side, {side} pixels; nearest: {near}"
        )
    return side // factor


def _cut(images: UInt8[np.ndarray, "n S S 3"], factor: int) -> UInt8[np.ndarray, "N D"]:
    """Patches row by row, flattened, D = 3 factor^2."""
    grid = images.shape[1] // factor
    tiles = images.reshape(-1, grid, factor, grid, factor, 3).transpose(0, 1, 3, 2, 4, 5)
    return tiles.reshape(-1, 3 * factor * factor)


def _check_codes(codes: Int[np.ndarray, "n T"], most: int) -> int:
    """The grid's side; refuses what no encoder yields, such as a BOS or a mask that was left in."""
    grid = math.isqrt(codes.shape[1])
    if grid * grid != codes.shape[1]:
        raise DataError(f"{codes.shape[1]} codes an image are no square grid; was BOS left in?")
    if codes.size and not 0 <= codes.min() <= codes.max() < most:
        raise DataError(f"image codes from {codes.min()} to {codes.max()}; expected 0 to {most - 1}")
    return grid


def _llamagen_name(name: str) -> str:
    for pattern, target in RENAMES:
        name = re.sub(pattern, target, name)
    return name


def _infer(tensors: Mapping[str, Tensor], origin: str) -> dict[str, Any]:
    """The sizes of the network, as `JanusVQVAEConfig` calls them.

    Raises:
        CheckpointError: a tensor that says one of them is missing or misshapen.
    """

    def size(name: str, ranks: int, dimension: int = 0) -> int:
        if name not in tensors:
            raise CheckpointError(
                f"{origin}: no LlamaGen tokenizer: it has no {name}{did_you_mean(name, tensors)}"
            )
        if tensors[name].ndim != ranks:
            raise CheckpointError(
                f"{origin}: {name} is {list(tensors[name].shape)}, expected {ranks} dimensions"
            )
        return tensors[name].shape[dimension]

    def count(pattern: str) -> int:
        return len({match[1] for name in tensors if (match := re.match(pattern, name))})

    base = size("encoder.conv_in.weight", 4)
    levels = count(r"encoder\.conv_blocks\.(\d+)\.")
    channels = [size(f"encoder.conv_blocks.{i}.res.0.conv1.weight", 4) for i in range(levels)]
    if not channels or any(c == 0 or c % base or c % GROUPS for c in (base, *channels)):
        raise CheckpointError(
            f"{origin}: encoder levels of {channels} channels behind {base}; expected at least one, all of them "
            f"multiples of {GROUPS} and of the first"
        )
    return {
        "base_channels": base,
        "channel_multiplier": [c // base for c in channels],
        "num_res_blocks": count(r"encoder\.conv_blocks\.0\.res\.(\d+)\."),
        "latent_channels": size("encoder.conv_out.weight", 4),
        "num_embeddings": size(CODEBOOK, 2),
        "embed_dim": size(CODEBOOK, 2, 1),
    }
