"""Wait until the Ray cluster of RAY_ADDRESS has a number of nodes.

RAY_ADDRESS=HOST:PORT python cluster/wait_for_nodes.py 4
"""

import sys
import time

import ray

PATIENCE_S = 300.0


def main(expected: int) -> None:
    """Wait, and end with an error if the nodes do not come.

    Args:
        expected: number of nodes, the head included.
    """
    deadline, count = time.monotonic() + PATIENCE_S, 0
    while time.monotonic() < deadline:
        try:
            if not ray.is_initialized():
                ray.init(logging_level="ERROR")
            count = sum(node["Alive"] for node in ray.nodes())
        except ConnectionError:  # the head is still starting
            pass
        if count >= expected:
            print(f"Ray runs on {count} nodes at {ray.get_runtime_context().gcs_address}", flush=True)
            return
        time.sleep(1.0)
    sys.exit(f"error: Ray has {count} of {expected} nodes after {PATIENCE_S:.0f} s")


if __name__ == "__main__":
    main(int(sys.argv[1]))
