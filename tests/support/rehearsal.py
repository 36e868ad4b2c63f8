"""Training steps and sampling on a GPU without values: what runs there, in which precision, and where the host waits.

`fake_gpu.run_with_device` runs this module, which prints a report of every case as JSON.
"""

import inspect
import json
from collections.abc import Callable
from contextlib import suppress
from dataclasses import replace

import numpy as np
import torch
import torch.nn.functional as F
from torch._subclasses.fake_tensor import DataDependentOutputException, DynamicOutputShapeException

from pipeline.benchmarks import roofline, speed
from pipeline.config.benchmark import BenchmarkConfig, TrainingCase
from pipeline.config.model import ARConfig, MDLMConfig, ModelConfig, PGMConfig
from pipeline.config.schema import DiffusionConfig
from pipeline.diffusion import partition
from pipeline.diffusion.objective import Objective
from pipeline.models import build
from pipeline.models.batch import Batch
from pipeline.models.denoiser import Denoiser
from pipeline.models.flops import training_work
from pipeline.models.head import DistillTargets
from pipeline.sampling import sampler
from pipeline.sampling.rollout import roll_out
from tests.support.fake_gpu import Record, on_device, recording

ROWS, L, V, BOS, CODES, CLASSES = 4, 40, 104, 103, 72, 10
SIZES = {"hidden": 64, "heads": 4}
PGM = PGMConfig(encoder_blocks=1, decoder_blocks=1, **SIZES)
CAUSAL = PGM.model_copy(update={"encoder": "causal"})
MDLM = MDLMConfig(kind="mdlm", blocks=1, **SIZES)
AR = ARConfig(kind="ar", blocks=1, **SIZES)
IMAGES = PGM.model_copy(update={"classes": CLASSES, "registers": 2})


def model_of(config: ModelConfig, record: Record) -> Denoiser:
    """A model in bf16 on the device."""
    vocabulary, bos = (CODES, CODES + 1) if config.classes else (V, BOS)
    model = build(config, vocabulary, L, bos)
    on_device(model, record, torch.bfloat16)
    return model


def batch_of(model: Denoiser, rows: int = ROWS, length: int = L) -> Batch:
    """A micro-batch as training makes it."""
    images = model.config.classes is not None
    config = DiffusionConfig(schedule="arccos" if images else "loglinear")
    draws = partition.draw(config, seed=0, step=0, shape=(rows, length), bos=True)
    objective = Objective(config, True, model.both_groups, model.left_to_right)
    return objective.batch(
        np.random.default_rng(0).integers(CODES, size=(rows, length)),
        draws,
        np.ones(rows, dtype=bool),
        divisor=objective.normaliser(draws.groups),
        labels=np.arange(rows) % CLASSES if images else None,
        order=partition.draw_order([0, 0, 3], range(rows), length, True) if model.causal else None,
        device=torch.device("cuda"),
    )


def train(config: ModelConfig, record: Record) -> None:
    """Forward and backward pass of a micro-batch."""
    model = model_of(config, record).train()
    learn(model, batch_of(model))


def learn(model: Denoiser, batch: Batch) -> None:
    """Forward and backward pass; every parameter has a gradient of its own dtype afterwards."""
    losses = model(batch)
    assert losses.dtype == torch.float32, losses.dtype
    losses.sum().backward()
    without = [name for name, p in model.named_parameters() if p.grad is None or p.grad.dtype != p.dtype]
    assert not without, without


def distil(record: Record) -> None:
    """Two steps of a teacher, and the student's forward and backward pass."""
    teacher, student = (model_of(PGM, record) for _ in range(2))
    dt, batch = 0.125, batch_of(student.train())
    draws = partition.draw(DiffusionConfig(), seed=0, step=0, shape=(ROWS, L), bos=True, least=2 * dt)
    hidden, time = torch.from_numpy(draws.groups), torch.from_numpy(draws.t)
    noise = torch.from_numpy(np.random.default_rng(0).random((ROWS, 2, L)))
    vectors = roll_out(teacher.eval(), batch.tokens, hidden, time=time, dt=dt, noise=noise)
    targets = DistillTargets(vectors, teacher.head, "reverse_kl")
    learn(student, replace(batch, groups=hidden, targets=hidden, distill_targets=targets))


def sample(
    config: ModelConfig, record: Record, steps: int = 2, order: str = "uniform", **how: object
) -> None:
    """All steps of a batch."""
    model = model_of(config, record).eval()
    request = sampler.SamplingRequest(ROWS, steps, 0, order, BOS, **how)  # type: ignore[arg-type]
    with torch.no_grad():  # inference mode does not go with fake tensors
        inspect.unwrap(sampler.sample)(model, request, lambda *_: None)


