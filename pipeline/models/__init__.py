"""Models behind the Denoiser interface."""

from collections.abc import Callable

from pipeline.config.model import ARConfig, MDLMConfig, PGMConfig
from pipeline.models.autoregressive import AR
from pipeline.models.denoiser import Denoiser
from pipeline.models.head import Modalities
from pipeline.models.masked import MDLM
from pipeline.models.pgm import PGM

_KINDS: dict[str, Callable[..., Denoiser]] = {"pgm": PGM, "mdlm": MDLM, "ar": AR}


def build(
    config: PGMConfig | MDLMConfig | ARConfig,
    vocab_size: int,
    length: int,
    bos: int | None = None,
    modalities: Modalities | None = None,
) -> Denoiser:
    """Build a freshly initialised model.

    Args:
        config: kind and sizes.
        vocab_size: V; ids below it can be predicted.
        length: L, tokens of a row.
        bos: the data's BOS, or None. It is read and never predicted, so it may be an id beyond the vocabulary.
        modalities: of rows of captions and images; None: all positions have the same ids.

    Returns:
        The model in training mode.
    """
    model = _KINDS[config.kind](config, vocab_size, length, bos)
    model.head.modalities = modalities
    return model
