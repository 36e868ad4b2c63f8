"""DeepSpeed behind one class: backward, step, float32 master weights, exchange of weights, save and load."""

import json
import logging
import math
import os
import sys
from collections.abc import Iterator, Mapping
from contextlib import AbstractContextManager, contextmanager
from pathlib import Path
from typing import Any, NamedTuple

import torch
import torch.distributed as dist
from jaxtyping import Float
from torch import Tensor

from pipeline.config.schema import OptimConfig, RunConfig
from pipeline.errors import CheckpointError
from pipeline.models.batch import Batch
from pipeline.models.denoiser import Denoiser
from pipeline.training import slices
from pipeline.training.slices import SHAPES, Index, Slices, fill

log = logging.getLogger(__name__)

COMPILED = ("cuda",)  # devices on which `train.compile` pays
OPTIMIZER = "optimizer"  # start of the names of a checkpoint's files with weights and moments
WEIGHTS = "weight:"  # before the names of their slices
MOMENTS = ("exp_avg", "exp_avg_sq")  # of AdamW
BUCKET_BYTES = 25_000_000  # of gradients that are summed together while the backward pass goes on
TAG = "zero"  # DeepSpeed's own folder inside a checkpoint of earlier versions
NO_COMPILER = "TORCHDYNAMO_DISABLE"  # torch.compile gives functions back as they are, and imports nothing


def learning_rate(step: int, optim: OptimConfig, steps: int, fresh: int = 0) -> float:
    """Compute the learning rate of a step: linear warm-up, then constant or a cosine to 0.

    Args:
        step: counted from 0.
        optim: rate, warm-up and schedule.
        steps: number of steps of the run.
        fresh: step at which the optimiser was last reset; the warm-up starts there, since Adam's first updates
            have a poor estimate of the gradient's size.

    Returns:
        The rate.
    """
    warm = min(1.0, (step - fresh + 1) / max(optim.warmup_steps, 1))
    if optim.schedule == "cosine":
        done = max(0, step - optim.warmup_steps) / max(1, steps - optim.warmup_steps)
        return optim.lr * warm * 0.5 * (1 + math.cos(math.pi * min(1.0, done)))
    return optim.lr * warm


def import_deepspeed() -> Any:
    """Import DeepSpeed without what it imports for its autotuner (mlflow) and for Muon (the compiler of torch).

    We use neither, and together they cost every worker 5 s of CPU time and 165 MiB.

    Returns:
        The package.
    """
    hidden = {"mlflow"} - sys.modules.keys()
    compiler = os.environ.get(NO_COMPILER)
    os.environ[NO_COMPILER] = "1"
    sys.modules.update(dict.fromkeys(hidden))  # type: ignore[arg-type]  # None: importing it fails
    try:
        import deepspeed
        import deepspeed.ops
        import deepspeed.runtime.zero.muon.original_muon
    finally:
        for name in hidden:
            del sys.modules[name]
        del os.environ[NO_COMPILER]
        if compiler is not None:
            os.environ[NO_COMPILER] = compiler
    return deepspeed


