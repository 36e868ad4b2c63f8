"""Distil a trained model in rounds, each of which halves the sampling steps that are needed."""

from jobs.cli import main
from jobs.plan import plan
from jobs.pretrain import report
from pipeline.config.schema import RunConfig
from pipeline.training.launch import distill


def run(config: RunConfig) -> None:
    """Distil and say what came out and where it is."""
    outcome = distill(config)
    report(outcome)
    print(f"\n{outcome.quality}")


if __name__ == "__main__":
    main(run, plan)
