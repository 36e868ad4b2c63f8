"""Models behind the Denoiser interface."""

from pipeline.config.schema import MDLMConfig, PGMConfig
from pipeline.models.denoiser import Denoiser
from pipeline.models.masked import MDLM
from pipeline.models.pgm import PGM


def build(config: PGMConfig | MDLMConfig, vocab_size: int, length: int) -> Denoiser:
    """A freshly initialised model for data of `length` tokens a row and ids below `vocab_size`."""
    if isinstance(config, PGMConfig):
        return PGM(config, vocab_size, length)
    return MDLM(config, vocab_size, length)
