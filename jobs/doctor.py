"""`unlearn doctor`: what a user of a cluster can get wrong, checked before a sweep; each line says what to do."""

from __future__ import annotations

import json
import os
import platform
import shutil
import stat
import subprocess
import sys
import time
import urllib.error
import urllib.request
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from importlib.metadata import version
from pathlib import Path
from typing import Any, Literal

import typer
from rich.markup import escape
from rich.table import Table

from jobs.progress import console
from jobs.session import Options, load_plugins, open_store
from orchestrator import nodes, tracking
from orchestrator.cluster import ray_cluster, wants_token
from orchestrator.contact import redacted
from orchestrator.nodes import NoAnswerError, Node
from orchestrator.registry import InputError, Plugin, load_plugin
from orchestrator.store import StorageError, Store

State = Literal["ok", "warning", "failed"]
_COLOURS = {"ok": "green", "warning": "yellow", "failed": "red"}
_LEAST_DISK = 10 * 2**30  # bytes free, below which a node gets a warning
_FULL = 0.95  # share of a disk from which on Ray keeps nothing more on it
_LEAST_OBJECTS = 512 * 2**20  # bytes of an object store that hold the usual data sets
_BRIEF = 15.0  # seconds for which a storage that is away is waited for
_MOST_SKEW = 5.0  # seconds between two clocks
_SEEN_BY_TORCH = """
import json, torch
count = torch.cuda.device_count() if torch.cuda.is_available() else 0
for device in range(count):
    torch.ones(8, device=f"cuda:{device}").sum().item()
print(json.dumps([torch.cuda.get_device_name(device) for device in range(count)]))
"""


@dataclass(frozen=True)
class Finding:
    """One line: what was checked, where, how it stands, and what to do about it."""

    check: str
    where: str
    state: State
    said: str
    remedy: str = ""


@dataclass(frozen=True)
class Machine:
    """What a node says of itself."""

    python: str
    ray: str
    torch: str
    gpus: list[str] | str  # names of those that compute; or why torch could not be asked
    has_nvidia: bool
    disk_free: int
    disk_total: int
    shm_total: int
    storage: str | None  # why not, or empty; None where there is none to look at
    plugins: str  # why not, or empty


def run(options: Options) -> None:
    """Print the findings; exit 1 if something failed. Of a dashboard's address: also as a job on that cluster."""
    address = options.address or os.environ.get("RAY_ADDRESS") or ""
    if address.startswith(("http://", "https://")):
        show(list(_dashboard(address)))
        _as_a_job(options, address)
    else:
        show(list(_cluster(options, address)))


def show(findings: Sequence[Finding]) -> None:
    """Print a table, plain lines when piped; raise Exit(1) if something failed."""
    if console.is_terminal:
        table = Table("check", "where", "", "what", "what to do")
        for f in findings:
            table.add_row(f.check, f.where, f"[{_COLOURS[f.state]}]{f.state}[/]", escape(f.said), escape(f.remedy))
        console.print(table)
    else:
        for f in findings:
            done = f"; {f.remedy}" if f.remedy else ""
            console.print(f"{f.state:<8}{f.check:<10}{f.where}: {f.said}{done}", highlight=False, markup=False)
    counts = {state: sum(f.state == state for f in findings) for state in _COLOURS}
    console.print(", ".join(f"{number} {state}" for state, number in counts.items()), highlight=False)
    if counts["failed"]:
        raise typer.Exit(1)


def _as_a_job(options: Options, address: str) -> None:
    """The same command on the cluster, where nodes, storage and MLflow are those that a sweep would meet."""
    from jobs import submit

    words = ["doctor", "--storage", options.storage]
    words += ["--tracking-uri", options.tracking_uri] if options.tracking_uri else []
    for plugin in options.plugins:
        words += ["--plugin", plugin]
    submit.run(words, address, None, wait=True)


