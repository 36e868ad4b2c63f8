"""Run the variants that a sweep's file describes, compare them, and write the best one's config."""

import sys

from jobs import command
from pipeline.config.sweep import load_sweep
from pipeline.training.sweep import sweep


def run(words: list[str]) -> None:
    """Sweep, show the table and say where everything is."""
    outcome = sweep(load_sweep(words[0], words[1:]))
    print(f"\n{outcome.table}")
    print(f"folder     {outcome.folder}")
    if outcome.best is not None:
        print(f"the best   python -m jobs.pretrain {outcome.best}")
    print(f"curves     {sys.executable} -m mlflow ui --backend-store-uri {outcome.tracking_uri}")


if __name__ == "__main__":
    command(run, "CONFIG.yaml [key=value ...]", least=1)
