"""Low-rank adaptation: the weights of linear maps stay as they are, and products of two small factors are added."""

from collections.abc import Mapping

import torch
from jaxtyping import Float
from torch import Tensor, nn

from pipeline.config.model import LoraConfig

UP, DOWN = "lora_up", "lora_down"  # names of the factors in a linear map, beside its weight
_TARGETS = {
    **dict.fromkeys(("qkv_proj", "q_proj", "kv_proj", "query", "out"), "attention"),
    **dict.fromkeys(("up", "down"), "mlp"),
}


class _Adapted(nn.Module):
    """A linear map whose weight is read with its update. It is mixed into the class of the map.

    Blocks fold weights into other products, so the update is added to the weight and not to the map's result.
    """

    lora_scale: float

    @property
    def weight(self) -> Float[Tensor, "rows columns"]:
        """The weight with its update."""
        weight, up, down = (self._parameters[name] for name in ("weight", UP, DOWN))
        assert weight is not None
        assert up is not None
        assert down is not None
        return torch.addmm(weight, up, down, alpha=self.lora_scale)


def adapt(model: nn.Module, config: LoraConfig) -> None:
    """Freeze a model, and give its linear maps trainable updates, which are zero at first.

    Args:
        model: changed in place; its weights keep their names.
        config: rank, scale and which maps.

    Source:
        arXiv 2106.09685, section 4.1.
    """
    model.requires_grad_(False)
    for name, module in [*model.named_modules()]:
        if not isinstance(module, nn.Linear) or _TARGETS.get(name.rpartition(".")[2]) not in config.targets:
            continue
        weight, kind = module.weight, type(module)
        rows, columns = weight.shape
        down = torch.randn(config.rank, columns, device=weight.device, dtype=weight.dtype) / columns**0.5
        module.register_parameter(DOWN, nn.Parameter(down))
        module.register_parameter(UP, nn.Parameter(weight.new_zeros(rows, config.rank)))
        module.__class__ = type(kind.__name__, (_Adapted, kind), {"lora_scale": config.alpha / config.rank})


def merged(
    weights: Mapping[str, Tensor], factors: Mapping[str, Tensor], config: LoraConfig
) -> dict[str, Tensor]:
    """Add updates to weights.

    Args:
        weights: of the model without updates, by name.
        factors: of the updates, by name.
        config: scale of the updates.

    Returns:
        Weights by name; those without an update are the same tensors.
    """
    result = dict(weights)
    for name, up in factors.items():
        prefix, _, last = name.rpartition(".")
        if last == UP:
            key = f"{prefix}.weight"
            scale = config.alpha / config.rank
            result[key] = torch.addmm(weights[key], up, factors[f"{prefix}.{DOWN}"], alpha=scale)
    return result