def _token() -> tuple[str, str]:
    """The token that Ray would use, and where it is from; both empty for none."""
    if os.environ.get("RAY_AUTH_TOKEN"):
        return os.environ["RAY_AUTH_TOKEN"], "RAY_AUTH_TOKEN"
    path = Path(os.environ.get("RAY_AUTH_TOKEN_PATH") or "~/.ray/auth_token").expanduser()
    return (path.read_text().strip(), str(path)) if path.is_file() else ("", "")


def _authentication(mode: str) -> Finding:
    """What may be said of the token on this machine."""
    token, source = _token()
    where = "here"
    if not token:
        return Finding("token", where, "warning", "there is none", f"`ray get-auth-token --generate`; {mode}")
    if source != "RAY_AUTH_TOKEN" and os.name == "posix" and stat.S_IMODE(os.stat(source).st_mode) & 0o077:
        return Finding("token", where, "warning", f"others on this machine can read {source}", f"chmod 600 {source}")
    return Finding("token", where, "ok", f"from {source}")


def _dashboard(address: str) -> Iterator[Finding]:
    """Address, token and version of a cluster, as far as its dashboard can be asked."""
    yield _authentication("give every node the same one, and RAY_AUTH_MODE=token")
    status, body = _asked(address, "")
    if status == 200:
        remedy = "start Ray with RAY_AUTH_MODE=token"
        yield Finding("token", address, "warning", "whoever reaches this port can run code there", remedy)
    elif status in (401, 403):
        status, body = _asked(address, _token()[0])
        if status == 200:
            yield Finding("token", address, "ok", "the cluster asks for one and takes ours")
        else:
            remedy = "put the cluster's token into ~/.ray/auth_token or RAY_AUTH_TOKEN"
            yield Finding("token", address, "failed", f"the cluster does not take ours: {body}", remedy)
    else:
        remedy = "forward the port (`kubectl port-forward`, `ray dashboard`), or mend --address"
        yield Finding("dashboard", address, "failed", body, remedy)
    if status == 200:
        yield _versions(address, str(json.loads(body)["ray_version"]), version("ray"))


def _versions(address: str, theirs: str, ours: str) -> Finding:
    said = f"Ray {theirs} there, {ours} here"
    if theirs == ours:
        return Finding("ray", address, "ok", said)
    state: State = "warning" if theirs.split(".")[:2] == ours.split(".")[:2] else "failed"
    return Finding("ray", address, state, said, f"install ray=={theirs} here, or an image with Ray {ours} there")


def _asked(address: str, token: str) -> tuple[int, str]:
    """Status and body of the dashboard's answer to the question for its version; 0 and the reason for none."""
    headers = {"Authorization": f"Bearer {token}"} if token else {}
    try:
        request = urllib.request.Request(f"{address.rstrip('/')}/api/version", headers=headers)
        with urllib.request.urlopen(request, timeout=10) as answer:
            return int(answer.status), answer.read().decode()
    except urllib.error.HTTPError as error:
        return error.code, f"HTTP {error.code} {error.reason}"
    except (OSError, ValueError) as error:
        return 0, str(getattr(error, "reason", error))


def _cluster(options: Options, address: str) -> Iterator[Finding]:
    """Everything that a command here would meet: the cluster's nodes, or a Ray of our own on this machine."""
    place = address or "this machine"
    if address and wants_token(address) is False:
        remedy = "start Ray with RAY_AUTH_MODE=token on every node"
        yield Finding("token", address, "warning", "whoever reaches these ports can run code there", remedy)
    elif address:
        yield _authentication("give every node the same one, and RAY_AUTH_MODE=token")
    try:
        plugins = load_plugins(options.plugins)
        yield from [Finding("plugin", "here", "ok", name) for name in options.plugins]
    except InputError as error:
        plugins = ()
        yield Finding("plugin", "here", "failed", str(error), "mend the module")
    store = None
    try:
        store = open_store(options.storage, patience_seconds=_BRIEF)
        yield Finding("storage", "here", "ok", f"{store.root} can be written and read")
    except (InputError, StorageError) as error:
        yield Finding("storage", "here", "failed", str(error))
    try:
        with ray_cluster(address=options.address, workers=None if address else 1):
            found = nodes.alive()
            yield Finding(
                "ray",
                place,
                "ok",
                f"{len(found)} nodes with Ray {version('ray')} and Python {platform.python_version()}",
            )
            yield from examined(found, store, plugins)
    except InputError as error:
        yield Finding("ray", place, "failed", str(error))
    if store is not None:
        yield _mlflow(store, options.tracking_uri)


