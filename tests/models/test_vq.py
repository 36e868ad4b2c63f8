"""Image tokenizers: the golden numerics of LlamaGen's, patches by k-means, and what users get wrong."""

import json
import os
import shutil
from pathlib import Path

import numpy as np
import pytest
import torch
from safetensors.torch import load_file, save_file
from sklearn.datasets import load_digits
from torch import Tensor

from pipeline.errors import CheckpointError, ConfigError, DataError
from pipeline.models.vq import LlamaGen, PatchVQ, fit_patches, load_image_tokenizer, nearest

GOLDEN = Path(__file__).parents[1] / "data" / "llamagen_vq.safetensors"


@pytest.fixture(scope="module")
def recorded() -> dict[str, Tensor]:
    return load_file(GOLDEN)


@pytest.fixture(scope="module")
def weights(recorded: dict[str, Tensor]) -> dict[str, Tensor]:
    return {k.removeprefix("weights."): v for k, v in recorded.items() if k.startswith("weights.")}


def llamagen(path: Path | str, batch: int = 2) -> LlamaGen:
    tokenizer = load_image_tokenizer(str(path), None, batch, "cpu")
    assert isinstance(tokenizer, LlamaGen)
    return tokenizer


def pictures(count: int, side: int, seed: int = 0) -> np.ndarray:
    """Smooth colours with a little noise."""
    rng = np.random.default_rng(seed)
    coarse = rng.integers(0, 256, (count, 4, 4, 3))
    fine = coarse.repeat(side // 4, 1).repeat(side // 4, 2) + rng.integers(-20, 21, (count, side, side, 3))
    return fine.clip(0, 255).astype(np.uint8)


def digits() -> np.ndarray:
    grey = (load_digits().images * 255 / 16).round().astype(np.uint8)
    return np.repeat(grey[..., None], 3, axis=3)


def written(folder: Path, tensors: dict[str, Tensor]) -> Path:
    """A file of LlamaGen weights."""
    folder.mkdir(exist_ok=True)
    save_file(tensors, folder / "vq.safetensors")
    return folder / "vq.safetensors"


def test_golden_codes_and_pixels(recorded: dict[str, Tensor]) -> None:
    tokenizer = llamagen(GOLDEN)
    codes = tokenizer.quantise(tokenizer.latents(recorded["images"].numpy()))
    assert codes.dtype == np.int64
    assert np.array_equal(codes, recorded["codes"].numpy())
    assert torch.allclose(tokenizer.pixels(codes), recorded["decoded"], atol=1e-4, rtol=0)
    assert (tokenizer.codes, tokenizer.factor) == (64, 4)
    # uint8 pictures are those numbers, rounded.
    expected = ((recorded["decoded"].permute(0, 2, 3, 1) + 1) * 127.5).clamp(0, 255).numpy()
    assert np.abs(tokenizer.decode(codes) - expected).max() <= 0.5 + 0.0128


def test_pixels_enter_as_minus_one_to_one() -> None:
    images = pictures(2, 16)
    tokenizer = llamagen(GOLDEN)
    scaled = images.transpose(0, 3, 1, 2) / 127.5 - 1
    assert np.array_equal(
        tokenizer.encode(images), tokenizer.quantise(tokenizer.latents(scaled.astype(np.float32)))
    )


def test_published_pickle_is_the_same_tokenizer(tmp_path: Path, weights: dict[str, Tensor]) -> None:
    torch.save({"model": weights}, tmp_path / "vq_ds4.pt")
    torch.save({"model": weights}, tmp_path / "old.pt", _use_new_zipfile_serialization=False)
    published, images = llamagen(tmp_path / "vq_ds4.pt"), pictures(2, 16)
    assert published.name == "vq_ds4"
    assert published.hash == llamagen(tmp_path / "old.pt").hash == llamagen(GOLDEN).hash
    assert np.array_equal(published.encode(images), llamagen(GOLDEN).encode(images))


def test_hash_follows_every_tensor(tmp_path: Path, weights: dict[str, Tensor]) -> None:
    bias = weights["post_quant_conv.bias"].clone()
    bias[3] += 1e-6
    other = llamagen(written(tmp_path, weights | {"post_quant_conv.bias": bias}))
    assert other.hash != llamagen(GOLDEN).hash


def test_codes_do_not_depend_on_how_many_images_a_call_gets() -> None:
    images, tokenizer = pictures(5, 16), llamagen(GOLDEN, batch=3)
    together = tokenizer.encode(images)
    alone = np.concatenate([tokenizer.encode(images[i : i + 1]) for i in range(5)])
    assert np.array_equal(together, alone)
    assert np.array_equal(tokenizer.encode(images[::-1]), together[::-1])
    assert np.array_equal(tokenizer.decode(together)[3:4], tokenizer.decode(together[3:4]))
    empty = tokenizer.encode(images[:0])
    assert empty.shape == (0, 16)
    assert tokenizer.decode(empty).shape == (0, 16, 16, 3)


def test_other_batch_shapes_differ_only_at_ties() -> None:
    images = pictures(96, 16, seed=3)
    reference = llamagen(GOLDEN, batch=1)
    scaled = images.transpose(0, 3, 1, 2).astype(np.float32) / np.float32(127.5) - 1
    vectors = reference.latents(scaled).permute(0, 2, 3, 1).flatten(1, 2).double()
    vectors = torch.nn.functional.normalize(vectors, dim=-1)
    rows = load_file(GOLDEN)["weights.quantize.embedding.weight"].double()
    distances = torch.cdist(vectors, torch.nn.functional.normalize(rows, dim=-1)).square()  # [n, T, C]
    codes = reference.encode(images)
    assert len(np.unique(codes)) > 20  # the codebook is in use
    for batch in (3, 8):
        others = llamagen(GOLDEN, batch=batch).encode(images)
        assert (others == codes).mean() >= 0.999
        taken = distances.gather(2, torch.from_numpy(others)[..., None])[..., 0]
        assert torch.all(taken - distances.min(2).values < 1e-5)


def test_nearest_takes_the_lowest_of_equals_in_any_portion() -> None:
    centres = torch.tensor([[5.0, 5.0], [1.0, 0.0], [0.0, 1.0], [1.0, 0.0]], dtype=torch.float64)
    vectors = torch.tensor([[1.0, 0.0], [1.0, 1.0], [0.0, 2.0], [4.0, 4.0]], dtype=torch.float64)
    assert nearest(vectors, centres).tolist() == [1, 1, 2, 0]
    assert torch.equal(nearest(vectors.repeat(3, 1), centres), nearest(vectors, centres).repeat(3))


def test_llamagen_folder_is_bit_equal(tmp_path: Path) -> None:
    first, images = llamagen(GOLDEN), pictures(3, 16)
    first.save(tmp_path / "kept")
    again = llamagen(tmp_path / "kept")
    assert (again.hash, again.name, again.codes, again.factor) == (first.hash, "llamagen_vq", 64, 4)
    codes = first.encode(images)
    assert np.array_equal(again.encode(images), codes)
    assert torch.equal(again.pixels(codes), first.pixels(codes))
    assert load_image_tokenizer((tmp_path / "kept").as_uri(), 4, 2, "cpu").hash == first.hash


@pytest.mark.parametrize(
    ("change", "says"),
    [
        ({"decoder.mid.1.q.weight": None}, "missing decoder.mid.1.q.weight [64, 64, 1, 1]"),
        ({"encoder.conv_blocks.2.res.0.nin_shortcut.bias": None}, "missing encoder.conv_blocks.2.res.0.nin_sh"),
        ({"encoder.conv_blocks.1.attn.0.q.bias": (32,)}, "extra encoder.conv_blocks.1.attn.0.q.bias"),
        ({"quant_conv.weight": (9, 32, 1, 1)}, "quant_conv.weight is [9, 32, 1, 1], expected [8, 32, 1, 1]"),
        ({"quantize.embedding.weight": None}, "not a LlamaGen tokenizer: missing quantize.embedding.weight"),
        ({"quantize.embedding.weight": (64,)}, "quantize.embedding.weight is [64], expected 2 dimensions"),
        ({"encoder.conv_in.weight": (48, 3, 3, 3)}, "multiples of 32"),
    ],
)  # fmt: skip
def test_tensors_that_do_not_fit_are_named(
    tmp_path: Path, weights: dict[str, Tensor], change: dict[str, tuple[int, ...] | None], says: str
) -> None:
    ((name, shape),) = change.items()
    tensors = {key: value for key, value in weights.items() if key != name}
    path = written(tmp_path, tensors | ({} if shape is None else {name: torch.zeros(shape)}))
    with pytest.raises(CheckpointError) as caught:
        llamagen(path)
    assert says in str(caught.value)
    assert str(path) in str(caught.value)


def test_malicious_pickle_is_refused(tmp_path: Path, weights: dict[str, Tensor]) -> None:
    class Attack:
        def __reduce__(self) -> tuple[object, tuple[str]]:
            return os.mkdir, (str(tmp_path / "made"),)

    torch.save({"model": {**weights, "quant_conv.bias": Attack()}}, tmp_path / "vq.pt")
    with pytest.raises(CheckpointError, match="mkdir"):
        llamagen(tmp_path / "vq.pt")
    assert not (tmp_path / "made").exists()


def test_another_factor_than_expected() -> None:
    assert load_image_tokenizer(str(GOLDEN), 4, 1, "cpu").factor == 4
    with pytest.raises(ConfigError, match=r"data.factor: 8, but .* 4 pixels wide; expected data.factor=4"):
        load_image_tokenizer(str(GOLDEN), 8, 1, "cpu")


def test_unknown_tokenizers(tmp_path: Path) -> None:
    shutil.copy(GOLDEN, tmp_path / "vq_ds8.safetensors")
    (tmp_path / "vq_ds8.ptt").write_bytes(b"x")
    for spec, says in [
        ("vq_ds8.safetensor", "did you mean 'vq_ds8.safetensors'"),
        ("vq_ds8.ptt", "did you mean '.pt'"),
        (".", "no image_tokenizer.json"),
    ]:
        with pytest.raises(ConfigError, match=r"data\.tokenizer") as caught:
            load_image_tokenizer(f"{tmp_path}/{spec}", None, 1, "cpu")
        assert says in str(caught.value)


def test_patches_of_digits_are_found_again(tmp_path: Path) -> None:
    images = digits()
    tokenizer = fit_patches(images[:1500], codes=64, factor=2, seed=0)
    codes = tokenizer.encode(images)
    assert codes.shape == (1797, 16)
    assert codes.dtype == np.int64
    assert set(np.unique(codes)) <= set(range(64))
    pictures_again = tokenizer.decode(codes)
    assert np.array_equal(tokenizer.encode(pictures_again), codes)
    # Images that were not fitted on come back better than from their mean brightness, by far.
    error = (pictures_again[1500:].astype(float) - images[1500:]) ** 2
    assert error.mean() < 0.05 * images[1500:].astype(float).var()
    # Each code is the nearest patch, by brute force.
    book = tokenizer.decode(np.arange(64)[:, None]).reshape(64, -1).astype(int)
    patch = images[1600, 4:6, 2:4].reshape(-1).astype(int)
    assert codes[1600, 2 * 4 + 1] == ((book - patch) ** 2).sum(1).argmin()

    tokenizer.save(tmp_path)
    again = load_image_tokenizer(str(tmp_path), 2, 1, "cpu")
    assert isinstance(again, PatchVQ)
    assert (again.hash, again.codes, again.factor, again.name) == (tokenizer.hash, 64, 2, "patches")
    assert np.array_equal(again.encode(images), codes)


def test_fit_depends_on_seed_and_images_alone() -> None:
    images = digits()[:600]
    first = fit_patches(images, codes=32, factor=4, seed=1)
    assert fit_patches(images[::-1].copy(), codes=32, factor=4, seed=1).hash == first.hash
    assert fit_patches(images, codes=32, factor=4, seed=2).hash != first.hash


def test_more_patches_than_a_fit_takes(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("pipeline.models.vq.FIT_PATCHES", 200)
    images = pictures(40, 16)
    first = fit_patches(images, codes=16, factor=4, seed=1)
    assert fit_patches(images, codes=16, factor=4, seed=1).hash == first.hash
    monkeypatch.setattr("pipeline.models.vq.FIT_PATCHES", 640)
    assert fit_patches(images, codes=16, factor=4, seed=1).hash != first.hash


def test_too_few_patches_and_wrong_sides() -> None:
    flat = np.zeros((4, 8, 8, 3), np.uint8)
    flat[2, :4, :4] = 200
    assert fit_patches(flat, codes=2, factor=4, seed=0).codes == 2
    with pytest.raises(ConfigError, match=r"data.codes: 3 codes, .* only 2 different patches"):
        fit_patches(flat, codes=3, factor=4, seed=0)
    with pytest.raises(ConfigError, match=r"data.factor: 3 does not divide .* 8 pixels; nearest: 2"):
        fit_patches(flat, codes=2, factor=3, seed=0)
    with pytest.raises(ConfigError, match=r"data.factor: 4 does not divide .* 6 pixels; nearest: 3"):
        llamagen(GOLDEN).encode(np.zeros((1, 6, 6, 3), np.uint8))


def test_codes_that_no_encoder_yields() -> None:
    patches = PatchVQ(np.arange(24, dtype=np.uint8).reshape(2, 2, 2, 3))
    with pytest.raises(DataError, match="5 codes an image are no square grid; was BOS left in"):
        patches.decode(np.zeros((1, 5), np.int64))
    for tokenizer, most in ((patches, 1), (llamagen(GOLDEN), 63)):
        for wrong in (-1, most + 1):
            with pytest.raises(DataError, match=f"expected 0 to {most}"):
                tokenizer.decode(np.array([[0, 0, wrong, 0]]))


def test_damaged_folders(tmp_path: Path) -> None:
    PatchVQ(np.arange(24, dtype=np.uint8).reshape(2, 2, 2, 3)).save(tmp_path)
    info = json.loads((tmp_path / "image_tokenizer.json").read_text())
    damages = {
        "{": "damaged image tokenizer",
        json.dumps(info | {"hash": "0" * 64}): "is not the one that image_tokenizer.json was written for",
        json.dumps(info | {"kind": "vqgan"}): "kind 'vqgan'; expected",
        json.dumps({"kind": "patches"}): "damaged image tokenizer: KeyError",
    }
    for text, says in damages.items():
        (tmp_path / "image_tokenizer.json").write_text(text)
        with pytest.raises(CheckpointError, match=says):
            load_image_tokenizer(str(tmp_path), None, 1, "cpu")
    (tmp_path / "image_tokenizer.json").write_text(json.dumps(info))
    (tmp_path / "image_tokenizer.safetensors").write_bytes(b"\x10\x00")
    with pytest.raises(CheckpointError, match="damaged image tokenizer: SafetensorError"):
        load_image_tokenizer(str(tmp_path), None, 1, "cpu")
