"""Run lm-evaluation-harness on a model of this project (extra `harness`).

The command line is lm-eval's own, with `--model pgm`:

    python -m jobs.harness --model pgm --model_args path=runs/quickstart/model --tasks hellaswag

Keys of --model_args: path (a name as for load_model, of a model of any kind: pgm, mdlm, ar), draws
(maskings of a continuation, 32), steps (of generation, 64), rows (of a forward pass, 64) and seed (0). A --batch_size
above lm-eval's default of 1 replaces rows.
"""

import torch

from jobs.cli import fail
from pipeline.api import load_model
from pipeline.errors import CapabilityError, PipelineError


def main() -> None:
    """Register the model and run the command line of lm-eval."""
    try:
        from lm_eval.__main__ import cli_evaluate
        from lm_eval.api.registry import register_model

        from pipeline.evaluation.harness import DenoiserLM, HarnessSettings
    except ImportError as error:
        raise CapabilityError(
            f"jobs.harness needs a package that is not installed: {error}; pip install -e '.[harness]'"
        ) from None

    @register_model("pgm")
    class Loaded(DenoiserLM):
        def __init__(
            self,
            path: str = "",
            draws: int = 32,
            seed: int = 0,
            steps: int = 64,
            rows: int = 64,
            batch_size: int | str | None = None,
            max_batch_size: int | None = None,  # noqa: ARG002
            device: str | None = None,
        ):
            cuda = torch.cuda.is_available()  # lm-eval asks for cuda:0 on every machine
            batch = int(str(batch_size)) if str(batch_size).isdigit() else 1
            model = load_model(path, (device or "cuda") if cuda else "cpu")
            super().__init__(model, HarnessSettings(draws, seed, steps, batch if batch > 1 else rows))

    cli_evaluate()


if __name__ == "__main__":
    try:
        main()
    except PipelineError as error:
        fail(str(error))
