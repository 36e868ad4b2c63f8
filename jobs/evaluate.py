"""Judge a run's model (or `sampling.model`): likelihood, samples, and how far these are from real data."""

from jobs import main
from pipeline.config.schema import RunConfig
from pipeline.logs import shown
from pipeline.training.evaluate import evaluate


def run(config: RunConfig) -> None:
    """Evaluate, show the table and say where the files are."""
    found = evaluate(config)
    print(f"\n{found.report.to_text()}")
    print(f"\ntables and samples  {found.folder}\nMLflow              {shown(found.tracking_uri)}")


if __name__ == "__main__":
    main(run)
