"""Plain worker processes for tests below Ray: real gloo, real DeepSpeed, the real training loop."""

import os
import socket
import time
import traceback
from collections.abc import Callable
from queue import Empty
from typing import Any

import torch
import torch.distributed as dist
import torch.multiprocessing as mp

PATIENCE = 300.0  # seconds for one call


def _server() -> Any:
    """The process that workers are forked from: the imports of training take it ten seconds, once."""
    os.environ["DS_ACCELERATOR"] = "cpu"
    context = mp.get_context("forkserver")
    context.set_forkserver_preload(["tests.support.imported"])
    return context


class Workers:
    """A group of worker processes that stays up between calls.

    A call that fails on any rank ends the group, since the others may wait for it; the next one starts anew.
    """

    def __init__(self, count: int):
        self.count = count
        self._processes: list[Any] = []

    def __call__(self, function: Callable[..., Any], *arguments: Any) -> list[Any]:
        """`function(rank, workers, *arguments)` on every rank; results by rank, errors raised here."""
        self.start()
        for tasks in self._tasks:
            tasks.put((function, arguments))
        results: dict[int, Any] = {}
        deadline = time.monotonic() + PATIENCE
        while len(results) < self.count:
            try:
                rank, value, failure = self._answers.get(timeout=1.0)
            except Empty:
                dead = [r for r, p in enumerate(self._processes) if not p.is_alive() and r not in results]
                if not dead and time.monotonic() < deadline:
                    continue
                rank, value, failure = dead[:1] or list(range(self.count)), None, "no answer"
            if failure:
                self.close()
                raise RuntimeError(f"rank {rank}:\n{failure}")
            results[rank] = value
        return [results[rank] for rank in range(self.count)]

    def start(self) -> None:
        """Start the processes unless they are up; does not wait for them."""
        if self._processes:
            return
        with socket.socket() as probe:
            probe.bind(("127.0.0.1", 0))
            port = probe.getsockname()[1]
        context = _server()
        self._answers = context.Queue()
        self._tasks = [context.Queue() for _ in range(self.count)]
        self._processes = [
            context.Process(target=_serve, args=(rank, self.count, port, tasks, self._answers), daemon=True)
            for rank, tasks in enumerate(self._tasks)
        ]
        for process in self._processes:
            process.start()

    def close(self) -> None:
        """End the processes."""
        for process in self._processes:
            process.kill()
        for process in self._processes:
            process.join()
        self._processes = []


def run_workers(function: Callable[..., Any], workers: int, *arguments: Any) -> list[Any]:
    """One call in fresh processes."""
    group = Workers(workers)
    try:
        return group(function, *arguments)
    finally:
        group.close()


def _serve(rank: int, workers: int, port: int, tasks: Any, answers: Any) -> None:
    os.environ.update(
        RANK=str(rank),
        LOCAL_RANK=str(rank),
        WORLD_SIZE=str(workers),
        MASTER_ADDR="127.0.0.1",
        MASTER_PORT=str(port),
        DS_ACCELERATOR="cpu",
    )
    torch.set_num_threads(1)
    dist.init_process_group("gloo", rank=rank, world_size=workers)
    while True:
        function, arguments = tasks.get()
        try:
            value = function(rank, workers, *arguments)
            dist.barrier()
            answers.put((rank, value, None))
        except BaseException:
            answers.put((rank, None, traceback.format_exc()))