def benchmark(record: Record) -> None:
    """A training step of the benchmark on a GPU, and the operations of its roofline."""
    config = BenchmarkConfig(
        name="gpu",
        models={"pgm": PGM},
        training=(TrainingCase(model="pgm"),),
        device="gpu",
        precision="bf16",
        length=L,
        vocabulary=V,
        batch=ROWS,
    )
    place = roofline.Place(torch.device("cuda"), torch.bfloat16)
    speed.place_of = lambda _: place  # which asks for a driver
    step = speed.first_step(config)
    record.waits.clear()  # for the weights
    step()
    groups = partition.draw(DiffusionConfig(), seed=0, step=0, shape=(ROWS, L), bos=False).groups
    roofline.roofline(training_work(PGM, V, groups), True, roofline.clock("wall", place.device), place)


def faults(record: Record) -> None:
    """One fault of every kind, all of which the report must name."""
    x = torch.ones(4, 8, device="cuda")
    x[torch.tensor([0, 2])] + (x @ x.T).sum()
    x[:, 0].cumsum(0)
    torch.ones(4).to("cuda")
    x[[1, 2]]
    F.layer_norm(x.double(), (8,))
    F.log_softmax(x.bfloat16(), -1)
    torch.zeros(4, device="cuda").index_add(0, x[:, 0].long(), x[:, 0])
    F.scaled_dot_product_attention(*[x[None, None]] * 3)
    for read in (lambda: x[x > 0], x.sum().item, x.sum().tolist, x.cpu):
        with suppress(DataDependentOutputException, DynamicOutputShapeException):
            read()


CASES: dict[str, Callable[[Record], None]] = {
    "training PGM": lambda record: train(PGM, record),
    "training causal PGM": lambda record: train(CAUSAL, record),
    "training MDLM": lambda record: train(MDLM, record),
    "training AR": lambda record: train(AR, record),
    "training images": lambda record: train(IMAGES, record),
    "training distillation": distil,
    "sampling PGM": lambda record: sample(PGM, record),
    "sampling PGM, stored keys": lambda record: sample(PGM, record, refresh_every=2),
    "sampling causal PGM": lambda record: sample(CAUSAL, record),
    "sampling MDLM": lambda record: sample(MDLM, record),
    "benchmark": benchmark,
    "faults": faults,
}


def report(record: Record) -> dict[str, list[str]]:
    """What a test asserts: mixed devices, waits, and dtypes by the kind of kernel."""
    kinds = {"_log_softmax": "softmax", "index_add": "row sums", "searchsorted": "draws", "cumsum": "draws"}
    names = ("products", "attention", "statistics", *kinds.values())
    dtypes: dict[str, set[str]] = {name: set() for name in names}

    def note(kind: str, dtype: torch.dtype) -> None:
        dtypes[kind].add(str(dtype).removeprefix("torch."))

    for kernel in record.kernels:
        if kernel.is_product:
            for dtype, _ in kernel.inputs:
                note("products", dtype)
        elif kernel.is_attention:
            for dtype, dimensions in kernel.inputs:
                if dimensions > 2:
                    note("attention", dtype)
        elif kernel.op == "native_layer_norm":
            note("statistics", kernel.outputs[1][0])
        elif kernel.op in kinds and kernel.inputs[0][0].is_floating_point:
            note(kinds[kernel.op], kernel.inputs[0][0])
    found = {kind: sorted(names) for kind, names in dtypes.items()}
    return found | {"mixed": sorted({*record.mixed}), "waits": sorted({*record.waits})}


# Models of few blocks and of a recipe's other sizes, with the rows of a micro-batch, L and V.
WIDE, WIDER = {"hidden": 768, "heads": 12}, {"hidden": 1024, "heads": 16}
COUNTED: dict[str, tuple[ModelConfig, int, int, int]] = {
    "PGM": (PGMConfig(encoder_blocks=1, decoder_blocks=2, **WIDE), 32, 1024, 50_257),
    "MDLM": (MDLMConfig(kind="mdlm", blocks=2, **WIDE), 32, 1024, 50_257),
    "images": (
        PGMConfig(encoder_blocks=2, decoder_blocks=1, classes=CLASSES, registers=2, **WIDER),
        16,
        1025,
        16_384,
    ),
}


def count(config: ModelConfig, rows: int, length: int, vocabulary: int) -> dict[str, float]:
    """Launches and bytes of a forward and a backward pass."""
    with torch.device("meta"):
        model = build(
            config, vocabulary, length, vocabulary - 1 if config.classes is None else vocabulary + 1
        )
    with recording() as record:
        on_device(model, record, torch.bfloat16)
        batch, before = batch_of(model, rows, length), len(record.kernels)
        learn(model.train(), batch)
        kernels = record.kernels[before:]
    return {"launches": len(kernels), "moved": sum(kernel.moved for kernel in kernels)}


def main() -> None:
    """Run every case in a record of its own."""
    reports = {}
    for name, case in CASES.items():
        with recording() as record:
            case(record)
        reports[name] = report(record)
    counts = {name: count(*sizes) for name, sizes in COUNTED.items()}
    print(json.dumps({"reports": reports, "counts": counts}))


if __name__ == "__main__":
    main()
