"""The cluster files: what Ray's launcher, KubeRay's operator or MLflow's server would refuse, we refuse here."""

from __future__ import annotations

import copy
import os
import re
import shutil
import subprocess
import sys
import tomllib
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pytest
import yaml

from orchestrator.cluster import prepare_ray

ROOT = Path(__file__).parent.parent
CLUSTERS = ROOT / "clusters"
LAUNCHER = ["aws.yaml", "on-premises.yaml"]
KUBERAY = ["raycluster.yaml", "rayjob.yaml"]
README = (ROOT / "README.md").read_text()
PROJECT = tomllib.loads((ROOT / "pyproject.toml").read_text())
PINS = dict(line.split("==") for line in (ROOT / "constraints.txt").read_text().splitlines())

Document = dict[str, Any]

# KubeRay v1.7, ray-operator/apis/ray/v1 and controllers/ray/utils/validation.go
CLUSTER_FIELDS = {"suspend", "managedBy", "autoscalerOptions", "headServiceAnnotations", "enableInTreeAutoscaling"}
CLUSTER_FIELDS |= {"gcsFaultToleranceOptions", "headGroupSpec", "rayVersion", "workerGroupSpecs", "authOptions"}
JOB_FIELDS = {"activeDeadlineSeconds", "backoffLimit", "rayClusterSpec", "submitterPodTemplate", "metadata", "suspend"}
JOB_FIELDS |= {"clusterSelector", "submitterConfig", "managedBy", "deletionStrategy", "entrypoint", "runtimeEnvYAML"}
JOB_FIELDS |= {"jobId", "submissionMode", "entrypointResources", "entrypointNumCpus", "entrypointNumGpus"}
JOB_FIELDS |= {"ttlSecondsAfterFinished", "shutdownAfterJobFinishes", "preRunningDeadlineSeconds"}
HEAD_FIELDS = {"template", "headService", "enableIngress", "resources", "labels", "rayStartParams", "serviceType"}
WORKER_FIELDS = {"groupName", "replicas", "minReplicas", "maxReplicas", "idleTimeoutSeconds", "numOfHosts", "priority"}
WORKER_FIELDS |= {"resources", "labels", "rayStartParams", "template", "scaleStrategy", "suspend"}
AUTOSCALER_FIELDS = {"resources", "image", "imagePullPolicy", "securityContext", "idleTimeoutSeconds", "upscalingMode"}
AUTOSCALER_FIELDS |= {"version", "env", "envFrom", "volumeMounts"}
IN_RESOURCES = {"num-cpus", "num-gpus", "memory", "resources"}


def cluster_faults(name: str, spec: Document) -> Iterator[str]:
    """What the operator, or a rule of ours for all clusters, has against a RayClusterSpec."""
    head, workers = spec["headGroupSpec"], spec["workerGroupSpecs"]
    groups = [("head", head), *[(group.get("groupName", "?"), group) for group in workers]]
    yield from (f"unknown field {field}" for field in set(spec) - CLUSTER_FIELDS)
    yield from (f"unknown field {field}" for field in set(head) - HEAD_FIELDS)
    yield from (f"unknown field {field}" for group in workers for field in set(group) - WORKER_FIELDS)
    options = spec.get("autoscalerOptions", {})
    yield from (f"unknown field {field}" for field in set(options) - AUTOSCALER_FIELDS)
    if options.get("version") not in (None, "v1", "v2"):
        yield "autoscaler version"
    if options.get("upscalingMode", "Default") not in ("Default", "Aggressive", "Conservative"):
        yield "upscaling mode"
    if spec.get("enableInTreeAutoscaling") and options.get("version") != "v2":
        yield "autoscaler v2 is not asked for"
    if spec.get("authOptions") != {"mode": "token"} or not re.fullmatch(r"\d+\.\d+\.\d+", str(spec.get("rayVersion"))):
        yield "token authentication needs the version of Ray"
    if head.get("rayStartParams", {}).get("num-cpus") != "0":
        yield "the head takes work"
    for group_name, group in groups:
        yield from group_faults(group_name, group, has_v2=options.get("version") == "v2")
    for group in workers:
        if not group["minReplicas"] == group["replicas"] == 0 < group["maxReplicas"]:
            yield "workers do not come from zero"


