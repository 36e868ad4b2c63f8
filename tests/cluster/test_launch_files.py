"""Launch files: Ray's own checks, the operator's fields, flags that exist, one version of Ray, code without data."""

import re
import subprocess
import sys
import zipfile
from pathlib import Path
from typing import Any

import pytest
import ray
import yaml
from packaging.requirements import Requirement
from packaging.version import Version
from ray.autoscaler._private.util import prepare_config, validate_config

ROOT = Path(__file__).parents[2]
CLUSTER = ROOT / "cluster"
VM = ("aws", "gcp", "onprem")

# Fields of the operator's v1 API (KubeRay 1.5.1, which brought `authOptions`) by the json names of its Go types; no
# package carries its schema. What is not listed here is refused, so that a misspelt field, which the API server
# would drop in silence, is found. What is in a pod are Kubernetes' own fields.
RAY_CLUSTER = {
    "rayVersion": str,
    "authOptions": {"mode": str},
    "enableInTreeAutoscaling": bool,
    "autoscalerOptions": {"idleTimeoutSeconds": int, "upscalingMode": str},
    "headGroupSpec": {"rayStartParams": dict, "template": dict, "serviceType": str},
    "workerGroupSpecs": [
        {
            "groupName": str,
            "replicas": int,
            "minReplicas": int,
            "maxReplicas": int,
            "rayStartParams": dict,
            "template": dict,
        }
    ],
}
RAY_JOB = {
    "entrypoint": str,
    "runtimeEnvYAML": str,
    "clusterSelector": dict,
    "rayClusterSpec": RAY_CLUSTER,
    "backoffLimit": int,
    "shutdownAfterJobFinishes": bool,
    "ttlSecondsAfterFinished": int,
    "submissionMode": str,
}
POD = {"serviceAccountName", "terminationGracePeriodSeconds", "containers", "volumes", "tolerations"}
CONTAINER = {"name", "image", "env", "ports", "resources", "volumeMounts", "lifecycle"}


def launch_file(name: str) -> Any:
    return yaml.safe_load((CLUSTER / f"{name}.yaml").read_text(encoding="utf-8"))


def manifests(name: str) -> dict[str, Any]:
    """Kubernetes objects of a file by kind."""
    return {
        item["kind"]: item
        for item in yaml.safe_load_all((CLUSTER / f"{name}.yaml").read_text(encoding="utf-8"))
    }


def check(value: Any, schema: Any, where: str) -> None:
    """Keys that the schema has, values of its types."""
    if isinstance(schema, dict):
        assert isinstance(value, dict), where
        for key, inner in value.items():
            assert key in schema, f"{where}.{key}"
            check(inner, schema[key], f"{where}.{key}")
    elif isinstance(schema, list):
        for index, inner in enumerate(value):
            check(inner, schema[0], f"{where}[{index}]")
    else:
        assert type(value) is schema, f"{where}: {value!r}"


def pods(cluster: dict[str, Any]) -> list[dict[str, Any]]:
    groups = [cluster["headGroupSpec"], *cluster["workerGroupSpecs"]]
    return [group["template"]["spec"] for group in groups]


@pytest.mark.parametrize("name", VM)
def test_ray_accepts(name: str) -> None:
    validate_config(prepare_config(launch_file(name)))


@pytest.mark.parametrize(
    ("name", "spoil", "says"),
    [
        ("aws", {"idle_timeout": 3}, "idle_timeout"),
        ("gcp", {"max_workers": "many"}, "many"),
        ("onprem", {"file_mounts": ["a"]}, "array|object"),
    ],
)
def test_ray_would_refuse_a_mistake(name: str, spoil: dict[str, Any], says: str) -> None:
    with pytest.raises(Exception, match=says):
        validate_config(prepare_config(launch_file(name) | spoil))


def test_workers_on_clouds_are_spot_and_need_no_keys() -> None:
    aws = launch_file("aws")["available_node_types"]
    assert aws["gpu"]["node_config"]["InstanceMarketOptions"] == {"MarketType": "spot"}
    assert all("Name" in kind["node_config"]["IamInstanceProfile"] for kind in aws.values())
    gcp = launch_file("gcp")["available_node_types"]
    assert {"preemptible": True} in gcp["gpu"]["node_config"]["scheduling"]
    assert all(kind["node_config"]["serviceAccounts"][0]["email"] for kind in gcp.values())
    for cloud in (aws, gcp):
        assert cloud["gpu"]["max_workers"] > cloud["gpu"]["min_workers"]


