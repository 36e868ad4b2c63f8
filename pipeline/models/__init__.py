"""Models behind the Denoiser interface."""

from pipeline.config.schema import ARConfig, MDLMConfig, PGMConfig
from pipeline.models.autoregressive import AR
from pipeline.models.denoiser import Denoiser
from pipeline.models.masked import MDLM
from pipeline.models.pgm import PGM


def build(
    config: PGMConfig | MDLMConfig | ARConfig, vocab_size: int, length: int, bos: int | None = None
) -> Denoiser:
    """A freshly initialised model for rows of `length` tokens, predicted ids below `vocab_size`.

    Args:
        bos: the data's BOS, which is read and never predicted, so it may be an id beyond the vocabulary.
    """
    if isinstance(config, PGMConfig):
        return PGM(config, vocab_size, length, bos)
    if isinstance(config, MDLMConfig):
        return MDLM(config, vocab_size, length, bos)
    return AR(config, vocab_size, length, bos)
