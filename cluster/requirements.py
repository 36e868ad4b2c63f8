"""Print what the project and the named extras depend on, one a line: `python cluster/requirements.py s3 gcs`.

The nodes of a cluster need these packages; the code itself comes with every job.
"""

import sys
import tomllib
from pathlib import Path

project = tomllib.loads(Path(__file__).parents[1].joinpath("pyproject.toml").read_text(encoding="utf-8"))[
    "project"
]
extras = project["optional-dependencies"]
print(*project["dependencies"], *(line for name in sys.argv[1:] for line in extras[name]), sep="\n")
