"""Draw samples from a model and write them as token ids and as text or images.

    python -m jobs.sample configs/text/quickstart.yaml sampling.num_samples=16 sampling.steps=64

The model is the run's own, or `sampling.model`.
"""

from jobs.cli import main
from pipeline.config.schema import RunConfig
from pipeline.training.launch import sample


def run(config: RunConfig) -> None:
    """Sample, print the first text and where the files are.

    Args:
        config: of the run whose model is sampled.
    """
    samples = sample(config)
    if samples.texts:
        print(f"\n--- sample 0\n{samples.texts[0]}")
    rate = f"{samples.seconds:.1f} s ({samples.tokens.size / samples.seconds:,.0f} tokens/s)"
    print(f"\n{len(samples.tokens)} samples in {rate}: {samples.folder}")


if __name__ == "__main__":
    main(run)
