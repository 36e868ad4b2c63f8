"""Entry points: `python -m jobs.NAME CONFIG.yaml [section.key=value ...]`."""

import json
import os
import sys
import traceback
from collections.abc import Callable

from pipeline import logs, storage
from pipeline.config.load import flatten, load
from pipeline.config.schema import RunConfig
from pipeline.errors import ConfigError, PipelineError

PLAN = "plan="
JOB = "RAY_JOB_CONFIG_JSON_ENV_VAR"  # what Ray tells the process of a submitted job


def main(run: Callable[[RunConfig], object], plan: Callable[[RunConfig, str], object] | None = None) -> None:
    """Load the config that the command line names and run it; users' mistakes come without a traceback.

    Args:
        plan: what `plan=GPU` does instead of running; None: the job has no plan.
    """

    def start(words: list[str]) -> None:
        asked = [word.removeprefix(PLAN) for word in words if plan and word.startswith(PLAN)]
        config = load(words[0], [word for word in words[1:] if not (plan and word.startswith(PLAN))])
        if plan and asked:
            plan(config, asked[-1])
            return
        check_open(config)
        check_kept(config)
        run(config)

    usage = "CONFIG.yaml [section.key=value ...]"
    command(
        start, f"{usage}\n       {usage} plan=GPU starts nothing, tells the cost" if plan else usage, least=1
    )


def check_open(config: RunConfig) -> None:
    """Refuse a config with a user or password in an address: configs are written to runs, checkpoints and MLflow.

    Raises:
        ConfigError: names the keys.
    """
    found = [
        f"{key}: {logs.shown(str(value))!r} with a user or password; expected it without, and the secret in the "
        "environment, such as MLFLOW_TRACKING_USERNAME and MLFLOW_TRACKING_PASSWORD"
        for key, value in flatten(config.model_dump(mode="json")).items()
        if logs.shown(str(value)) != str(value)
    ]
    if found:
        raise ConfigError("\n".join(found))


def check_kept(config: RunConfig) -> None:
    """Refuse folders inside the copy of the code that a submitted job runs in: Ray removes it at the job's end.

    Raises:
        ConfigError: names the keys.
    """
    environment = json.loads(os.environ.get(JOB, "{}")).get("runtime_env") or {}
    if "working_dir" not in environment:
        return
    folders = {"cluster.storage": config.cluster.storage, "data.path": config.data.path}
    here = os.path.join(os.getcwd(), "")
    lost = [
        f"{key}: {path!r} lies in the copy of the code that Ray removes when the job ends; "
        "expected a folder that all nodes see, s3:// or gs://"
        for key, path in folders.items()
        if path and storage.is_local(path) and storage.resolve(path).startswith(here)
    ]
    if lost:
        raise ConfigError("\n".join(lost))


def command(run: Callable[[list[str]], object], usage: str, least: int) -> None:
    """Run with the words of the command line, of which there must be at least `least`.

    A failure ends the process with a code that is not 0 and with its reason as the last line.
    """
    module = sys.modules["__main__"]
    words = sys.argv[1:]
    if len(words) < least or words[0] in ("-h", "--help"):
        name = module.__spec__.name if module.__spec__ else "jobs"
        print(f"{(module.__doc__ or '').strip()}\n\nusage: python -m {name} {usage}")
        sys.exit(0 if words and words[0] in ("-h", "--help") else 2)
    logs.show()
    try:
        run(words)
    except PipelineError as error:
        fail(str(error))
    except KeyboardInterrupt:
        fail("interrupted", code=130)
    except Exception as error:  # nobody foresaw it: where it happened, and again what
        print(logs.shown(traceback.format_exc()), file=sys.stderr)
        told = str(error).strip().splitlines()
        fail(f"{type(error).__name__}: {told[-1].strip() if told else 'no message'}")


def fail(reason: str, code: int = 1) -> None:
    """End the process with the reason behind all that was printed."""
    sys.stdout.flush()
    print(logs.shown(f"error: {reason}"), file=sys.stderr, flush=True)
    sys.exit(code)