def group_faults(name: str, group: Document, *, has_v2: bool) -> Iterator[str]:
    start, pod = group.get("rayStartParams", {}), group["template"]["spec"]
    if not all(isinstance(value, str) for value in start.values()):
        yield f"{name}: rayStartParams are strings"
    if "labels" in start:
        yield f"{name}: labels belong beside rayStartParams"
    if IN_RESOURCES & set(start) and group.get("resources"):
        yield f"{name}: resources in two places"
    if has_v2 and pod.get("restartPolicy", "Never") != "Never":
        yield f"{name}: restartPolicy under autoscaler v2"
    if not pod.get("containers"):
        yield f"{name}: no container"
        return
    container = pod["containers"][0]
    limits, requests = container["resources"]["limits"], container["resources"].get("requests", {})
    if "nvidia.com/gpu" in requests and requests["nvidia.com/gpu"] != limits.get("nvidia.com/gpu"):
        yield f"{name}: GPUs are counted by their limit"
    if "nvidia.com/gpu" in limits and not any(t.get("key") == "nvidia.com/gpu" for t in pod.get("tolerations", [])):
        yield f"{name}: no toleration for GPU nodes"
    shared = [mount["name"] for mount in container.get("volumeMounts", []) if mount["mountPath"] == "/dev/shm"]
    in_memory = [v["name"] for v in pod.get("volumes", []) if v.get("emptyDir", {}).get("medium") == "Memory"]
    if not shared or shared[0] not in in_memory:
        yield f"{name}: /dev/shm is not in memory"
    if any(variable["name"] == "RAY_enable_autoscaler_v2" for variable in container.get("env", [])):
        yield f"{name}: autoscaler v2 is asked for twice"


def faults(document: Document) -> list[str]:
    """What is wrong with a RayCluster or RayJob."""
    name, spec, found = document["metadata"]["name"], document["spec"], []
    if document["apiVersion"] != "ray.io/v1" or document["kind"] not in ("RayCluster", "RayJob"):
        found.append("apiVersion or kind")
    if not re.fullmatch(r"[a-z]([-a-z0-9]*[a-z0-9])?", name) or len(name) > (
        47 if document["kind"] == "RayJob" else 50
    ):
        found.append("name")
    if document["kind"] == "RayCluster":
        return found + list(cluster_faults(name, spec))
    found += [f"unknown field {field}" for field in set(spec) - JOB_FIELDS]
    if ("rayClusterSpec" in spec) == ("clusterSelector" in spec):
        found.append("one of rayClusterSpec and clusterSelector")
    shuts = spec.get("shutdownAfterJobFinishes", False)
    if (spec.get("suspend") or spec.get("ttlSecondsAfterFinished")) and not shuts:
        found.append("suspend and ttlSecondsAfterFinished need shutdownAfterJobFinishes")
    if "deletionStrategy" in spec and (shuts or spec.get("ttlSecondsAfterFinished")):
        found.append("deletionStrategy beside shutdownAfterJobFinishes")
    mode = spec.get("submissionMode", "K8sJobMode")
    if mode not in ("K8sJobMode", "HTTPMode", "InteractiveMode", "SidecarMode"):
        found.append("submissionMode")
    if spec.get("backoffLimit") and ("clusterSelector" in spec or mode == "InteractiveMode"):
        found.append("backoffLimit without a cluster of its own")
    if mode == "SidecarMode" and {"clusterSelector", "submitterPodTemplate", "submitterConfig"} & set(spec):
        found.append("SidecarMode")
    if "rayClusterSpec" in spec:
        found += cluster_faults(name, spec["rayClusterSpec"])
    return found


def load(name: str) -> list[Document]:
    return list(yaml.safe_load_all((CLUSTERS / name).read_text()))


def cluster_of(document: Document) -> Document:
    spec: Document = document["spec"]
    return spec.get("rayClusterSpec", spec)


def test_every_file_is_looked_at_here() -> None:
    assert sorted(path.name for path in CLUSTERS.glob("*.yaml")) == sorted([*LAUNCHER, *KUBERAY, "mlflow.yaml"])
    assert not [path for path in ROOT.glob("[!.]*/**/*.y*ml") if path.parent != CLUSTERS], (
        "the only YAML in the project"
    )


