"""Plain worker processes for tests below Ray: real gloo, real DeepSpeed, the real training loop."""

import os
import socket
import traceback
from collections.abc import Callable
from typing import Any

import torch
import torch.distributed as dist
import torch.multiprocessing as mp


def run_workers(function: Callable[..., Any], workers: int, *arguments: Any) -> list[Any]:
    """Call `function(rank, workers, *arguments)` in fresh processes; results by rank, errors raised here."""
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        port = probe.getsockname()[1]
    context = mp.get_context("spawn")
    queue = context.Queue()
    processes = [
        context.Process(target=_main, args=(function, rank, workers, port, queue, arguments))
        for rank in range(workers)
    ]
    for process in processes:
        process.start()
    results: dict[int, Any] = {}
    failures = []
    for _ in processes:
        rank, value, failure = queue.get(timeout=300)
        results[rank] = value
        if failure:
            failures.append(f"rank {rank}:\n{failure}")
            break
    for process in processes:
        if failures:
            process.terminate()
        process.join(30)
    if failures:
        raise RuntimeError("\n".join(failures))
    return [results[rank] for rank in range(workers)]


def _main(
    function: Callable[..., Any], rank: int, workers: int, port: int, queue: Any, arguments: Any
) -> None:
    os.environ.update(
        RANK=str(rank),
        LOCAL_RANK=str(rank),
        WORLD_SIZE=str(workers),
        MASTER_ADDR="127.0.0.1",
        MASTER_PORT=str(port),
    )
    torch.set_num_threads(1)
    try:
        dist.init_process_group("gloo", rank=rank, world_size=workers)
        value = function(rank, workers, *arguments)
        dist.barrier()
        dist.destroy_process_group()
        queue.put((rank, value, None))
    except BaseException:
        queue.put((rank, None, traceback.format_exc()))