@pytest.mark.parametrize("name", VM)
def test_token_and_patience_stand_where_ray_reads_them(name: str) -> None:
    config = launch_file(name)
    assert config["file_mounts"]["~/.ray/auth_token"] == "~/.ray/auth_token"
    (head,) = (line for line in config["head_start_ray_commands"] if "--head" in line)
    (worker,) = (line for line in config["worker_start_ray_commands"] if "--address" in line)
    container = " ".join(config.get("docker", {}).get("run_options", []))
    for start in (head, worker):
        assert "RAY_AUTH_MODE=token" in container + start
    # The supervisor of a job, which waits, is a process of the head; its environment is that of `ray start`.
    assert re.search(r"RAY_JOB_STOP_WAIT_TIME_S=\d{3,}", container + head)
    assert "MLFLOW_TRACKING_URI=http://$(hostname -I" in head
    assert "RAY_HEAD_IP" not in head  # Ray tells it to workers only


def test_kubernetes_head_has_token_and_patience() -> None:
    cluster = manifests("kuberay")["RayCluster"]["spec"]
    assert cluster["authOptions"] == {"mode": "token"}
    env = {item["name"]: item["value"] for item in pods(cluster)[0]["containers"][0]["env"]}
    assert int(env["RAY_JOB_STOP_WAIT_TIME_S"]) >= 100
    service = manifests("mlflow")["Service"]
    assert (
        env["MLFLOW_TRACKING_URI"]
        == f"http://{service['metadata']['name']}:{service['spec']['ports'][0]['port']}"
    )


def test_kuberay_fields_exist_and_have_the_right_types() -> None:
    found = manifests("kuberay")
    assert [item["apiVersion"] for item in found.values()] == ["ray.io/v1"] * 2
    cluster, job = found["RayCluster"], found["RayJob"]
    check(cluster["spec"], RAY_CLUSTER, "RayCluster")
    check(job["spec"], RAY_JOB, "RayJob")
    for pod in pods(cluster["spec"]):
        assert pod.keys() <= POD
        volumes = {volume["name"] for volume in pod.get("volumes", [])}
        for container in pod["containers"]:
            assert container.keys() <= CONTAINER
            assert {mount["name"] for mount in container.get("volumeMounts", [])} <= volumes
    # A job on a cluster that exists may neither retry on a new one nor take it down: the operator refuses those.
    assert job["spec"]["clusterSelector"] == {"ray.io/cluster": cluster["metadata"]["name"]}
    assert not {"backoffLimit", "shutdownAfterJobFinishes", "rayClusterSpec"} & job["spec"].keys()
    assert isinstance(yaml.safe_load(job["spec"]["runtimeEnvYAML"]), dict)
    for wrong in ({"replica": 1}, {"replicas": "1"}):
        with pytest.raises(AssertionError, match=r"w\.replica"):
            check(wrong, RAY_CLUSTER["workerGroupSpecs"][0], "w")


@pytest.mark.parametrize(("name", "cloud"), [("aws", "ec2"), ("gcp", "gce")])
def test_spot_workers_watch_for_the_notice(name: str, cloud: str) -> None:
    config = launch_file(name)
    assert config["file_mounts"]["~/spot_notice.py"] == "cluster/spot_notice.py"
    assert (CLUSTER / "spot_notice.py").exists()
    assert f"~/spot_notice.py {cloud} " in config["worker_start_ray_commands"][-1]
    assert config["available_node_types"]["head"]["resources"]["CPU"] == 0
    assert "," not in config["provider"]["availability_zone"]


def test_pods_drain_before_they_end() -> None:
    """The hook ends before the pod is killed, and leaves a run time for a checkpoint."""
    head, worker = pods(manifests("kuberay")["RayCluster"]["spec"])
    assert "lifecycle" not in head["containers"][0]
    shell = worker["containers"][0]["lifecycle"]["preStop"]["exec"]["command"][-1]
    words = re.findall(r"--[a-z-]+", shell)
    source = (Path(ray.__file__).parent / "scripts" / "scripts.py").read_text(encoding="utf-8")
    known = source.partition("\ndef drain_node(")[0].rpartition("@cli.command")[2]
    assert len(words) == 3
    assert all(f'"{word}"' in known for word in words)
    seconds = [int(found) for found in re.findall(r"\d+", shell)]
    assert 60 <= seconds[-1] < seconds[0] < worker["terminationGracePeriodSeconds"]