def _mlflow(store: Store, given: str | None) -> Finding:
    """Whether the driver, which alone writes to MLflow, can do so, artifacts included."""
    uri = tracking.tracking_uri(store, given)
    if uri is None:
        remedy = "" if given == "none" else "give --tracking-uri, or run `unlearn track` later"
        return Finding("mlflow", "here", "ok" if given == "none" else "warning", "nothing is tracked", remedy)
    try:
        tracking.probe(uri, store)
    except InputError as error:
        return Finding("mlflow", "here", "failed", str(error))
    return Finding("mlflow", "here", "ok", f"a run and an artifact can be written to {redacted(uri)}")


def examined(found: Sequence[Node], store: Store | None, plugins: tuple[Plugin, ...]) -> Iterator[Finding]:
    """What every node says, asked at the same time."""
    marker = f"{nodes.FOLDER}/doctor-{os.getpid()}-{time.time_ns()}"
    if store is not None:
        store.put(marker, b"driver")
    try:
        answers = nodes.on_each(found, examine, store, marker, plugins)
        for node, answer, skew in zip(found, answers, _skews(found), strict=True):
            if isinstance(answer, NoAnswerError):
                yield Finding("node", node.name, "failed", str(answer), "look at the node's logs, or remove it")
            elif isinstance(answer, Exception):
                remedy = "install the project there, or send it along with `unlearn submit`"
                yield Finding("node", node.name, "failed", f"{type(answer).__name__}: {nodes.reason(answer)}", remedy)
            else:
                yield from judged(node, answer, skew)
    finally:
        if store is not None:
            store.delete(marker)


def examine(store: Store | None, marker: str, plugins: tuple[Plugin, ...]) -> Machine:
    """Look at the machine that this runs on."""
    import ray

    storage, broken = None if store is None else "", ""
    if store is not None:
        try:
            store.delete(nodes.answer_marker(store, marker))
        except Exception as error:  # each is a finding
            storage = f"{type(error).__name__}: {nodes.reason(error)}"
    try:
        for plugin in plugins:
            load_plugin(plugin)
    except InputError as error:
        broken = str(error)
    has_nvidia = Path("/dev/nvidiactl").exists()
    try:
        torch = version("torch")
    except ImportError:
        torch = "none"
    here: Any = ray._private.worker.global_worker.node
    disk = shutil.disk_usage(here.get_session_dir_path())
    shm = shutil.disk_usage("/dev/shm").total if os.path.isdir("/dev/shm") else 0
    gpus = seen_by_torch() if has_nvidia else []
    return Machine(
        platform.python_version(), ray.__version__, torch, gpus, has_nvidia, disk.free, disk.total, shm, storage, broken
    )


def seen_by_torch() -> list[str] | str:
    """The GPUs on which torch computes, in a process to which Ray has not hidden any; else why there are none."""
    environment = {name: value for name, value in os.environ.items() if name != "CUDA_VISIBLE_DEVICES"}
    done = subprocess.run(
        [sys.executable, "-c", _SEEN_BY_TORCH], env=environment, capture_output=True, text=True, timeout=100
    )
    if done.returncode:
        return (done.stderr.strip().splitlines() or ["no reason given"])[-1]
    names: list[str] = json.loads(done.stdout)
    return names


