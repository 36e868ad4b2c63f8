"""A sweep: variants of a run as trials of Ray Tune, in one folder and under one MLflow run."""

import json
import logging
import os
import time
from collections.abc import Callable, Sequence
from functools import partial
from typing import Any

import ray
from ray import tune
from ray.tune.experiment import Trial
from ray.tune.schedulers import AsyncHyperBandScheduler, FIFOScheduler, TrialScheduler
from ray.tune.search.optuna import OptunaSearch

from pipeline import storage, tracking
from pipeline.config.load import flatten
from pipeline.config.schema import RunConfig
from pipeline.config.space import Entry, Variant, assemble
from pipeline.config.sweep import Sweep
from pipeline.errors import CapabilityError, StoppedError
from pipeline.run import Run
from pipeline.runtime.control_files import STOP
from pipeline.runtime.ray_cluster import check_resources, check_visible, joined_cluster, places, stoppable
from pipeline.sweeps.summary import Planned, SweepResult, summarise
from pipeline.sweeps.trial import in_one_process, read_ended, run_trial
from pipeline.training import resume

log = logging.getLogger(__name__)

DRAWS = 64  # of a space, to see whether all of its variants have a number in them
SUGGESTED = "suggested.json"  # in the sweep's folder: what a model-based search has asked for, in order


def sweep(plan: Sweep) -> SweepResult:
    """Run every trial to its end, and compare the variants; the same call again goes on where it was.

    Raises:
        ConfigError, DataError, CheckpointError: before any trial starts.
        StoppedError: it was stopped before the end.
    """
    base = Run.of(plan.base())
    folder = storage.join(base.config.cluster.storage, plan.config.name)
    storage.check_writable(folder, "cluster.storage")
    trials = [planned(plan, v, seed) for v in plan.variants() for seed in plan.config.seeds]
    for one in trials:
        check_same(one)
    # What a model-based search will ask for is not known, but what its trials need is.
    examples = [one.run for one in trials] or [planned(plan, plan.draws(1)[0], plan.config.seeds[0]).run]
    with joined_cluster(base.config.cluster):
        uri = base.tracking_uri
        check_visible(folder, uri)
        for run in {run.data_path: run for run in examples}.values():
            run.with_data()
        run_id = _open_parent(plan, folder, uri, len(trials))
        with tracking.ending(uri, run_id), stoppable(folder):
            began = time.monotonic()
            tried, whole = _run_trials(plan, folder, trials, examples, run_id)
            if not whole:
                raise StoppedError("stopped as asked, after checkpoints; the same command goes on")
            log.info("all trials ended after %.0f minutes", (time.monotonic() - began) / 60)
            return summarise(plan, base.replace(run_id=run_id), folder, tried)


def planned(plan: Sweep, variant: Variant, seed: int) -> Planned:
    """The run of a variant and a seed, in the sweep's folder, on data and in a store that all trials share."""
    run = Run.of(plan.trial(variant, seed))
    config = run.config
    data = config.data.model_copy(update={"path": run.data_path})
    shared = {
        "uri": run.tracking_uri,
        "register_as": config.tracking.register_as or plan.config.name,
    }
    folder = storage.join(config.cluster.storage, plan.config.name)
    run = run.configured(
        data=data,
        tracking=config.tracking.model_copy(update=shared),
        cluster=config.cluster.model_copy(update={"storage": folder}),
    )
    return Planned(variant, seed, run)


def check_same(trial: Planned) -> None:
    """Refuse to go on with a trial that has become another.

    Raises:
        CheckpointError: lists every difference.
    """
    run = trial.run
    ended = read_ended(run.folder)
    if ended is not None and ended.counts(run.config):
        resume.check_same(ended.config, run.config, run.folder)
    else:
        resume.precheck(run)


def _open_parent(plan: Sweep, folder: str, uri: str, trials: int) -> str:
    """The sweep's own MLflow run, the same at every start."""
    base, own = plan.base(), plan.config
    written = own.model_dump(mode="json")
    run_id = tracking.open_recorded_run(
        folder,
        uri,
        base.tracking.experiment,
        own.name,
        params={**{f"sweep.{key}": value for key, value in written.items()}, **flatten(base.model_dump())},
        tags={"trials": str(trials or own.num_samples)},
    )
    storage.publish_text(storage.join(folder, "sweep.json"), json.dumps(written, indent=2) + "\n")
    return run_id


