"""Train the variants of a sweep, compare them, and write the config of the best one.

    python -m jobs.sweep configs/sweep/quickstart.yaml

Results are in `cluster.storage`/`name`: table.md, table.csv, trials.csv, figures, and best.yaml for jobs.pretrain.
The same command continues an interrupted sweep and trains failed trials again.
"""

import sys

from jobs.cli import check_locations, command
from pipeline.config.sweep import SweepConfig, load_sweep
from pipeline.logs import shown
from pipeline.sweeps.sweep import sweep


def run(words: list[str]) -> None:
    """Run the sweep, print the table and where the files are.

    Args:
        words: of the command line: the sweep's file, then overrides.
    """
    plan = load_sweep(words[0], words[1:])
    check_locations(plan.base())
    result = sweep(plan)
    print(f"\n{result.table}\nfolder     {result.folder}")
    if result.best is not None:
        print(f"best       python -m jobs.pretrain {result.best}")
    print(f"dashboard  {sys.executable} -m mlflow ui --backend-store-uri {shown(result.tracking_uri)}")


if __name__ == "__main__":
    command(run, "CONFIG.yaml [key=value ...]", least=1, config=SweepConfig)