def judged(node: Node, machine: Machine, skew: float | None) -> Iterator[Finding]:
    """The findings on one node."""
    name = node.name
    if machine.storage:
        remedy = "give --storage a folder that all nodes share, or s3:// with credentials on every node"
        yield Finding("storage", name, "failed", machine.storage, remedy)
    elif machine.storage is not None:
        yield Finding("storage", name, "ok", "sees the driver's root and can write to it")
    if machine.plugins:
        yield Finding("plugin", name, "failed", machine.plugins, "install there what the plugin imports")
    ours = version("torch")
    if machine.torch == ours:
        yield Finding("torch", name, "ok", f"torch {ours}, Python {machine.python}")
    else:
        yield Finding(
            "torch",
            name,
            "failed" if machine.torch == "none" else "warning",
            f"torch {machine.torch} there, {ours} here",
            "use one image on all nodes: results are equal only under one torch",
        )
    yield _gpus(node, machine)
    yield _disk(name, machine)
    yield _objects(node, machine)
    if skew is not None and skew > _MOST_SKEW:
        yield Finding(
            "clock", name, "warning", f"{skew:.0f} s from the driver's", "run a time service (chrony) on all nodes"
        )


def _gpus(node: Node, machine: Machine) -> Finding:
    """Ray's count of GPUs held against torch's."""
    counted = int(node.resources.get("GPU", 0))
    if isinstance(machine.gpus, str):
        return Finding(
            "gpus",
            node.name,
            "failed",
            f"Ray counts {counted}, torch fails: {machine.gpus}",
            "match the driver and torch's CUDA",
        )
    said = f"Ray counts {counted}, torch computes on {len(machine.gpus)}"
    said += f" ({', '.join(sorted(set(machine.gpus)))})" if machine.gpus else ""
    if counted > len(machine.gpus):
        remedy = "install the NVIDIA driver and a torch with CUDA there, or start Ray with the right --num-gpus"
        return Finding("gpus", node.name, "failed", said, remedy)
    if counted < len(machine.gpus):
        return Finding(
            "gpus", node.name, "warning", said, "start Ray there with --num-gpus, or ask for nvidia.com/gpu in limits"
        )
    return Finding("gpus", node.name, "ok", said if counted or machine.has_nvidia else "none")


def _disk(name: str, machine: Machine) -> Finding:
    free = f"{machine.disk_free / 2**30:.0f} GiB of {machine.disk_total / 2**30:.0f} free for Ray"
    if machine.disk_free < (1 - _FULL) * machine.disk_total:
        return Finding("disk", name, "failed", free, f"make room: beyond {_FULL:.0%} Ray keeps nothing more on it")
    if machine.disk_free < _LEAST_DISK:
        return Finding("disk", name, "warning", free, f"{_LEAST_DISK / 2**30:.0f} GiB spare a week of logs and results")
    return Finding("disk", name, "ok", free)


def _objects(node: Node, machine: Machine) -> Finding:
    """Room for the data set, which lives once on every node."""
    room = node.resources.get("object_store_memory", 0.0)
    said = f"{room / 2**20:.0f} MiB for objects, /dev/shm has {machine.shm_total / 2**20:.0f}"
    if machine.shm_total and room > machine.shm_total:
        return Finding(
            "objects", node.name, "warning", said, "enlarge /dev/shm (Kubernetes: an emptyDir of medium Memory)"
        )
    if room < _LEAST_OBJECTS and node.cores:
        return Finding("objects", node.name, "warning", said, "start Ray there with a larger --object-store-memory")
    return Finding("objects", node.name, "ok", said)


def _skews(found: Sequence[Node]) -> list[float | None]:
    """Seconds by which each node's clock is off, beyond what the way there and back can explain; None for no answer."""
    skews: list[float | None] = []
    for node in found:
        before = time.time()
        (answer,) = nodes.on_each([node], _clock, seconds=10)
        after = time.time()
        off = None if isinstance(answer, Exception) else max(0.0, before - answer, answer - after)
        skews.append(off)
    return skews


def _clock() -> float:
    return time.time()
