"""Runs on several nodes that lose some of them, or their driver, or get one more (by hand: many starts)."""

import random
import re
import time
from pathlib import Path

import pytest
from mlflow import MlflowClient

from pipeline.config.schema import RunConfig
from pipeline.run import Run
from pipeline.tracking import tracking_uri
from tests.support import witness
from tests.support.launched import LaunchedJob
from tests.support.nodes import Nodes
from tests.support.tiny_runs import tiny
from tests.support.workers import run_workers

EVERY, NODES = 10, 3


def elastic(storage: Path, name: str, steps: int) -> RunConfig:
    return tiny(
        storage,
        name,
        train={"steps": steps, "checkpoint_every": EVERY, "validate_every": steps},
        model={"dropout": 0.0},
        optim={"lr": 1e-3},
        cluster={"workers": {"min": 1, "max": NODES}, "max_failures": 5},
    )


def undisturbed(rank: int, workers: int, config: RunConfig, folder: Path) -> dict[int, float]:
    """The same run in plain processes, without Ray; losses by step."""
    from pipeline.runtime.session import PlainSession
    from pipeline.training.loop import train

    witness.install(folder)
    session = PlainSession(rank, workers, Run(config).folder)
    train(Run(config), session)
    return {step: metrics["train/loss"] for step, metrics in session.history}


def finished(job: LaunchedJob, until: int | None = None) -> int:
    """The last step that a line tells of."""
    found = [re.search(r"step (\d+)/", line) for line in job.lines[:until]]
    return max((int(match[1]) for match in found if match), default=0)


class Story:
    """A run, what happens to it, and what each event costs.

    Attributes:
        rows: folder for what its workers train on; they do it slowly at first.
    """

    def __init__(self, storage: Path, steps: int) -> None:
        self.storage, self.steps, self.rows = storage, steps, storage / "rows"
        self.config = elastic(storage, "elastic", steps)
        self.costs: list[str] = []
        self._began = time.monotonic()
        self.rows.mkdir()
        (self.rows / witness.SLOW).touch()

    def start(self, nodes: Nodes) -> LaunchedJob:
        """Start the job, again too."""
        watched = {"RAY_TRAIN_CALLBACKS": "tests.support.witness.Witness", witness.FOLDER: str(self.rows)}
        environment = {**nodes.environment, **watched, "RAY_DEDUP_LOGS": "0"}
        return LaunchedJob("pretrain", self.config, self.storage, environment=environment)

    def back(
        self, job: LaunchedJob, what: str, began: float, after: int, workers: int, before: int = 0
    ) -> int:
        """Wait until `workers` workers go on, from the step returned; note seconds and steps that are done again."""
        line = rf"(?:resuming|starting) from step (\d+): {workers} workers"
        start = int(job.wait_for(line, timeout=300, after=after)[1])
        at = next(i for i, text in enumerate(job.lines) if i >= after and re.search(line, text))
        step = f"step {start + 1}/{self.steps} "
        job.wait_for(step, after=at)
        stepped = next(i for i, text in enumerate(job.lines) if i > at and step in text)
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

    def end(self, job: LaunchedJob) -> None:
        """Let the job run to its end at full speed."""
        (self.rows / witness.SLOW).unlink()
        assert "validation perplexity" in job.finish()
        self.costs.append(f"in all {time.monotonic() - self._began:.0f} s")

    def compare(self) -> None:
        """Rows and losses are those of a run without events; there is one MLflow run."""
        folder, began = self.storage / "undisturbed", time.monotonic()
        folder.mkdir()
        expected = run_workers(undisturbed, 1, elastic(self.storage, "plain", self.steps), folder)[0]
        self.costs.append(f"one plain process {time.monotonic() - began:.0f} s")
        reference, rows = witness.seen(folder), witness.seen(self.rows)
        assert sorted(reference) == list(range(self.steps))
        assert all(sorted(places) == list(range(8)) for places in reference.values())
        assert {step: rows[step] for step in reference} == reference

        client = MlflowClient(tracking_uri(self.config))
        (run,) = client.search_runs(["1"])
        assert run.info.status == "FINISHED"
        points = client.get_metric_history(run.info.run_id, "train/loss")
        logged = {point.step: point.value for point in sorted(points, key=lambda point: point.timestamp)}
        assert logged.keys() == expected.keys() == set(range(1, self.steps + 1))
        off = max(abs(logged[step] / expected[step] - 1) for step in expected)
        self.costs.append(f"losses differ by at most {off:.1e} of their value")
        print("\n" + "\n".join(self.costs))
        assert off < 1e-4


@pytest.mark.alone
def test_nodes_lost_at_random_change_neither_rows_nor_losses(tmp_path: Path):
    rng, story = random.Random(11), Story(tmp_path, steps=100)
    with Nodes(NODES) as nodes, story.start(nodes) as job:
        story.back(job, "start", time.monotonic(), 0, NODES)
        for left, step in ((2, 14 + rng.randrange(10)), (1, 40 + rng.randrange(10))):
            job.wait_for(f"step {step}/100 ", timeout=300)
            seen, when = len(job.lines), nodes.lose(rng.randrange(left + 1))
            start = story.back(job, f"node lost at step {step}", when, seen, left)
            # What came after the last checkpoint is done again; its upload may still have been under way.
            assert start > 0
            assert finished(job, seen) - start <= 2 * EVERY
        story.end(job)
    story.compare()


@pytest.mark.alone
def test_driver_killed_then_a_node_comes_and_one_goes_with_notice(tmp_path: Path):
    rng, story = random.Random(5), Story(tmp_path, steps=300)
    with Nodes(1) as nodes:
        with story.start(nodes) as job:
            job.wait_for(f"step {12 + rng.randrange(10)}/300 ", timeout=300)
            when, before = time.monotonic(), finished(job)
            job.kill_driver()
        with story.start(nodes) as job:
            start = story.back(job, "driver killed", when, 0, 1, before)
            assert before - start <= 2 * EVERY
            seen, when = len(job.lines), time.monotonic()
            nodes.add()
            start = story.back(job, "node came", when, seen, 2)
            saved = job.wait_for(r"step (\d+): the group of workers is about to change", after=seen)
            assert start >= int(saved[1])  # saved for the purpose, not when it was due
            seen = len(job.lines)
            nodes.announce(0, seconds=60)
            saved = job.wait_for(r"step (\d+): the nodes of workers \[\d\] will be taken away at", after=seen)
            job.wait_for(f"step {int(saved[1]) + 3}/300 ", after=seen)  # training goes on until the node goes
            seen, when = len(job.lines), nodes.lose(0)
            assert story.back(job, "announced node lost", when, seen, 1) >= int(saved[1])
            story.end(job)
    story.compare()


@pytest.mark.alone
def test_twenty_losses_with_a_checkpoint_between_them(tmp_path: Path):
    """More than `max_failures`, which counts losses since the newest checkpoint."""
    story, seen = Story(tmp_path, steps=300), 0
    with Nodes(1) as nodes, story.start(nodes) as job:
        start = story.back(job, "start", time.monotonic(), 0, 1)
        for number in range(1, 21):
            job.wait_for(f"step {start + EVERY + 2}/300 ", timeout=300, after=seen)
            before, seen, when = start, len(job.lines), nodes.lose(0)
            nodes.add()
            start = story.back(job, f"loss {number}", when, seen, 1)
            assert before < start <= finished(job, seen)
        story.end(job)
    story.compare()
