"""Wait for the notice that a cloud takes this machine back, and drain its Ray node then.

python spot_notice.py ec2|gce [METADATA]

Runs beside a worker's Ray, and needs nothing but Python and the command `ray`. METADATA is the address of the
machine's metadata, for tests. A run on the node saves a checkpoint when the node begins to drain.
"""

import contextlib
import fcntl
import json
import subprocess
import sys
import tempfile
import time
import urllib.error
import urllib.request
from datetime import UTC, datetime
from pathlib import Path

METADATA = "http://169.254.169.254"
INTERVAL_S = 5.0  # between two looks, as EC2's documentation recommends
GCE_S = 30  # time that Compute Engine leaves a machine; EC2 names the time itself, two minutes ahead


def fetch(url: str, headers: dict[str, str], method: str = "GET") -> str | None:
    """Read a page of the machine's metadata.

    Args:
        url: of the page.
        headers: of the request.
        method: of the request.

    Returns:
        The page, or None if there is none or the metadata do not answer.
    """
    request = urllib.request.Request(url, headers=headers, method=method)
    try:
        with urllib.request.urlopen(request, timeout=2) as answer:
            return answer.read().decode()
    except (urllib.error.URLError, TimeoutError, ConnectionError):  # 404 until there is a notice
        return None


def seconds_left(cloud: str, metadata: str) -> int | None:
    """Return how long this machine stays.

    Args:
        cloud: "ec2" or "gce".
        metadata: address of the machine's metadata.

    Returns:
        Seconds, or None as long as there is no notice.
    """
    if cloud == "gce":
        page = fetch(f"{metadata}/computeMetadata/v1/instance/preempted", {"Metadata-Flavor": "Google"})
        return GCE_S if page is not None and page.strip() == "TRUE" else None
    lifetime = {"X-aws-ec2-metadata-token-ttl-seconds": "60"}
    token = fetch(f"{metadata}/latest/api/token", lifetime, "PUT")
    headers = {} if token is None else {"X-aws-ec2-metadata-token": token}
    page = fetch(f"{metadata}/latest/meta-data/spot/instance-action", headers)
    if page is None:
        return None
    end = datetime.fromisoformat(json.loads(page)["time"].replace("Z", "+00:00"))
    return max(0, round((end - datetime.now(UTC)).total_seconds()))


def drain(seconds: int) -> bool:
    """Tell Ray that this node goes; return whether Ray took the message.

    Args:
        seconds: until it goes.
    """
    command = ["ray", "drain-node", "--reason", "DRAIN_NODE_REASON_PREEMPTION"]
    command += ["--reason-message", "the cloud takes the machine back"]
    return subprocess.run([*command, "--deadline-remaining-seconds", str(seconds)]).returncode == 0


def main(cloud: str, metadata: str = METADATA) -> None:
    """Wait for the notice, drain the node and end.

    Args:
        cloud: "ec2" or "gce".
        metadata: address of the machine's metadata.
    """
    with (Path(tempfile.gettempdir()) / "spot_notice.lock").open("w") as lock:
        try:
            fcntl.flock(lock, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except BlockingIOError:
            print("another process waits for the notice already", flush=True)
            return
        while True:
            left = None
            with contextlib.suppress(ValueError, KeyError):  # a page that is not the notice
                left = seconds_left(cloud, metadata)
            if left is not None:
                print(f"the cloud takes this machine back in {left} s", flush=True)
                if drain(left):
                    return
            time.sleep(INTERVAL_S)


if __name__ == "__main__":
    if len(sys.argv) not in (2, 3) or sys.argv[1] not in ("ec2", "gce"):
        sys.exit(__doc__)
    main(*sys.argv[1:])