def _run_trials(
    plan: Sweep,
    folder: str,
    trials: Sequence[Planned],
    examples: Sequence[Run],
    parent: str,
) -> tuple[list[Planned], bool]:
    """All trials that were tried, and whether each has come to an end.

    Args:
        trials: those that are known beforehand; none of a model-based search.
        examples: runs that need what the trials will need.
        parent: id of the sweep's own MLflow run.
    """
    own = plan.config
    by_name = {one.run.config.name: one for one in trials}

    def find(choice: dict[str, Any]) -> Planned:
        if "trial" in choice:
            return by_name[choice["trial"]]
        return planned(plan, assemble(plan.entries, lambda entry: choice[entry.name]), own.seeds[0])

    def trial(config: dict[str, Any]) -> None:
        found = find(config)
        choices = {f"choice.{name}": str(value) for name, value in found.variant.choices.items()}
        tags = {**tracking.child_of(parent), "variant": found.variant.label, **choices}
        run_trial(found.run, own.metric, tags)

    search = _optuna(plan, folder) if own.search == "optuna" else None
    count = (own.num_samples or 1) if search else len(trials)
    ended = sum(_counts(one.run) for one in trials)
    at_most = own.max_concurrent or _fitting(examples)
    if search and not all(_has_number(variant) for variant in plan.draws(DRAWS)):
        at_most = 1  # the search may ask for the same variant twice, which has one folder
    log.info("%d trials, %d of them ended before, at most %d at the same time", count, ended, at_most)
    # A fresh experiment at every start, since trials remember by themselves.
    storage.remove(storage.join(folder, "tune"))
    os.environ["RAY_CHDIR_TO_TRIAL_DIR"] = "0"  # relative paths in the config mean what they mean to the user
    os.environ["TUNE_DISABLE_SIGINT_HANDLER"] = "1"  # it would end trials without a checkpoint
    os.environ["TUNE_DISABLE_AUTO_CALLBACK_LOGGERS"] = "1"  # trials have MLflow; no warning that files lack
    logging.getLogger("ray.tune.analysis.experiment_analysis").setLevel(logging.ERROR)
    tuner = tune.Tuner(
        tune.with_resources(trial, lambda config: _resources(find(config).run.config)),
        param_space={} if search else {"trial": tune.grid_search(list(by_name))},
        tune_config=tune.TuneConfig(
            search_alg=search,
            scheduler=scheduler_of(plan, max(one.config.train.steps for one in examples)),
            num_samples=count if search else 1,
            max_concurrent_trials=at_most,
            reuse_actors=True,
            trial_name_creator=lambda one: find(one.config).run.config.name,
            trial_dirname_creator=lambda one: find(one.config).run.config.name,
        ),
        run_config=tune.RunConfig(
            name="tune",
            storage_path=folder,
            verbose=0,
            callbacks=[_Progress(find, own.metric, count, ended, folder), _Stopping(find, folder)],
            failure_config=tune.FailureConfig(max_failures=examples[0].config.cluster.max_failures),
        ),
    )
    results = tuner.fit()
    tried = {one.run.config.name: one for one in trials}
    lost = set()
    for result in (results[at] for at in range(len(results))):
        found = find(result.config or {})
        tried[found.run.config.name] = found
        if result.error is not None:
            lost.add(found.run.config.name)
            log.warning("%s: its process was lost: %s", found.run.config.name, result.error)
    over = [name for name, one in tried.items() if name in lost or read_ended(one.run.folder) is not None]
    return list(tried.values()), len(over) == len(tried) and len(results) >= count


def _has_number(variant: Variant) -> bool:
    return any(isinstance(value, float) for value in variant.choices.values())


def _counts(run: Run) -> bool:
    ended = read_ended(run.folder)
    return ended is not None and ended.counts(run.config)


def _fits(config: RunConfig) -> bool:
    """Whether the cluster can hold this trial at all; one that it cannot says so itself, at once."""
    try:
        check_resources(config.cluster)
    except CapabilityError:
        return False
    return True


