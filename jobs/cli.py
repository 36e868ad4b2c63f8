"""The command line of the jobs: loading the config, help, and how failures are reported."""

import json
import os
import sys
import traceback
from collections.abc import Callable

from pipeline import logs, storage
from pipeline.config.load import flatten, load
from pipeline.config.reference import keys, sections
from pipeline.config.schema import RunConfig
from pipeline.config.section import Section
from pipeline.errors import ConfigError, PipelineError

PLAN = "plan="
JOB_VARIABLE = "RAY_JOB_CONFIG_JSON_ENV_VAR"  # set by Ray in the process of a submitted job


def main(run: Callable[[RunConfig], object], plan: Callable[[RunConfig, str], object] | None = None) -> None:
    """Load the config that the command line names and run the job with it.

    Args:
        run: The job.
        plan: What `plan=GPU` does instead of running the job; None: the job has no plan.
    """

    def start(arguments: list[str]) -> None:
        path, *words = arguments
        plans = [word for word in words if plan and word.startswith(PLAN)]
        config = load(path, [word for word in words if word not in plans])
        if plan and plans:
            plan(config, plans[-1].removeprefix(PLAN))
            return
        check_locations(config)
        run(config)

    usage = "CONFIG.yaml [section.key=value ...]"
    if plan:
        meaning = "plan=GPU starts nothing and prints memory and time on that GPU; plan=true on all."
        usage = f"{usage} [plan=GPU]\n\n{meaning}"
    command(start, usage, least=1, config=RunConfig)


def command(
    run: Callable[[list[str]], object], usage: str, least: int, config: type[Section] | None = None
) -> None:
    """Run a job with the arguments of the command line.

    Errors of the user are printed without a traceback. A failure ends the process with an exit code other than 0 and
    with its reason as the last line.

    Args:
        run: The job, which takes the arguments.
        usage: The arguments in words.
        least: The smallest number of arguments.
        config: Type of the config file, whose keys `--help` lists.
    """
    module, arguments = sys.modules["__main__"], sys.argv[1:]
    wants_help = arguments[:1] in (["-h"], ["--help"])
    if len(arguments) < least or wants_help:
        name = module.__spec__.name if module.__spec__ else "jobs"
        lines = [f"{(module.__doc__ or '').strip()}\n\nusage: python -m {name} {usage}"]
        if config:
            lines.append(key_list(config) if wants_help else "\n--help lists the keys of CONFIG.yaml.")
        show("\n".join(lines))
        sys.exit(0 if wants_help else 2)
    logs.show()
    try:
        run(arguments)
    except PipelineError as error:
        fail(str(error))
    except KeyboardInterrupt:
        fail("interrupted", code=130)
    except Exception as error:
        # A defect of the pipeline: print the traceback, and its reason as the last line.
        print(logs.shown(traceback.format_exc()), file=sys.stderr)
        message = str(error).strip().splitlines() or ["no message"]
        fail(f"{type(error).__name__}: {message[-1].strip()}")


def key_list(config: type[Section]) -> str:
    """Return a config's sections with name, type and default of their keys, one key a line."""
    lines = ["", "Keys of CONFIG.yaml with type and default; docs/configuration.md says what they mean."]
    lines += ["base: OTHER.yaml builds on another config file and states only what differs."]
    for title, section in sections(config).items():
        lines += ["", title or "top level"]
        rows = [row for row in keys(section) if row[1] != "section"]
        lines += [f"  {name:<26}{kind:<32} {default}" for name, kind, default, _ in rows]
    return "\n".join(lines)


def show(text: str) -> None:
    """Print a text whose reader may end early, as `head` does.

    Args:
        text: what is printed.
    """
    try:
        print(text, flush=True)
    except BrokenPipeError:  # Python would try to write the rest again as it ends
        os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())


def check_locations(config: RunConfig) -> None:
    """Refuse addresses with a user or password, and folders that Ray deletes at the end of a submitted job.

    Configs are stored with runs and models, so they must not hold secrets. A submitted job runs in a copy of the code
    that exists only as long as the job.

    Args:
        config: The config of the job.

    Raises:
        ConfigError: Names the keys.
    """
    values = flatten(config.model_dump(mode="json"))
    problems = [
        f"{key}: {logs.shown(str(value))!r} with a user or password; expected it without, and the secret in the "
        "environment, such as MLFLOW_TRACKING_USERNAME and MLFLOW_TRACKING_PASSWORD"
        for key, value in values.items()
        if logs.shown(str(value)) != str(value)
    ]
    environment = json.loads(os.environ.get(JOB_VARIABLE, "{}")).get("runtime_env") or {}
    folders = ("cluster.storage", "data.path") if "working_dir" in environment else ()
    problems += [
        f"{key}: {values[key]!r} lies in the copy of the code that Ray deletes when the job ends; "
        "expected a folder that all nodes see, s3:// or gs://"
        for key in folders
        if values[key] and storage.is_local(values[key])
        if storage.resolve(values[key]).startswith(os.path.join(os.getcwd(), ""))
    ]
    if problems:
        raise ConfigError("\n".join(problems))


def fail(reason: str, code: int = 1) -> None:
    """Print the reason of a failure behind everything else and end the process.

    Args:
        reason: The message.
        code: The exit code.
    """
    sys.stdout.flush()
    print(logs.shown(f"error: {reason}"), file=sys.stderr, flush=True)
    sys.exit(code)
