"""A sweep: variants of a run as trials of Ray Tune, in one folder and under one MLflow run."""

import json
import logging
import os
import time
from collections.abc import Callable, Sequence
from functools import partial
from typing import Any

from ray import tune
from ray.tune.experiment import Trial
from ray.tune.schedulers import AsyncHyperBandScheduler, FIFOScheduler, TrialScheduler
from ray.tune.search.optuna import OptunaSearch

from pipeline import storage, tracking
from pipeline.config.load import flatten
from pipeline.config.schema import RunConfig
from pipeline.config.space import Entry, Variant, assemble
from pipeline.config.sweep import Sweep
from pipeline.errors import StoppedError
from pipeline.run import Run
from pipeline.runtime import claims
from pipeline.runtime.control_files import STOP
from pipeline.runtime.ray_cluster import check_visible, fitting_workers, joined_cluster, stoppable
from pipeline.sweeps.summary import SweepResult, refuse_total_failure, summarise
from pipeline.sweeps.trial import PlannedTrial, in_one_process, kept_end, read_end, run_trial
from pipeline.training import resume

log = logging.getLogger(__name__)

DRAWS = 64  # number of variants of a space that are drawn to see whether all of them contain a number
SUGGESTED = "suggested.json"  # file in the sweep's folder: the choices of a model-based search, in order

Choices = dict[str, Any]  # what Ray Tune gives a trial: its name, or the choices of a search
Find = Callable[[Choices], PlannedTrial]


def sweep(plan: Sweep) -> SweepResult:
    """Run every trial to its end and compare the variants; the same call again continues an interrupted sweep.

    Args:
        plan: the sweep's config and space.

    Returns:
        The table of the variants, and where the files are.

    Raises:
        ConfigError, DataError, CheckpointError: before any trial starts.
        StoppedError: the user stopped the sweep.
        TrainingError: every trial failed.
    """
    base = Run.of(plan.base())
    folder = storage.join(base.config.cluster.storage, plan.config.name)
    with claims.held(folder, "cluster.storage", f"sweep {plan.config.name!r}", "run"):
        return _sweep(plan, base, folder)


def _sweep(plan: Sweep, base: Run, folder: str) -> SweepResult:
    """Run the sweep in a folder that this process owns."""
    own = plan.config
    trials = [planned(plan, variant, seed) for variant in plan.variants() for seed in own.seeds]
    for trial in trials:  # none may continue with another config
        if end := kept_end(trial.run):
            resume.check_same(end.config, trial.run.config, trial.run.folder)
        else:
            resume.precheck(trial.run)
    # What a model-based search will choose is not known, but what its trials need is.
    examples = [trial.run for trial in trials] or [planned(plan, plan.draws(1)[0], own.seeds[0]).run]
    with joined_cluster(base.config.cluster):
        uri = base.tracking_uri
        check_visible(folder, uri)
        tracking.check_store(folder, uri, base.config.tracking.experiment)
        for run in {run.data_path: run for run in examples}.values():
            run.with_data()
        written = own.model_dump(mode="json")
        params = {f"sweep.{key}": value for key, value in written.items()}
        params |= flatten(plan.base().model_dump())
        tags = {"trials": str(len(trials) or own.num_samples)}
        experiment = base.config.tracking.experiment
        run_id = tracking.open_recorded_run(folder, uri, experiment, own.name, params, tags)
        storage.publish_text(storage.join(folder, "sweep.json"), json.dumps(written, indent=2) + "\n")
        with tracking.ending(uri, run_id), stoppable(folder):
            began = time.monotonic()
            started, complete = _run_trials(plan, folder, trials, examples, run_id)
            if not complete:
                raise StoppedError(
                    "stopped on request after checkpoints; the same command continues the sweep"
                )
            log.info("all trials ended after %.0f minutes", (time.monotonic() - began) / 60)
            result = summarise(plan, base.replace(run_id=run_id), folder, started)
            refuse_total_failure(result.rows, folder)
            return result


def planned(plan: Sweep, variant: Variant, seed: int) -> PlannedTrial:
    """Make the run of a variant and a seed, in the sweep's folder; all trials share data and MLflow store.

    Args:
        plan: the sweep's config and space.
        variant: the point of the space.
        seed: of the run.

    Returns:
        The trial.
    """
    run, name = Run.of(plan.trial(variant, seed)), plan.config.name
    config = run.config
    shared = {"uri": run.tracking_uri, "register_as": config.tracking.register_as or name}
    folder = storage.join(config.cluster.storage, name)
    run = run.configured(
        data=config.data.model_copy(update={"path": run.data_path}),
        tracking=config.tracking.model_copy(update=shared),
        cluster=config.cluster.model_copy(update={"storage": folder}),
    )
    return PlannedTrial(variant, seed, run)


