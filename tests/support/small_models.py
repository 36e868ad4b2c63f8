"""Tiny models for tests of the method: every parameter random, since gates and heads start at zero."""

import torch

from pipeline.config.model import ARConfig, MDLMConfig, ModelConfig, PGMConfig
from pipeline.models import build
from pipeline.models.denoiser import Denoiser

PGM = PGMConfig(hidden=32, heads=4, encoder_blocks=2, decoder_blocks=2, dropout=0)
MDLM = MDLMConfig(kind="mdlm", hidden=32, heads=4, blocks=2, dropout=0)
CAUSAL = PGM.model_copy(update={"encoder": "causal"})
AR = ARConfig(kind="ar", hidden=32, heads=4, blocks=2, dropout=0)
BOTH_KINDS = [PGM, MDLM]
# The models that predict in any order, each with what changes how its rows are read.
ANY_ORDER: dict[str, ModelConfig] = {
    "pgm": PGM,
    "pgm with registers": PGM.model_copy(update={"registers": 2}),
    "pgm with pooled swaps": PGM.model_copy(
        update={"swap": PGM.swap.model_copy(update={"pooling": "mean", "every_block": True})}
    ),
    "causal": CAUSAL,
    "mdlm": MDLM,
    "complementary": MDLM.model_copy(update={"complementary": True, "registers": 1}),
}


def randomised(
    config: PGMConfig | MDLMConfig | ARConfig,
    vocab_size: int = 11,
    length: int = 16,
    scale: float = 0.3,
    seed: int = 0,
) -> Denoiser:
    """A model in eval mode in which no path is switched off, the same at every call."""
    torch.manual_seed(seed)
    return shake(build(config, vocab_size, length), scale, seed)


def shake(model: Denoiser, scale: float = 0.3, seed: int = 0) -> Denoiser:
    """Add noise to every parameter."""
    generator = torch.Generator().manual_seed(seed)
    with torch.no_grad():
        for parameter in model.parameters():
            parameter.add_(torch.randn(parameter.shape, generator=generator, dtype=parameter.dtype) * scale)
    return model.eval()


def random_rows(rows: int, length: int, vocab_size: int, seed: int = 0) -> tuple[torch.Tensor, torch.Tensor]:
    """Tokens [rows, length] and groups [rows, length], every row with its own share of group 1."""
    generator = torch.Generator().manual_seed(seed)
    tokens = torch.randint(vocab_size, (rows, length), generator=generator)
    share = torch.rand(rows, 1, generator=generator) * 0.8 + 0.1
    return tokens, torch.rand(rows, length, generator=generator) < share
