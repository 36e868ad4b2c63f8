"""A run on several nodes that loses some of them and its driver, and gets one back (slow: many starts)."""

import random
import re
import time
from pathlib import Path

import pytest
import witness
from launched import LaunchedJob
from mlflow import MlflowClient
from nodes import Nodes
from tiny_runs import tiny
from workers import run_workers

from pipeline.config.schema import RunConfig
from pipeline.tracking import tracking_uri
from pipeline.training import checkpoint

STEPS, EVERY, NODES = 300, 10, 3


def elastic(storage: Path, name: str) -> RunConfig:
    return tiny(
        storage,
        name,
        train={"steps": STEPS, "checkpoint_every": EVERY, "validate_every": STEPS},
        model={"dropout": 0.0},
        optim={"lr": 1e-3},
        cluster={"workers": {"min": 1, "max": NODES}, "max_failures": 5},
    )


def undisturbed(rank: int, workers: int, config: RunConfig, folder: Path) -> dict[int, float]:
    """The same run in plain processes, without Ray; losses by step."""
    from pipeline.training.loop import Job, train
    from pipeline.training.session import PlainSession

    witness.install(folder)
    session = PlainSession(rank, workers, checkpoint.run_folder(config))
    train(Job(config), session)
    return {step: metrics["train/loss"] for step, metrics in session.history}


def finished(job: LaunchedJob, until: int | None = None) -> int:
    """The last step that a line tells of."""
    found = [re.search(rf"step (\d+)/{STEPS} ", line) for line in job.lines[:until]]
    return max((int(match[1]) for match in found if match), default=0)


class Story:
    """What happens to a job, and what each event costs."""

    def __init__(self) -> None:
        self.costs: list[str] = []

    def back(
        self, job: LaunchedJob, what: str, began: float, after: int, workers: int, before: int = 0
    ) -> int:
        """Wait until `workers` workers go on, from the step returned; note seconds and steps that are done again."""
        line = rf"(?:resuming|starting) from step (\d+): {workers} workers"
        start = int(job.wait_for(line, timeout=240, after=after)[1])
        at = next(i for i, text in enumerate(job.lines) if i >= after and re.search(line, text))
        job.wait_for(rf"step {start + 1}/{STEPS} ", after=at)
        stepped = next(
            i for i, text in enumerate(job.lines) if i > at and f"step {start + 1}/{STEPS} " in text
        )
        marks = {"decided": "Detected (ready|changes)", "group started": "Started training worker group"}
        times = {
            name: [job.times[i] for i in range(after, at) if re.search(mark, job.lines[i])]
            for name, mark in marks.items()
        }
        times |= {"resumed": [job.times[at]], "next step": [job.times[stepped]]}
        seconds = ", ".join(f"{name} {when[-1] - began:.1f}" for name, when in times.items() if when)
        again = max(before, finished(job, at)) - start
        self.costs.append(f"{what}: {seconds} s; {again} steps done again")
        return start


@pytest.mark.slow
def test_lost_nodes_and_a_killed_driver_change_neither_rows_nor_losses(tmp_path: Path):
    rng, story = random.Random(11), Story()
    rows, plain_rows = tmp_path / "rows", tmp_path / "plain_rows"
    for folder in (rows, plain_rows):
        folder.mkdir()
    (rows / witness.SLOW).touch()
    config, began = elastic(tmp_path, "elastic"), time.monotonic()
    with Nodes(NODES) as nodes:
        watched = {"RAY_TRAIN_CALLBACKS": "witness.Witness", witness.FOLDER: str(rows), "RAY_DEDUP_LOGS": "0"}
        environment = {**nodes.environment, **watched}
        with LaunchedJob("pretrain", config, tmp_path, environment=environment) as job:
            story.back(job, "start", began, 0, NODES)
            for left, step in ((2, 14 + rng.randrange(10)), (1, 40 + rng.randrange(10))):
                job.wait_for(rf"step {step}/{STEPS} ", timeout=240)
                seen, when = len(job.lines), nodes.lose(rng.randrange(left + 1))
                start = story.back(job, f"node lost at step {step}", when, seen, left)
                # What came after the last checkpoint is done again; its upload may still have been under way.
                assert start > 0
                assert finished(job, seen) - start <= 2 * EVERY
            job.wait_for(rf"step {start + EVERY + rng.randrange(EVERY)}/{STEPS} ", after=seen)
            when, before = time.monotonic(), finished(job)
            job.kill_driver()
        with LaunchedJob("pretrain", config, tmp_path, environment=environment) as job:
            assert story.back(job, "driver killed", when, 0, 1, before) >= start - EVERY
            seen, when = len(job.lines), time.monotonic()
            nodes.add()
            start = story.back(job, "node came", when, seen, 2)
            saved = job.wait_for(r"step (\d+): the group of workers is about to change", after=seen)
            assert start >= int(saved[1])
            (rows / witness.SLOW).unlink()
            assert "validation perplexity" in job.finish()
    wall = time.monotonic() - began

    (run,) = MlflowClient(tracking_uri(config)).search_runs(["1"])  # one run, whatever happened
    assert run.info.status == "FINISHED"
    began = time.monotonic()
    expected = run_workers(undisturbed, NODES, elastic(tmp_path, "undisturbed"), plain_rows)[0]
    story.costs.append(f"in all {wall:.0f} s; {NODES} plain processes {time.monotonic() - began:.0f} s")

    reference, seen_rows = witness.seen(plain_rows), witness.seen(rows)
    assert sorted(reference) == list(range(STEPS))
    assert all(sorted(places) == list(range(8)) for places in reference.values())
    assert {step: seen_rows[step] for step in reference} == reference

    points = MlflowClient(tracking_uri(config)).get_metric_history(run.info.run_id, "train/loss")
    logged = {point.step: point.value for point in sorted(points, key=lambda point: point.timestamp)}
    assert logged.keys() == expected.keys() == set(range(1, STEPS + 1))
    off = {step: abs(logged[step] / expected[step] - 1) for step in expected}
    story.costs.append(
        f"losses differ by at most {max(off.values()):.1e}, {max(off[s] for s in range(1, 9)):.1e} in 8 steps"
    )
    print("\n".join(story.costs))
    assert max(off.values()) < 1e-4
