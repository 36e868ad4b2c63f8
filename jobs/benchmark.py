"""Time training, sampling and text preparation, compared with simpler implementations and a roofline."""

from jobs.cli import command
from pipeline.benchmarks.benchmark import benchmark
from pipeline.config.benchmark import BenchmarkConfig
from pipeline.config.load import parse_section, read_tree
from pipeline.logs import shown


def run(words: list[str]) -> None:
    """Measure, show the report and say where the files are."""
    path, *overrides = words
    found = benchmark(parse_section(BenchmarkConfig, read_tree(path), path, overrides))
    print(f"\n{found.report.to_markdown()}\nfiles   {found.folder}\nMLflow  {shown(found.tracking_uri)}")


if __name__ == "__main__":
    command(run, "CONFIG.yaml [key=value ...]", least=1)
