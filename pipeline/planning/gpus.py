"""The table of GPU types from which `plan` and `scaling` predict time and memory."""

from collections.abc import Mapping
from dataclasses import dataclass

from pipeline.errors import ConfigError, did_you_mean


@dataclass(frozen=True)
class GPU:
    """Published figures of one GPU type.

    Attributes:
        memory: GiB.
        bandwidth: of the memory, GB/s.
        bf16: dense rate without sparsity, TFLOP/s.
        fp32: rate without TF32, as torch computes by default, TFLOP/s.
        link: to another GPU of the same server, in one direction, GB/s: half of the published NVLink rate, or
            half of the rate of PCIe 4.0 x16 for types without NVLink.
        products: share of the rate that matrix products reach. This and the next two are measured on an H100, by
            the training step of PGM 8/8 (docs/speed.md), and assumptions for other types.
        attention: share of the bf16 rate that attention reaches.
        reached: share of the bandwidth that kernels reach.
    """

    memory: float
    bandwidth: float
    bf16: float
    fp32: float
    link: float
    products: float = 0.60
    attention: float = 0.30
    reached: float = 0.80


# Source: NVIDIA's data sheets of the L4, A10, L40S, A100 (SXM), H100 (SXM), H200 (SXM) and HGX B200, and the Ada
# architecture white paper for the RTX 4090.
GPUS = {
    "l4": GPU(24, 300, 121, 30.3, 32),
    "a10": GPU(24, 600, 125, 31.2, 32),
    "rtx4090": GPU(24, 1008, 165, 82.6, 32),
    "l40s": GPU(48, 864, 362, 91.6, 32),
    "a100-40gb": GPU(40, 1555, 312, 19.5, 300, products=0.72, attention=0.48),
    "a100-80gb": GPU(80, 2039, 312, 19.5, 300, products=0.72, attention=0.48),
    "h100": GPU(80, 3350, 989, 67, 450, products=0.70, attention=0.16, reached=0.53),
    "h200": GPU(141, 4800, 989, 67, 450, products=0.70, attention=0.16, reached=0.53),
    "b200": GPU(180, 8000, 2250, 80, 900),
}


def gpu_of(device: str) -> GPU | None:
    """Find the type of a GPU by the name that its driver gives.

    Args:
        device: such as "NVIDIA A100-SXM4-80GB".

    Returns:
        The type; None for one that is not in the table, or whose rates differ from those of the table.
    """
    words = device.lower().replace("rtx 4090", "rtx4090").replace("-", " ").split()
    if {"pcie", "nvl", "laptop"} & {*words}:  # slower forms
        return None
    memory = next((word for word in words if word in ("40gb", "80gb")), "")
    names = {*words, *(f"{word}-{memory}" for word in words)}
    return next((gpu for name, gpu in GPUS.items() if name in names), None)


def select_gpus(name: str) -> Mapping[str, GPU]:
    """Return the GPU types that `plan=NAME` selects.

    Args:
        name: a key of `GPUS` in upper or lower case, or "true" for all types.

    Raises:
        ConfigError: the table has no such type.
    """
    name = name.lower()
    if name == "true":
        return GPUS
    if name not in GPUS:
        raise ConfigError(
            f"plan: {name!r} is not a GPU in the table{did_you_mean(name, GPUS)}; "
            f"expected one of {', '.join(GPUS)}, or true for all"
        )
    return {name: GPUS[name]}
