"""Prepare the shards that a config's data section describes."""

from jobs import main
from pipeline.data.prepare.prepare import prepare

if __name__ == "__main__":
    main(prepare)