def _run_trials(
    plan: Sweep, folder: str, trials: Sequence[PlannedTrial], examples: Sequence[Run], parent: str
) -> tuple[list[PlannedTrial], bool]:
    """Run all trials.

    Args:
        plan: the sweep's config and space.
        folder: of the sweep.
        trials: those that are known beforehand; none of a model-based search.
        examples: runs that need what the trials will need.
        parent: id of the sweep's own MLflow run.

    Returns:
        The trials that were started, and whether each of them, and all that were planned, have ended.
    """
    own = plan.config
    by_name = {trial.name: trial for trial in trials}

    def find(choices: Choices) -> PlannedTrial:
        if "trial" in choices:
            return by_name[choices["trial"]]
        return planned(plan, assemble(plan.entries, lambda entry: choices[entry.name]), own.seeds[0])

    def train(choices: Choices) -> None:
        trial = find(choices)
        tags = {f"choice.{name}": str(value) for name, value in trial.variant.choices.items()}
        tags |= {**tracking.child_of(parent), "variant": trial.variant.label}
        run_trial(trial.run, own.metric, tags)

    search = _optuna(plan, folder) if own.search == "optuna" else None
    count = (own.num_samples or 1) if search else len(trials)
    ended = sum(kept_end(trial.run) is not None for trial in trials)
    # A search of a space without numbers may choose a variant twice, which has one folder.
    concurrent = 1 if search and _repeats(plan) else own.max_concurrent or _concurrent(examples)
    log.info("%d trials, %d of them ended before, at most %d at the same time", count, ended, concurrent)
    # A fresh experiment at every start, since trials record their own reports.
    storage.remove(storage.join(folder, "tune"))
    os.environ["RAY_CHDIR_TO_TRIAL_DIR"] = "0"  # paths in the config are relative to the driver's folder
    os.environ["TUNE_DISABLE_SIGINT_HANDLER"] = "1"  # it would end trials without a checkpoint
    os.environ["TUNE_DISABLE_AUTO_CALLBACK_LOGGERS"] = "1"  # trials log to MLflow
    # It would miss those loggers' files.
    logging.getLogger("ray.tune.analysis.experiment_analysis").setLevel(logging.ERROR)
    tuner = tune.Tuner(
        tune.with_resources(train, lambda choices: _resources(find(choices).run.config)),
        param_space={} if search else {"trial": tune.grid_search(list(by_name))},
        tune_config=tune.TuneConfig(
            search_alg=search,
            scheduler=scheduler_of(plan, max(run.config.train.steps for run in examples)),
            num_samples=count if search else 1,
            max_concurrent_trials=concurrent,
            reuse_actors=True,
            trial_name_creator=lambda trial: find(trial.config).name,
            trial_dirname_creator=lambda trial: find(trial.config).name,
        ),
        run_config=tune.RunConfig(
            name="tune",
            storage_path=folder,
            verbose=0,
            callbacks=[_Progress(find, own.metric, count, ended, folder), _StopRequests(find, folder)],
            failure_config=tune.FailureConfig(max_failures=examples[0].config.cluster.max_failures),
        ),
    )
    results = tuner.fit()
    started, complete = dict(by_name), len(results) >= count
    for result in (results[index] for index in range(len(results))):
        trial = find(result.config or {})
        started[trial.name] = trial
        if result.error is not None:
            log.warning("%s: its process was lost: %s", trial.name, result.error)
        elif read_end(trial.run.folder) is None:
            complete = False
    return list(started.values()), complete


def _repeats(plan: Sweep) -> bool:
    """Whether the space has variants without a number, which a search may choose twice."""
    choices = [variant.choices.values() for variant in plan.draws(DRAWS)]
    return not all(any(isinstance(value, float) for value in values) for values in choices)


