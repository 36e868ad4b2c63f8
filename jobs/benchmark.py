"""Time training, sampling and text preparation, compared with simpler implementations and a roofline.

python -m jobs.benchmark configs/benchmark/cpu.yaml
"""

from jobs.cli import command
from pipeline.benchmarks.benchmark import benchmark
from pipeline.config.benchmark import BenchmarkConfig
from pipeline.config.load import parse_section, read_tree
from pipeline.logs import shown


def run(words: list[str]) -> None:
    """Measure, print the report and where the files are.

    Args:
        words: of the command line: the config file, then overrides.
    """
    path, *overrides = words
    result = benchmark(parse_section(BenchmarkConfig, read_tree(path), path, overrides))
    print(f"\n{result.report.to_markdown()}\nfiles   {result.folder}\nMLflow  {shown(result.tracking_uri)}")


if __name__ == "__main__":
    command(run, "CONFIG.yaml [key=value ...]", least=1)
