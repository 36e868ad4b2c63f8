"""Convert weights of any kind to a model folder that `load_model` reads and that fits the Hugging Face hub.

SOURCE   a file of released weights (.ckpt, .pth, .pt, .bin, .safetensors), a model folder, models:/NAME@ALIAS, or
         hf:OWNER/NAME[@REVISION]/FILE; paths may be URLs (s3://, gs://)
FOLDER   where model.safetensors, config.yaml, config.json, README.md and the tokenizer's files go

Words behind them: license=NAME and figures.NAME=VALUE go into the model card. push=OWNER/NAME uploads the folder to
that repository of the hub, which is made private if it does not exist, or public with private=false; it needs a token
(`hf auth login` or HF_TOKEN). For released files, what the file does not say can be given as in a run's config:
model.swap.pooling=mean, length=1024, bos=50256, eot=50256, tokenizer=gpt2.

    python -m jobs.convert pgm_8_8.ckpt models/pgm_8_8 license=apache-2.0 figures.validation_perplexity=22.61
    python -m jobs.convert models/pgm_8_8 models/pushed push=OWNER/pgm_8_8
"""

from jobs.cli import command
from pipeline.export import export_model


def run(words: list[str]) -> None:
    """Convert, and print where the model is and how to upload it, or where it was uploaded to.

    Args:
        words: of the command line: source, folder, then `key=value`.
    """
    source, destination, *rest = words
    address = export_model(source, destination, rest)
    upload = f"uploaded   {address}" if address else f"upload     hf upload OWNER/NAME {destination}"
    print(f"\nmodel      {destination}\n{upload}")


if __name__ == "__main__":
    command(run, "SOURCE FOLDER [key=value ...]", least=2)
