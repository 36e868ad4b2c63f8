"""Configs of runs that take seconds."""

from pathlib import Path

from pipeline.config.load import parse
from pipeline.config.schema import RunConfig


def tiny(storage: Path, name: str, **changes: dict[str, object]) -> RunConfig:
    """A run of seconds: 2 x 16 wide, rows of 16 bytes of the embedded corpus, batches of 8 rows."""
    tree: dict[str, dict[str, object]] = {
        "data": {
            "length": 16,
            "validation_documents": 2,
            "shard_rows": 2048,
            "streams": 4,
            "shuffle_window": 64,
            "path": str(storage / "data"),
        },
        "model": {
            "kind": "pgm",
            "hidden": 16,
            "heads": 2,
            "encoder_blocks": 1,
            "decoder_blocks": 1,
            "dropout": 0.1,
        },
        "optim": {"lr": 1e-2, "warmup_steps": 2, "schedule": "constant", "clip": 0.1},
        "train": {
            "steps": 8,
            "batch": 8,
            "micro_batch": 4,
            "precision": "fp32",
            "zero_stage": 1,
            "ema": 0.9,
            "log_every": 1,
            "validate_every": 100,
            "checkpoint_every": 4,
        },
        "evaluation": {"rows": 16, "batch": 8},
        "sampling": {"steps": 4},
        "cluster": {"storage": str(storage / "runs")},
    }
    for section, keys in changes.items():
        tree[section] = {**tree[section], **keys}
    return parse({"name": name, **tree}, origin="test")


def with_micro_tokens(config: RunConfig, most: int) -> RunConfig:
    """The same run with micro-batches of at most so many tokens."""
    train = config.train.model_copy(update={"micro_batch": None, "micro_tokens": most})
    return config.model_copy(update={"train": train})