def test_flags_exist() -> None:
    """Of `ray start` and `mlflow server`, wherever a launch file or the guide calls them."""
    from mlflow.cli import server

    # Read, not imported: Ray's command line brings Ray Serve with it.
    source = (Path(ray.__file__).parent / "scripts" / "scripts.py").read_text(encoding="utf-8")
    start = set(
        re.findall(r'"(--[a-z-]+)"', source.partition("\ndef start(")[0].rpartition("@cli.command")[2])
    )
    assert "--head" in start
    assert "--follow" not in start
    guide = (CLUSTER / "README.md").read_text(encoding="utf-8")
    ray_lines = [
        line
        for name in VM
        for key in ("head_start_ray_commands", "worker_start_ray_commands")
        for line in launch_file(name)[key]
        if "ray start" in line
    ]
    cluster = manifests("kuberay")["RayCluster"]["spec"]
    params = [group["rayStartParams"] for group in (cluster["headGroupSpec"], *cluster["workerGroupSpecs"])]
    ray_flags = {f for line in ray_lines for f in re.findall(r"--[a-z-]+", line.split("ray start")[1])}
    ray_flags |= {f"--{name}" for group in params for name in group}
    (container,) = manifests("mlflow")["Deployment"]["spec"]["template"]["spec"]["containers"]
    told = re.search(r"mlflow server((?:.*\\\n)*.*)", guide)
    assert told is not None
    mlflow_flags = set(re.findall(r"--[a-z-]+", " ".join(container["command"] + container["args"]) + told[1]))
    for flags, known in (
        (ray_flags, start),
        (mlflow_flags, {option for parameter in server.params for option in parameter.opts}),
    ):
        assert len(flags) > 3
        assert flags <= known, flags - known


def test_one_version_of_ray_and_one_image() -> None:
    printed = subprocess.run(
        [sys.executable, CLUSTER / "requirements.py", "s3", "gcs"], capture_output=True, text=True, check=True
    ).stdout.splitlines()
    needed = {item.name: item for item in map(Requirement, printed)}
    assert {"torch", "mlflow", "s3fs", "gcsfs"} <= needed.keys()
    docker = (CLUSTER / "Dockerfile").read_text(encoding="utf-8")
    base = re.search(r"^FROM rayproject/ray:([\d.]+)-py311-gpu$", docker, re.MULTILINE)
    assert base is not None
    version = manifests("kuberay")["RayCluster"]["spec"]["rayVersion"]
    assert base[1] == version
    assert Version(version) in needed["ray"].specifier
    texts = [
        (CLUSTER / f"{name}.yaml").read_text(encoding="utf-8") for name in ("aws", "gcp", "kuberay", "mlflow")
    ]
    images = {image for text in [*texts, docker] for image in re.findall(r"ghcr\.io/\S+", text)}
    assert len(images) == 1  # the same everywhere, and pinned
    assert re.fullmatch(r"\S+:\d+\.\d+\.\d+", images.pop())


def test_code_travels_and_data_stays(tmp_path: Path) -> None:
    """What `ray job submit --working-dir .` packs, by Ray's own packing."""
    from ray._private.ray_constants import get_runtime_env_default_excludes
    from ray._private.runtime_env.packaging import create_package

    tree = tmp_path / "tree"
    stay = (
        ".git/HEAD",
        ".venv/bin/python",
        "runs/a/model.safetensors",
        "my_texts/a.txt",
        "data.parquet",
        "mlflow.db",
    )
    stay += (
        "docs/a.png",
        "tests/data/a.safetensors",
        "weights/pgm.ckpt",
        "pipeline/__pycache__/a.pyc",
        ".env",
    )
    travel = (
        "pipeline/data/text.py",
        "jobs/pretrain.py",
        "configs/text/mine.yaml",
        "mine.yaml",
        "pyproject.toml",
    )
    for name in (*stay, *travel):
        (tree / name).parent.mkdir(parents=True, exist_ok=True)
        (tree / name).write_text("x")
    for name in (".rayignore", ".gitignore"):
        (tree / name).write_bytes((ROOT / name).read_bytes())
    package = tmp_path / "package.zip"
    create_package(str(tree), package, include_gitignore=True, excludes=get_runtime_env_default_excludes())
    packed = {name for name in zipfile.ZipFile(package).namelist() if not name.endswith("/")}
    assert packed == set(travel)
