"""Pretrain a model on text or images; prepare the data first if it is missing.

    python -m jobs.pretrain configs/text/quickstart.yaml
    python -m jobs.pretrain configs/text/quickstart.yaml name=wide model.hidden=256

The run's folder is `cluster.storage`/`name`. The same command continues an interrupted run from its newest
checkpoint. Ctrl-C saves a checkpoint and ends the run; a second one ends it at once.
"""

import sys

from jobs.cli import main
from jobs.plan import plan
from pipeline.logs import shown
from pipeline.reports.tables import two_decimals
from pipeline.training.finish import RunResult
from pipeline.training.launch import pretrain


def report(result: RunResult) -> None:
    """Print the metrics of a run, a sample, and where its files are.

    Args:
        result: of the run.
    """
    print(f"\nvalidation {result.metric:<11} {two_decimals(result.value):>8}")
    if result.bits_per_byte is not None:
        print(f"{'bits per byte':<22} {result.bits_per_byte:8.3f}")
    for name, value in result.references.items():
        print(
            f"{name + ' perplexity':<22} {value:8.2f}   model / {name} = {two_decimals(result.value / value)}"
        )
    for text in result.samples[:1]:
        print(f"\n--- sample\n{text}\n---")
    if result.quality:
        print(f"\n{result.quality}")
    print(f"\nmodel      {result.model}   ({result.version or 'not registered'})")
    if result.pictures:
        print(f"samples    {result.pictures}")
    print(f"dashboard  {sys.executable} -m mlflow ui --backend-store-uri {shown(result.tracking_uri)}")


if __name__ == "__main__":
    main(lambda config: report(pretrain(config)), plan)
