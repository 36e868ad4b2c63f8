"""Convert weights of any kind to a model folder that `load_model` reads and that fits the Hugging Face hub.

SOURCE   a file of released weights (.ckpt, .pth, .pt, .bin, .safetensors), a model folder, or models:/NAME@ALIAS;
         paths may be URLs (s3://, gs://, hf://OWNER/NAME/FILE)
FOLDER   where model.safetensors, config.yaml, config.json, README.md and the tokenizer's files go

Words behind them: license=NAME and figures.NAME=VALUE go into the model card; for released files, what the file
does not say can be given as in a run's config: model.swap.pooling=mean, length=1024, bos=50256, eot=50256,
tokenizer=gpt2.

    python -m jobs.convert pgm_8_8.ckpt models/pgm_8_8 license=apache-2.0 figures.validation_perplexity=22.61
    hf upload OWNER/pgm_8_8 models/pgm_8_8
"""

from jobs.cli import command
from pipeline.api import export_model


def run(words: list[str]) -> None:
    """Convert, and print where the model is and how to upload it.

    Args:
        words: of the command line: source, folder, then `key=value`.
    """
    source, destination, *rest = words
    export_model(source, destination, rest)
    print(f"\nmodel      {destination}\nupload     hf upload OWNER/NAME {destination}")


if __name__ == "__main__":
    command(run, "SOURCE FOLDER [key=value ...]", least=2)
