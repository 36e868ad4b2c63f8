"""Draw samples from a model as files of tokens, texts or images."""

from jobs.cli import main
from pipeline.config.schema import RunConfig
from pipeline.training.launch import sample


def run(config: RunConfig) -> None:
    """Sample, show the first text and say where the files are."""
    samples = sample(config)
    if samples.texts:
        print(f"\n--- sample 0\n{samples.texts[0]}")
    rate = samples.tokens.size / samples.seconds
    print(
        f"\n{len(samples.tokens)} samples in {samples.seconds:.1f} s ({rate:,.0f} tokens/s): {samples.folder}"
    )


if __name__ == "__main__":
    main(run)
