"""Train the variants of a sweep, compare them, and write the config of the best one."""

import sys

from jobs.cli import check_locations, command
from pipeline.config.sweep import SweepConfig, load_sweep
from pipeline.logs import shown
from pipeline.sweeps.sweep import sweep


def run(words: list[str]) -> None:
    """Sweep, show the table and say where everything is."""
    plan = load_sweep(words[0], words[1:])
    check_locations(plan.base())
    outcome = sweep(plan)
    print(f"\n{outcome.table}")
    print(f"folder     {outcome.folder}")
    if outcome.best is not None:
        print(f"the best   python -m jobs.pretrain {outcome.best}")
    print(f"curves     {sys.executable} -m mlflow ui --backend-store-uri {shown(outcome.tracking_uri)}")


if __name__ == "__main__":
    command(run, "CONFIG.yaml [key=value ...]", least=1, config=SweepConfig)
