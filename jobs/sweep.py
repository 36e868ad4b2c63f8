"""Run the variants that a sweep's file describes, compare them, and write the best one's config."""

import sys

from jobs.cli import command, refuse_credentials, refuse_job_folders
from pipeline.config.sweep import SweepConfig, load_sweep
from pipeline.logs import shown
from pipeline.sweeps.sweep import sweep


def run(words: list[str]) -> None:
    """Sweep, show the table and say where everything is."""
    plan = load_sweep(words[0], words[1:])
    refuse_credentials(plan.base())
    refuse_job_folders(plan.base())
    outcome = sweep(plan)
    print(f"\n{outcome.table}")
    print(f"folder     {outcome.folder}")
    if outcome.best is not None:
        print(f"the best   python -m jobs.pretrain {outcome.best}")
    print(f"curves     {sys.executable} -m mlflow ui --backend-store-uri {shown(outcome.tracking_uri)}")


if __name__ == "__main__":
    command(run, "CONFIG.yaml [key=value ...]", least=1, config=SweepConfig)
