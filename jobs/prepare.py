"""Prepare the data that a config describes."""

from jobs.cli import main
from pipeline.data.prepared import prepare

if __name__ == "__main__":
    main(prepare)
