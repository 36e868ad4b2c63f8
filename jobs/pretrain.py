"""Train the model that a config describes, preparing its data first where it is missing."""

import sys

from jobs.cli import main
from jobs.plan import plan
from pipeline.config.schema import RunConfig
from pipeline.logs import shown
from pipeline.training.finish import RunResult
from pipeline.training.launch import pretrain


def run(config: RunConfig) -> None:
    """Train and say what came out and where it is."""
    report(pretrain(config))


def report(outcome: RunResult) -> None:
    """Figures, a sample, and where everything is."""
    print(f"\nvalidation {outcome.metric:<11} {outcome.value:8.2f}")
    for name, value in outcome.references.items():
        print(f"{name + ' perplexity':<22} {value:8.2f}   model / {name} = {outcome.value / value:.2f}")
    for text in outcome.samples[:1]:
        print(f"\n--- a sample\n{text}\n---")
    if outcome.pictures:
        print(f"\nsamples    {outcome.pictures}")
    print(f"\nmodel      {outcome.model}   ({outcome.version or 'not registered'})")
    print(f"curves     {sys.executable} -m mlflow ui --backend-store-uri {shown(outcome.tracking_uri)}")


if __name__ == "__main__":
    main(run, plan)
