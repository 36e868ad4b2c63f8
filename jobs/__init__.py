"""Entry points: `python -m jobs` lists them, `python -m jobs.NAME --help` explains one."""