@pytest.mark.parametrize("name", LAUNCHER)
def test_a_launcher_file_fits_rays_schema(name: str) -> None:
    prepare_ray(is_client=True)
    from ray.autoscaler._private.util import prepare_config, validate_config

    (config,) = load(name)
    validate_config(prepare_config(copy.deepcopy(config)))
    for broken in ({**config, "worker_nodes": {}}, {key: config[key] for key in config if key != "provider"}):
        with pytest.raises(Exception, match=r"worker_nodes|provider"):
            validate_config(broken)


def test_on_aws_workers_with_gpus_are_spot_from_zero_and_the_head_does_no_work() -> None:
    (config,) = load("aws.yaml")
    types = config["available_node_types"]
    head, worker = types.pop(config["head_node_type"]), *types.values()
    assert head["resources"] == {"CPU": 0}
    assert "InstanceMarketOptions" not in head["node_config"], "a head on spot takes the cluster with it"
    assert worker["min_workers"] == 0 < worker["max_workers"] <= config["max_workers"]
    assert worker["node_config"]["InstanceMarketOptions"] == {"MarketType": "spot"}
    for node in (head, worker):  # S3 without a key: by the machine's own role
        assert node["node_config"]["IamInstanceProfile"]["Name"] in README


@pytest.mark.parametrize("name", LAUNCHER)
def test_a_launched_ray_takes_the_token_that_every_node_is_given(name: str) -> None:
    (config,) = load(name)
    assert config["file_mounts"]["~/.ray/auth_token"] == "~/.ray/auth_token"
    starts = [
        line for role in ("head", "worker") for line in config[f"{role}_start_ray_commands"] if "ray start" in line
    ]
    assert len(starts) == 2
    assert all("RAY_AUTH_MODE=token ray start" in line and ".venv/bin/activate" in line for line in starts)


@pytest.mark.parametrize("name", KUBERAY)
def test_a_kuberay_file_breaks_none_of_the_operators_rules(name: str) -> None:
    (document,) = load(name)
    assert faults(document) == []


def worker(document: Document) -> Document:
    group: Document = cluster_of(document)["workerGroupSpecs"][0]
    return group


def pod(document: Document) -> Document:
    spec: Document = worker(document)["template"]["spec"]
    return spec


BREAKS: list[tuple[str, Callable[[Document], object]]] = [
    ("apiVersion", lambda d: d.update(apiVersion="ray.io/v1alpha1")),
    ("name", lambda d: d["metadata"].update(name="Unlearn_1")),
    ("unknown field upgradeStrategy", lambda d: cluster_of(d).update(upgradeStrategy={"type": "None"})),
    ("unknown field maxReplica", lambda d: worker(d).update(maxReplica=3)),
    ("unknown field idleTimeout", lambda d: cluster_of(d)["autoscalerOptions"].update(idleTimeout=3)),
    ("upscaling mode", lambda d: cluster_of(d)["autoscalerOptions"].update(upscalingMode="Fast")),
    ("autoscaler v2", lambda d: cluster_of(d)["autoscalerOptions"].update(version="v1")),
    ("version of Ray", lambda d: cluster_of(d).pop("rayVersion")),
    ("the head takes work", lambda d: cluster_of(d)["headGroupSpec"].update(rayStartParams={})),
    ("strings", lambda d: worker(d)["rayStartParams"].update({"num-gpus": 1})),
    ("labels", lambda d: worker(d)["rayStartParams"].update(labels="a=b")),
    ("two places", lambda d: worker(d).update(resources={"GPU": "1"}, rayStartParams={"num-gpus": "1"})),
    ("from zero", lambda d: worker(d).update(minReplicas=1)),
    ("restartPolicy", lambda d: pod(d).update(restartPolicy="Always")),
    ("no container", lambda d: pod(d).update(containers=[])),
    ("no toleration", lambda d: pod(d).update(tolerations=[])),
    ("/dev/shm", lambda d: pod(d).update(volumes=[{"name": "shared-memory", "emptyDir": {}}])),
    ("by their limit", lambda d: pod(d)["containers"][0]["resources"].update(requests={"nvidia.com/gpu": "2"})),
    ("twice", lambda d: pod(d)["containers"][0]["env"].append({"name": "RAY_enable_autoscaler_v2", "value": "1"})),
]
JOB_BREAKS: list[tuple[str, Callable[[Document], object]]] = [
    ("one of", lambda d: d["spec"].update(clusterSelector={"ray.io/cluster": "unlearn"})),
    ("one of", lambda d: d["spec"].pop("rayClusterSpec")),
    ("need shutdown", lambda d: d["spec"].update(shutdownAfterJobFinishes=False)),
    ("deletionStrategy", lambda d: d["spec"].update(deletionStrategy={"deletionRules": []})),
    ("backoffLimit", lambda d: d["spec"].update(submissionMode="InteractiveMode")),
    ("SidecarMode", lambda d: d["spec"].update(submissionMode="SidecarMode", submitterConfig={"backoffLimit": 1})),
    ("submissionMode", lambda d: d["spec"].update(submissionMode="Sidecar")),
]


