"""The Python interface: `load_model`, and the model object with its logits, predictions and samples."""

from collections.abc import Sequence
from pathlib import Path

import torch

from pipeline import arguments, tracking, trained
from pipeline.api.model import Model
from pipeline.api.tokens import TokenModel
from pipeline.config.evaluation import Precision
from pipeline.config.schema import RunConfig
from pipeline.models.denoiser import DTYPES
from pipeline.sampling.row_ends import RowEnds

__all__ = ["Model", "TokenModel", "load_model"]


def load_model(
    path: str | Path,
    device: torch.device | str = "cpu",
    overrides: Sequence[str] = (),
    precision: Precision = "fp32",
) -> Model:
    """Load a model or adapter folder, a file of released weights, a registered model, or one of the Hugging Face hub.

    `hf:OWNER/NAME/PATH` and `hf:OWNER/NAME@REVISION/PATH` are a file or folder of a repository, which is downloaded
    into the cache of huggingface_hub; without PATH the repository is the folder. Registered models
    (`models:/NAME@ALIAS`, `models:/NAME/VERSION`) are looked up in MLFLOW_TRACKING_URI, else in the tracking store of
    runs with default settings. Files (.ckpt, .pth, .pt, .bin, .safetensors) are those of the authors' repositories;
    their averaged (EMA) weights are used, and no code in them is run.

    Args:
        path: path or name of the model.
        device: where the model computes.
        overrides: for files, `key=value` settings that replace what the file implies: model.*, length, bos, eot,
            tokenizer; for adapter folders, base=MODEL where the adapted model has another name now.
        precision: of weights and blocks; fast attention on GPUs requires "bf16". Logits are float32.

    Returns:
        The model in eval mode, with its tokenizer if it has one.

    Raises:
        CheckpointError: no such folder, file, model or version, or a damaged one.
        CapabilityError: weights of a model that this project does not have, or a device that this machine does not.
        ConfigError: a wrong override, an override of what is no file, or an unknown precision.
        DataError: an address without a bucket or of an unknown scheme.

    Examples:
        >>> load_model("runs/quickstart/model")
        Model(pgm, 1,123,328 parameters, L=64, V=1024, tokenizer bpe:1024, cpu, fp32)
    """
    arguments.choice("precision", precision, DTYPES)
    arguments.instance("path", path, str, Path)
    arguments.instance("overrides", overrides, list, tuple)
    place = arguments.device(device)
    local, _ = trained.find(str(path), tracking.tracking_uri(RunConfig(name="any")))
    opened = trained.read(local, overrides)
    facts = opened.facts
    model = Model(opened.denoiser, facts.bos, opened.tokenizer, facts.class_names, RowEnds.of(facts))
    model.denoiser.to(place, DTYPES[precision])
    return model
