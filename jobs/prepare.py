"""Prepare the shards that a config's data section describes."""

from jobs import main
from pipeline import storage
from pipeline.config.schema import RunConfig
from pipeline.data.manifest import Manifest
from pipeline.data.prepare import prepare


def run(config: RunConfig) -> Manifest:
    """Prepare the data of the config in the folder that the config names.

    Args:
        config: its sections `data` and `cluster.storage` are used.

    Returns:
        The manifest of the prepared data.
    """
    path = prepare.data_path(config.data, storage.resolve(config.cluster.storage))
    return prepare.prepare(config.data, path)


if __name__ == "__main__":
    main(run)
