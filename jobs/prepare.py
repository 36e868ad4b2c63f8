"""Prepare the data that a config describes."""

from jobs.cli import main
from pipeline.config.schema import RunConfig
from pipeline.data.prepare import prepare
from pipeline.run import Run


def run(config: RunConfig) -> None:
    """Prepare the data of a config, or finish an interrupted preparation."""
    prepare.prepare(config.data, Run.of(config).data_path)


if __name__ == "__main__":
    main(run)