@pytest.mark.parametrize(
    ("name", "rule", "spoil"),
    [*[(name, *case) for name in KUBERAY for case in BREAKS], *[("rayjob.yaml", *case) for case in JOB_BREAKS]],
)
def test_each_of_those_rules_bites(name: str, rule: str, spoil: Callable[[Document], object]) -> None:
    (document,) = copy.deepcopy(load(name))
    spoil(document)
    found = faults(document)
    assert any(rule in fault for fault in found), found


def containers(part: Any) -> Iterator[Document]:
    """Every container in a document, wherever it is."""
    if isinstance(part, dict):
        yield from (container for container in part.get("containers", []))
        yield from (found for value in part.values() for found in containers(value))
    elif isinstance(part, list):
        yield from (found for value in part for found in containers(value))


ALL = [(name, container) for name in [*KUBERAY, "mlflow.yaml"] for container in containers(load(name))]


def test_one_ray_one_image_and_one_python_everywhere() -> None:
    ranges = [line for line in PROJECT["project"]["dependencies"] if line.startswith("ray[")]
    assert ranges == [f"ray[default,tune]=={PINS['ray'].rpartition('.')[0]}.*"]
    for name in KUBERAY:
        (document,) = load(name)
        assert cluster_of(document)["rayVersion"] == PINS["ray"]
    ours = f"REGISTRY/unlearn:{PROJECT['project']['version']}"
    images = {container["image"] for _, container in ALL if container["name"] != "postgres"}
    assert images == {ours}
    dockerfile = (CLUSTERS / "Dockerfile").read_text()
    python = PROJECT["tool"]["mypy"]["python_version"]
    assert f"\nFROM python:{python}-" in dockerfile
    assert PROJECT["project"]["requires-python"] == f">={python}"
    assert f"-t ${ours} " in README
    assert f"docker push ${ours}" in README
    assert "pip install --no-cache-dir -c constraints.txt '.[server]'" in dockerfile


def test_the_image_holds_what_its_dockerfile_copies_and_its_server_needs() -> None:
    dockerfile = (CLUSTERS / "Dockerfile").read_text()
    copied = [word for line in re.findall(r"^COPY (.*) \S+$", dockerfile, re.M) for word in line.split()]
    assert all((ROOT / word).exists() for word in copied)
    kept = re.findall(r"^!(\S+)$", (CLUSTERS / "Dockerfile.dockerignore").read_text(), re.M)
    assert sorted(kept) == sorted(copied)
    packages = [pattern.rstrip("*") for pattern in PROJECT["tool"]["setuptools"]["packages"]["find"]["include"]]
    assert set(packages) <= set(copied)
    server = PROJECT["project"]["optional-dependencies"]["server"]
    assert [re.split(r"[\[>]", line)[0] for line in server] == ["mlflow", "psycopg2-binary"]
    assert {"mlflow", "psycopg2-binary", "Flask-WTF", "boto3"} <= set(PINS)


def test_the_code_of_an_image_knows_the_commit_that_its_builder_named(tmp_path: Path) -> None:
    dockerfile = (CLUSTERS / "Dockerfile").read_text()
    place = re.search(r'echo "\$\{GIT_COMMIT\}" > (\S+)', dockerfile)
    assert place
    assert PROJECT["tool"]["setuptools"]["package-data"]["jobs"] == [Path(place[1]).name], (
        "it is installed with the code"
    )
    for package in ("jobs", "orchestrator"):
        shutil.copytree(ROOT / package, tmp_path / package, ignore=shutil.ignore_patterns("__pycache__"))
    (tmp_path / place[1]).write_text("0123abc-dirty\n")
    ask = [sys.executable, "-c", "from jobs.session import git_commit; print(git_commit())"]
    for given, expected in (("", "0123abc-dirty"), ("4567def", "4567def")):  # code that was submitted has its own
        environment = {**os.environ, "PYTHONPATH": str(tmp_path), "UNLEARN_GIT_COMMIT": given}
        said = subprocess.run(ask, cwd=tmp_path, env=environment, capture_output=True, text=True, check=True).stdout
        assert said.strip() == expected