def _concurrent(runs: Sequence[Run]) -> int:
    """Count how many of the largest trials fit the cluster at the same time, so that none waits for another's part.

    Trials that do not fit at all are not counted: they fail at once with a message of their own.
    """
    clusters = [run.config.cluster for run in runs]
    counts = [(cluster, fitting_workers(cluster)[0]) for cluster in clusters]
    fitting = [count // cluster.most for cluster, count in counts if count >= cluster.least]
    return max(1, min(fitting, default=1))


def _resources(config: RunConfig) -> tune.PlacementGroupFactory:
    """Reserve the worker's CPUs in Ray Tune, or next to nothing beside the workers that a trial starts."""
    count, use_gpu = fitting_workers(config.cluster)
    if count >= config.cluster.least and in_one_process(config, use_gpu):
        return tune.PlacementGroupFactory([{"CPU": config.cluster.cpus_per_worker}])
    return tune.PlacementGroupFactory([{"memory": 1}])


class _Halving(AsyncHyperBandScheduler):
    """ASHA that asks a trial to save and end, as a user would, where Ray Tune would end its process."""

    def on_trial_result(self, tune_controller: Any, trial: Any, result: dict[str, Any]) -> str:
        decision = super().on_trial_result(tune_controller, trial, result)
        if decision == TrialScheduler.STOP and result["step"] < self._max_t:
            storage.publish_bytes(storage.join(result["folder"], STOP), b"")
        return TrialScheduler.CONTINUE


def scheduler_of(plan: Sweep, steps: int) -> TrialScheduler:
    """Make the scheduler that decides which trials continue.

    Args:
        plan: the sweep's config.
        steps: largest number of steps of a trial.

    Returns:
        The scheduler of Ray Tune.
    """
    own = plan.config
    if own.scheduler == "none":
        return FIFOScheduler()
    assert own.first_rung is not None
    return _Halving(
        time_attr="step",
        metric=own.metric,
        mode=own.mode,
        max_t=steps,
        grace_period=own.first_rung,
        reduction_factor=own.reduction,
    )


def _optuna(plan: Sweep, folder: str) -> OptunaSearch:
    """Make a searcher that first repeats its choices of earlier starts."""
    return OptunaSearch(
        partial(_suggest, plan.entries),  # not a closure: Ray Tune pickles its searcher
        metric=plan.config.metric,
        mode=plan.config.mode,
        points_to_evaluate=storage.read_json(storage.join(folder, SUGGESTED), [], list),
        seed=plan.config.seeds[0] % 2**32,  # Optuna accepts no larger one
    )


def _suggest(entries: Sequence[Entry], trial: Any) -> None:
    """Let Optuna choose a value of every entry that this variant has."""

    def pick(entry: Entry) -> int | float:
        if entry.options:
            return trial.suggest_categorical(entry.name, list(range(len(entry.options))))
        return trial.suggest_float(entry.name, entry.low, entry.high, log=entry.kind == "loguniform")

    assemble(entries, pick)


class _StopRequests(tune.Callback):
    """Passes a request to stop the sweep on to the running trials; later ones find it in the sweep's folder."""

    def __init__(self, find: Find, folder: str):
        self._find, self._file, self._last_check = find, storage.join(folder, STOP), 0.0

    def on_step_begin(self, iteration: int, trials: list[Any], **info: Any) -> None:
        """Check for the request once a second; it is repeated, since a trial removes earlier ones when it starts."""
        if time.monotonic() - self._last_check < 1:
            return
        self._last_check = time.monotonic()
        if storage.exists(self._file):
            for trial in trials:
                if trial.status == Trial.RUNNING:
                    storage.publish_bytes(storage.join(self._find(trial.config).run.folder, STOP), b"")


class _Progress(tune.Callback):
    """Logs every validation and every end of a trial; records what a search suggested, for the next start."""

    def __init__(self, find: Find, metric: str, count: int, ended: int, folder: str):
        self._find, self._metric, self._count, self._ended = find, metric, count, ended
        self._before, self._began = ended, time.monotonic()
        self._file = storage.join(folder, SUGGESTED)
        self._suggested: list[Choices] = []
        self._repeated: set[str] = set()  # names of trials that had ended before

    def on_trial_start(self, iteration: int, trials: list[Any], trial: Any, **info: Any) -> None:
        """Record what was suggested."""
        planned_trial = self._find(trial.config)
        if kept_end(planned_trial.run):
            self._repeated.add(planned_trial.name)
        if "trial" not in trial.config and trial.config not in self._suggested:
            self._suggested.append(trial.config)
            storage.publish_text(self._file, json.dumps(self._suggested))

    def on_trial_result(
        self, iteration: int, trials: list[Any], trial: Any, result: dict[str, Any], **info: Any
    ) -> None:
        """Log a validation."""
        if self._metric in result and not result.get("repeated"):
            planned_trial, value = self._find(trial.config), result[self._metric]
            steps = planned_trial.run.config.train.steps
            log.info(f"{planned_trial}: step {result['step']}/{steps}  {self._metric} {value:.4g}")

    def on_trial_complete(self, iteration: int, trials: list[Any], trial: Any, **info: Any) -> None:
        """Log an end, and how long the remaining trials may take."""
        planned_trial = self._find(trial.config)
        if planned_trial.name in self._repeated:
            return
        self._ended += 1
        end = read_end(planned_trial.run.folder)
        state = f"{end.status} at step {end.step}" if end else "its process was lost"
        minutes_per_trial = (time.monotonic() - self._began) / 60 / (self._ended - self._before)
        left = minutes_per_trial * (self._count - self._ended)
        trials_left = f"{self._ended} of {self._count} trials, about {left:.0f} minutes left"
        log.info(f"{planned_trial}: {state}  ({trials_left})")
