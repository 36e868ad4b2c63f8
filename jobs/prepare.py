"""Prepare the data of a config: tokenise text or encode images, and write shards.

    python -m jobs.prepare configs/text/quickstart.yaml

The same command continues an interrupted preparation. Training prepares its data itself if it is missing.
"""

from jobs.cli import main
from pipeline.config.schema import RunConfig
from pipeline.data.prepare import prepare
from pipeline.run import Run


def run(config: RunConfig) -> None:
    """Prepare the data of a config.

    Args:
        config: whose `data` section describes the data.
    """
    prepare.prepare(config.data, Run.of(config).data_path)


if __name__ == "__main__":
    main(run)