def test_secrets_are_referred_to_and_the_readme_says_how_to_make_each_of_their_keys() -> None:
    wanted = set()
    for name, container in ALL:
        for variable in container.get("env", []):
            secret = variable.get("valueFrom", {}).get("secretKeyRef")
            looks_secret = re.search(r"PASSWORD|SECRET|TOKEN|ACCESS_KEY|USERNAME", variable["name"])
            assert not (looks_secret and not secret), f"{name} holds {variable['name']} itself"
            if secret:
                wanted.add((secret["name"], secret["key"]))
        assert not any(re.search(r"password|secret|://[^/]*:[^/]*@", word, re.I) for word in container.get("args", []))
    for secret, key in wanted:
        made = re.search(rf"create secret generic {secret} --from-env-file=/dev/stdin <<EOF\n((?:.*\n)*?)EOF\n", README)
        assert made, f"the README does not make the secret {secret}"
        assert re.search(rf"^{key}=", made[1], re.M), f"the README does not give {secret} its key {key}"
    assert len(wanted) >= 6


def server() -> Document:
    (container,) = [container for _, container in ALL if container["name"] == "mlflow"]
    return container


def test_the_mlflow_server_is_asked_for_what_it_knows_and_answers_to_its_service_name() -> None:
    from mlflow.cli import server as command
    from mlflow.server.security_utils import is_allowed_host_header

    given = dict(word.removeprefix("--").partition("=")[::2] for word in server()["args"])
    known = {option.removeprefix("--") for parameter in command.params for option in parameter.opts}
    assert set(given) <= known
    hosts = given["allowed-hosts"].split(",")
    service, namespace = load("mlflow.yaml")[0]["metadata"].values()
    port = load("mlflow.yaml")[0]["spec"]["ports"][0]["port"]
    for host in (
        service,
        f"{service}.{namespace}",
        f"{service}.{namespace}.svc",
        f"{service}.{namespace}.svc.cluster.local",
    ):
        assert is_allowed_host_header(hosts, host)
        assert is_allowed_host_header(hosts, f"{host}:{port}")
    assert is_allowed_host_header(hosts, "localhost:5000"), "through kubectl port-forward"
    assert not is_allowed_host_header(hosts, "elsewhere.example.com:5000")
    assert f"http://{service}:{port}" in load("rayjob.yaml")[0]["spec"]["entrypoint"]
    variables = {variable["name"]: variable.get("value") for variable in server()["env"]}
    assert variables["MLFLOW_SERVER_ENABLE_JOB_EXECUTION"] == "false"
    assert given["artifacts-destination"].startswith("s3://")
    assert "default-artifact-root" not in given, "artifacts go through the server"


def test_the_server_can_open_its_database_with_what_the_image_holds() -> None:
    """SQLAlchemy 2.1 takes another driver for a bare postgresql:// than the one that is pinned."""
    from sqlalchemy import create_engine
    from sqlalchemy.engine import make_url

    (uri,) = [v["value"] for v in server()["env"] if v["name"] == "MLFLOW_BACKEND_STORE_URI"]
    engine = create_engine(uri.replace("$(POSTGRES_PASSWORD)", "0a1b"))
    assert engine.dialect.driver == "psycopg2"
    postgres = next(container for _, container in ALL if container["name"] == "postgres")
    own = {variable["name"]: variable.get("value") for variable in postgres["env"]}
    url = make_url(uri)
    assert (url.username, url.database) == (own["POSTGRES_USER"], own["POSTGRES_DB"])
    assert url.host in [
        document["metadata"]["name"] for document in load("mlflow.yaml") if document["kind"] == "Service"
    ]


def test_constraints_are_exact_pins_and_nothing_else() -> None:
    for line in (ROOT / "constraints.txt").read_text().splitlines():
        assert re.fullmatch(r"[A-Za-z0-9_.\-]+==[A-Za-z0-9_.\-+!]+", line), line