def _fitting(runs: Sequence[Run]) -> int:
    """How many of the largest trials fit the cluster at the same time, so that none waits for another's part."""
    most = []
    for config in filter(_fits, (run.config for run in runs)):
        asked = config.cluster
        most.append(places(ray.nodes(), asked.cpus_per_worker, check_resources(asked)) // asked.most)
    return max(1, min(most, default=1))


def _resources(config: RunConfig) -> tune.PlacementGroupFactory:
    """What Ray Tune reserves: the worker's CPUs, or next to nothing beside the workers that a trial starts."""
    if _fits(config) and in_one_process(config, check_resources(config.cluster)):
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
    """What decides which trials go on to `steps`, the most that any has."""
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
    """A searcher that first asks again for what it asked for in earlier starts."""

    own, file = plan.config, storage.join(folder, SUGGESTED)
    earlier = json.loads(storage.read_text(file)) if storage.exists(file) else []
    return OptunaSearch(
        partial(_suggest, plan.entries),  # not a closure: Ray Tune pickles its searcher
        metric=own.metric,
        mode=own.mode,
        points_to_evaluate=earlier,
        seed=own.seeds[0],
    )


def _suggest(entries: Sequence[Entry], trial: Any) -> None:
    """Optuna's choice of every entry that this variant has."""

    def pick(entry: Entry) -> int | float:
        if entry.options:
            return trial.suggest_categorical(entry.name, list(range(len(entry.options))))
        return trial.suggest_float(entry.name, entry.low, entry.high, log=entry.kind == "loguniform")

    assemble(entries, pick)


class _Stopping(tune.Callback):
    """Passes the user's wish on to the trials that run; those that have not begun see it in the sweep's folder."""

    def __init__(self, find: Callable[[dict[str, Any]], Planned], folder: str):
        self._find, self._file, self._looked = find, storage.join(folder, STOP), 0.0

    def on_step_begin(self, iteration: int, trials: list[Any], **info: Any) -> None:
        """Called by Ray Tune several times a second; told again, since a trial forgets what came before it."""
        if time.monotonic() - self._looked < 1:
            return
        self._looked = time.monotonic()
        if storage.exists(self._file):
            for trial in (one for one in trials if one.status == Trial.RUNNING):
                run = self._find(trial.config).run
                storage.publish_bytes(storage.join(run.folder, STOP), b"")


class _Progress(tune.Callback):
    """A line for every judgement and every end; and what a search suggested, for the next start."""

    def __init__(
        self, find: Callable[[dict[str, Any]], Planned], metric: str, count: int, ended: int, folder: str
    ):
        self._find, self._metric, self._count, self._ended = find, metric, count, ended
        self._before, self._began = ended, time.monotonic()
        self._file = storage.join(folder, SUGGESTED)
        self._suggested: list[dict[str, Any]] = []
        self._quiet: set[str] = set()

    def on_trial_start(
        self,
        iteration: int,
        trials: list[Any],
        trial: Any,
        **info: Any,
    ) -> None:
        """Remember what was suggested."""
        found = self._find(trial.config)
        if _counts(found.run):
            self._quiet.add(found.run.config.name)
        if "trial" not in trial.config and trial.config not in self._suggested:
            self._suggested.append(trial.config)
            storage.publish_text(self._file, json.dumps(self._suggested))

    def on_trial_result(
        self,
        iteration: int,
        trials: list[Any],
        trial: Any,
        result: dict[str, Any],
        **info: Any,
    ) -> None:
        """One judgement."""
        found = self._find(trial.config)
        if self._metric in result and not result.get("repeated"):
            log.info(
                "%s: step %d/%d  %s %.4g",
                _title(found),
                result["step"],
                found.run.config.train.steps,
                self._metric,
                result[self._metric],
            )

    def on_trial_complete(
        self,
        iteration: int,
        trials: list[Any],
        trial: Any,
        **info: Any,
    ) -> None:
        """One end, and how long the rest may take."""
        found = self._find(trial.config)
        if found.run.config.name in self._quiet:
            return
        self._ended += 1
        ended, left = read_ended(found.run.folder), self._count - self._ended
        how = f"{ended.status} at step {ended.step}" if ended else "lost"
        a_trial = (time.monotonic() - self._began) / (self._ended - self._before)
        log.info(
            "%s: %s  (%d of %d trials, about %.0f minutes left)",
            _title(found),
            how,
            self._ended,
            self._count,
            a_trial * left / 60,
        )


def _title(trial: Planned) -> str:
    return f"{trial.variant.label} seed {trial.seed}"