class Engine:
    """One worker's share of the model, its gradients and its optimiser.

    Args:
        model: with the same initial weights on every rank.
        config: of the run; its sections `optim` and `train` are used.
        parts: by which DeepSpeed divides the loss; not 1 where a step can have several micro-batches.
        device: where this worker computes.
        universal: whether `load_earlier` will be given a converted checkpoint.

    Attributes:
        stage: of ZeRO.
        device: where this worker computes.
        fresh: step at which the optimiser was last reset.
    """

    def __init__(self, model: Denoiser, config: RunConfig, parts: int, device: torch.device, universal: bool):
        deepspeed = import_deepspeed()
        optim, train, self._zero = config.optim, config.train, deepspeed.zero
        if device.type == "cpu":
            # The shared-memory collective would be compiled for minutes at its first use.
            deepspeed.ops.__compatible_ops__["deepspeed_shm_comm"] = False
        logging.getLogger("DeepSpeed").setLevel(logging.WARNING)
        self._config, self._parts = config, parts
        self.stage, self.device = train.zero_stage, device
        self._bf16 = train.precision == "bf16"
        model.to(device)
        model.recompute = train.activation_checkpointing
        if train.compile and device.type in COMPILED:
            model.compile_blocks()
        elif train.compile and dist.get_rank() == 0:
            log.warning("train.compile: true is ignored on a CPU, where it does not pay (docs/speed.md)")
        # Rate 0 until `step` sets it: at stage 0 in bf16 DeepSpeed first takes a step with zero gradients.
        trained = [parameter for parameter in model.parameters() if parameter.requires_grad]
        optimiser = torch.optim.AdamW(trained, lr=0.0, betas=optim.betas, weight_decay=optim.weight_decay)
        self._engine: Any = deepspeed.initialize(
            model=model, optimizer=optimiser, config=self._settings(universal), dist_init_required=False
        )[0]
        self._engine.optimizer.state.clear()  # that step must not count in Adam's bias correction
        self.fresh = 0  # step at which the optimiser was last reset

    def _settings(self, universal: bool) -> dict[str, Any]:
        """Make DeepSpeed's config."""
        train = self._config.train
        zero: dict[str, Any] = {
            "stage": train.zero_stage,
            "stage3_param_persistence_threshold": train.persistent_parameters,
            # By default one bucket holds all gradients, which then wait for the whole backward pass.
            "overlap_comm": self.device.type == "cuda",
            "reduce_bucket_size": BUCKET_BYTES // (2 if self._bf16 else 4),
        }
        if train.offload_optimizer:
            zero["offload_optimizer"] = {"device": "cpu"}
        return {
            "train_micro_batch_size_per_gpu": train.micro_batch or 1,
            "gradient_accumulation_steps": self._parts,
            "gradient_clipping": self._config.optim.clip,
            "zero_allow_untested_optimizer": True,
            "zero_optimization": zero,
            "zero_force_ds_cpu_optimizer": False,  # its CPU Adam would be compiled for minutes first
            "checkpoint": {"load_universal": universal},
            # The loop reads the norm itself, later; this check would wait for the device in every step.
            "bf16": {"enabled": self._bf16, "check_grad_overflow": False},
            # At stage 0 in bf16 DeepSpeed divides gradients by fp16's loss scale, 2^16, which nothing put in.
            "fp16": {"enabled": False, "loss_scale": 1.0},
            "steps_per_print": 2**31,
        }

    @property
    def model(self) -> Denoiser:
        """The wrapped model; under ZeRO-3 its parameters exist only inside the forward of its modules."""
        return self._engine.module

    def backward(self, batch: Batch, last: bool) -> Tensor:
        """Run forward and backward of one micro-batch; behind the last one of a step, `step` must follow.

        Gradients become the gradient of the **sum** of all row losses of the global batch: DeepSpeed divides
        by workers and parts, so the loss is multiplied by both.

        Args:
            batch: of this worker, with the weights of the global batch.
            last: whether it is the last one of the step, on all ranks; then gradients are summed over the ranks.

        Returns:
            Losses of the micro-batch's rows, [m], detached, on the device.
        """
        self._engine.set_gradient_accumulation_boundary(last)
        losses = self._engine(batch)
        self._engine.backward(losses.sum() * (dist.get_world_size() * self._parts))
        return losses.detach()

    def rate(self, step: int) -> float:
        """Return the learning rate of a step."""
        return learning_rate(step, self._config.optim, self._config.train.steps, self.fresh)

    def step(self, step: int) -> None:
        """Clip the gradient and update at the step's learning rate.

        Args:
            step: counted from 0.
        """
        rate = self.rate(step)
        for group in self._engine.optimizer.param_groups:
            group["lr"] = rate
        if self._plain:
            grads = [p.grad for p in self.model.parameters() if p.grad is not None]
            self._norm = torch.nn.utils.get_total_norm(grads)
        self._engine.step()

    @property
    def _plain(self) -> bool:
        """Stage 0 in float32: a bare torch optimiser, for which DeepSpeed keeps no gradient norm."""
        return isinstance(self._engine.optimizer, torch.optim.Optimizer)

    def gradient_norm(self) -> Float[Tensor, ""]:
        """Return the global norm of the last step's gradient before clipping, on the device; it is not waited for."""
        norm = self._norm if self._plain else self._engine.get_global_grad_norm()
        return torch.as_tensor(norm, dtype=torch.float32, device=self.device)

    def masters(self) -> Slices:
        """Return live views of the float32 weights that this rank owns and trains.

        At stage 0 a rank owns all of them, at stages 1 and 2 a partition of the flattened weights, and at stage 3
        a share of every parameter.

        Returns:
            Flat views by parameter name and offset.
        """
        return {owned.key: owned.view(owned.tensor) for owned in self._owned()}

    def moments(self) -> dict[str, Slices]:
        """Return live views of the optimiser's state for the weights that this rank owns; zeros before a step.

        Returns:
            Flat views by parameter name and offset, by the names of Adam's moments.
        """
        moments: dict[str, Slices] = {name: {} for name in MOMENTS}
        for owned in self._owned():
            state = self._state_of(owned.tensor)
            for name in MOMENTS:
                moments[name][owned.key] = owned.view(state[name])
        return moments

    def _state_of(self, master: Tensor) -> dict[str, Tensor]:
        """Return the optimiser's state for one of its tensors, made as AdamW makes it if there is none."""
        state = self._engine.optimizer.state[master]
        if not state:
            fused = self._engine.optimizer.param_groups[0].get("fused")
            state["step"] = torch.zeros((), dtype=torch.float32, device=master.device if fused else "cpu")
            state |= {name: torch.zeros_like(master, requires_grad=False) for name in MOMENTS}
        return state

    def _owned(self) -> Iterator["_Owned"]:
        """Give the parts of parameters that this rank owns, and where the optimiser has them."""
        optimiser, rank = self._engine.optimizer, dist.get_rank()
        named = self._trained()
        if self.stage == 3:
            for name, parameter in named:
                share = parameter.ds_tensor.numel()
                count = min(share, max(0, parameter.ds_numel - rank * share))  # the last share is padded
                if count:
                    group, start, _ = optimiser.grad_position[optimiser.get_param_id(parameter)]
                    master = optimiser.fp32_partitioned_groups_flat[group]
                    yield _Owned((name, rank * share), master, start, count)
        elif self.stage > 0:
            for name, parameter in named:
                if (part := getattr(parameter, "_hp_mapping", None)) is not None:
                    master = optimiser.single_partition_of_fp32_groups[part.param_group_index]
                    place = part.hp_fragment_address
                    yield _Owned((name, part.lp_fragment_address.start), master, place.start, place.numel)
        else:
            masters: dict[int, Tensor] = {}
            if not self._plain:  # bf16
                for low, high in zip(optimiser.fp16_groups, optimiser.fp32_groups, strict=True):
                    masters |= dict(zip(map(id, low), high, strict=True))
            for name, parameter in named:
                yield _Owned((name, 0), masters.get(id(parameter), parameter), 0, parameter.numel())

    def _trained(self) -> list[tuple[str, Any]]:
        """Trained parameters by name, to which DeepSpeed adds attributes."""
        return [(name, p) for name, p in self.model.named_parameters() if p.requires_grad]

    def _full(self, slices: Slices) -> Iterator[tuple[str, Any, Tensor]]:
        """Give every trained parameter with its whole float32 values from the slices of all ranks together."""
        by_name: dict[str, list[tuple[int, Tensor]]] = {}
        for (name, offset), values in slices.items():
            by_name.setdefault(name, []).append((offset, values))
        for name, parameter in self._trained():
            full = torch.zeros(parameter.ds_shape if self.stage == 3 else parameter.shape, device=self.device)
            for offset, values in by_name.get(name, ()):
                full.view(-1)[offset : offset + values.numel()] = values
            if self.stage > 0:
                dist.all_reduce(full)  # every entry is owned by exactly one rank
            yield name, parameter, full

    @torch.no_grad()
    def install(self, slices: Slices) -> None:
        """Copy weights, such as the EMA's or the masters, into the model; all ranks call it together.

        Args:
            slices: of this rank.
        """
        for _, parameter, full in self._full(slices):
            with self._gathered([parameter], modifier=0):
                parameter.data.copy_(full)

    @torch.no_grad()
    def whole(self, slices: Slices) -> dict[str, Tensor]:
        """Gather all weights in float32 and their full shapes on the host; all ranks call it together.

        Args:
            slices: of this rank.

        Returns:
            Weights by parameter name.
        """
        return {name: full.cpu() for name, _, full in self._full(slices)}

    def restart(self, weights: Mapping[str, Tensor], keep_optimizer: bool) -> None:
        """Continue from other weights; all ranks call it together.

        Args:
            weights: full float32 weights by parameter name.
            keep_optimizer: keep the optimiser's state; False: start with a fresh one.
        """
        masters = self.masters()
        fill(masters, weights)
        self.install(masters)
        if not keep_optimizer:
            self._engine.optimizer.state.clear()

    def frozen(self, model: Denoiser) -> Denoiser:
        """Prepare a model that is only read, on this engine's device and in its precision.

        Under ZeRO-3 every rank keeps a share of its parameters except the head's; `assembled` makes them whole.

        Args:
            model: on any device; it is changed in place.

        Returns:
            The same model.
        """
        model.requires_grad_(False).eval().to(self.device)
        if self._bf16:
            model.bfloat16()
        if self.stage == 3:
            for part in model.children():
                # The head is read in chunks of positions, whose number differs between ranks.
                if part is not model.head:
                    self._zero.Init(module=part, dtype=torch.bfloat16 if self._bf16 else torch.float32)
        return model

    def assembled(self, model: Denoiser) -> AbstractContextManager[None]:
        """Make a frozen model's parameters whole for the time of a block; all ranks enter together.

        Ranks may call different modules inside. DeepSpeed would gather module by module, and then wait for ever.

        Args:
            model: from `frozen`.

        Returns:
            The block's context manager.
        """
        return self._gathered([p for p in model.parameters() if hasattr(p, "ds_id")])

    def _gathered(self, parameters: list[Any], modifier: int | None = None) -> AbstractContextManager[None]:
        """Make parameters whole for the time of a block; what rank `modifier` changes in them is kept."""
        return self._zero.GatheredParameters(parameters, modifier, enabled=self.stage == 3)

    @contextmanager
    def weights(self, slices: Slices) -> Iterator[Denoiser]:
        """Give the model in eval mode with other weights, such as the EMA's, for the time of the block.

        Args:
            slices: of this rank.

        Returns:
            A context manager that gives the model.
        """
        masters = self.masters()
        if self._plain:  # the model computes with the masters themselves: keep them
            masters = {key: values.clone() for key, values in masters.items()}
        self.install(slices)
        self.model.eval()
        try:
            yield self.model
        finally:
            self.model.train()
            self.install(masters)

    def close(self) -> None:
        """Release model, optimiser and hooks, before another engine is made in this process."""
        self._engine.destroy()

    def save(self, file: Path) -> None:
        """Write the weights and moments that this rank owns into a file.

        Args:
            file: of safetensors.
        """
        steps = {int(self._state_of(owned.tensor)["step"]) for owned in self._owned()}
        kinds = {f"{name}:": values for name, values in self.moments().items()}
        shapes = {name: list(getattr(p, "ds_shape", p.shape)) for name, p in self._trained()}
        facts = {"updates": str(max(steps, default=0)), SHAPES: json.dumps(shapes)}
        slices.save(file, {WEIGHTS: self.masters(), **kinds}, facts)

    def load(self, folder: str, index: Index) -> None:
        """Read weights and moments that any number of ranks saved; all ranks call it together.

        Args:
            folder: of the checkpoint, local or remote.
            index: which rank saved what.

        Raises:
            CheckpointError: something is not stored.
        """
        masters = self.masters()
        kinds = {f"{name}:": values for name, values in self.moments().items()}
        facts = slices.read(folder, OPTIMIZER, index, {WEIGHTS: masters, **kinds})
        for owned in self._owned():
            self._state_of(owned.tensor)["step"].fill_(int(facts.get("updates", 0)))
        self.install(masters)

    def load_earlier(self, folder: Path) -> None:
        """Read a checkpoint of earlier versions, of the same number of ranks and the same stage, or converted.

        Args:
            folder: of the checkpoint, or of its universal form.

        Raises:
            CheckpointError: DeepSpeed finds no checkpoint in the folder.
        """
        path, _ = self._engine.load_checkpoint(str(folder), tag=TAG)
        if path is None:
            raise CheckpointError(f"{folder}: DeepSpeed found no checkpoint in its folder {TAG!r}")


class _Owned(NamedTuple):
    """A part of a parameter that a rank owns.

    Attributes:
        key: name of the parameter, and where the part begins in it.
        tensor: of the optimiser, which holds the part.
        start: where the part begins in that tensor.
        size: number of values.
    """

    key: tuple[str, int]
    tensor: Tensor
    start: int
    size: int

    def view(self, tensor: Tensor) -> Float[Tensor, "n"]:
        """Return the part of the tensor, or of one that lies as it does."""
        return tensor.detach().view(-1)[self.start : self.start + self.size]
