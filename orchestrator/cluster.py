"""Ray: starting one of our own or joining a cluster's, and leaving it; how many workers it has room for."""

from __future__ import annotations

import contextlib
import gc
import logging
import os
import re
import secrets
import shutil
import socket
import tempfile
from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from orchestrator.registry import InputError

_KNOCK_SECONDS = 5  # for a cluster to take a connection; Ray itself tries for minutes
_SHORT = "/tmp" if os.path.isdir("/tmp") else None  # Ray's sockets allow paths of about a hundred characters

ENVIRONMENT = {
    "RAY_USAGE_STATS_ENABLED": "0",
    "RAY_ENABLE_UV_RUN_RUNTIME_ENV": "0",  # `uv run` would ship the repository and resolve it anew on workers
    "RAY_ACCEL_ENV_VAR_OVERRIDE_ON_ZERO": "0",
    "RAY_TRAIN_ENABLE_V2_MIGRATION_WARNINGS": "0",
}
WORKER_ENVIRONMENT = {"OMP_NUM_THREADS": "1", "MKL_NUM_THREADS": "1"}


@dataclass(frozen=True)
class Cluster:
    """How many workers to use, each one core (and a share of a GPU)."""

    workers: int
    gpus_per_worker: float


@contextlib.contextmanager
def ray_cluster(
    *, address: str | None = None, workers: int | None = None, gpus_per_worker: float = 0.0
) -> Iterator[Cluster]:
    """Connect to the Ray at `address` (or of the job around us), else start a local one, and leave it at the end.

    `workers` defaults to what the cluster's cores and GPUs allow. Raises InputError where no Ray answers, or where
    the cluster can hold no worker.
    """
    target = address or os.environ.get("RAY_ADDRESS")
    prepare_ray(is_client=target is not None, wants_token=wants_token(target) if target else None)
    import ray

    scratch, environment = None, {"env_vars": WORKER_ENVIRONMENT}
    quiet: dict[str, Any] = {"logging_level": logging.ERROR, "log_to_driver": False, "runtime_env": environment}
    try:
        if target:
            _knock(target)
            ray.init(address=target, **quiet)
        else:
            scratch = tempfile.mkdtemp(prefix="ray-", dir=_SHORT)
            ray.init(
                num_cpus=workers or _num_cores(),
                include_dashboard=False,
                _temp_dir=scratch,
                object_store_memory=_store_bytes(),
                **quiet,
            )
    except Exception as error:  # Ray raises bare ones, too, where it does not start in time
        ray.shutdown()  # which ends what had started
        if scratch is not None:
            shutil.rmtree(scratch, ignore_errors=True)
        raise InputError(_refusal(target, str(error).strip() or type(error).__name__)) from None
    try:
        yield sized(workers, gpus_per_worker, can_grow=target is not None)
    finally:
        _leave()
        if scratch is not None:
            shutil.rmtree(scratch, ignore_errors=True)


def _leave() -> None:
    """Shut Ray down, with nothing of its own left to be collected meanwhile.

    A thread that collects garbage while Ray ends, and meets a reference to one of Ray's objects, ends the process.
    """
    import ray

    gc.collect()
    was_enabled = gc.isenabled()
    gc.disable()
    try:
        ray.shutdown()
    finally:
        if was_enabled:
            gc.enable()


def prepare_ray(*, is_client: bool, wants_token: bool | None = None) -> None:
    """Set Ray's environment, before it is imported.

    A client of a cluster uses a token at hand, which Ray by default leaves aside. A Ray of our own has a token for its
    life, since one in the home folder, where Ray looks, may be changed while it runs.
    Where the cluster is known to want none, neither do we: calls back to a driver that wants one are refused, and all
    that the cluster says of it is that workers cannot start. Raises InputError where RAY_AUTH_MODE insists on tokens.
    """
    os.environ.update({name: value for name, value in ENVIRONMENT.items() if name not in os.environ})
    places = [os.environ.get("RAY_AUTH_TOKEN_PATH"), "~/.ray/auth_token"]
    has_token = "RAY_AUTH_TOKEN" in os.environ or any(Path(p).expanduser().is_file() for p in places if p)
    if wants_token is False and os.environ.get("RAY_AUTH_MODE") == "token":
        raise InputError(
            "RAY_AUTH_MODE is token, and the cluster was started without; unset it here, or start the cluster with it"
        )
    if is_client and has_token and wants_token is not False and "RAY_AUTH_MODE" not in os.environ:
        os.environ["RAY_AUTH_MODE"] = "token"
    if not is_client and not any(name.startswith("RAY_AUTH_") for name in os.environ):
        os.environ.update(RAY_AUTH_MODE="token", RAY_AUTH_TOKEN=secrets.token_hex(32))


def wants_token(address: str) -> bool | None:
    """Whether the cluster at a `host:port` refuses calls without a token; None where that cannot be asked."""
    import grpc

    if not re.fullmatch(r"[^/]+:\d+", address):
        return None
    with grpc.insecure_channel(address) as channel:
        try:
            channel.unary_unary("/ray.rpc.NodeInfoGcsService/CheckAlive")(b"", timeout=_KNOCK_SECONDS)
        except grpc.RpcError as error:
            return True if error.code() == grpc.StatusCode.UNAUTHENTICATED else None
    return False


def _knock(address: str) -> None:
    """Raise OSError where nobody listens at a cluster's `host:port`; other forms of address are Ray's to judge."""
    host, colon, port = address.removeprefix("ray://").partition("/")[0].rpartition(":")
    if colon and port.isdigit():
        socket.create_connection((host.strip("[]"), int(port)), timeout=_KNOCK_SECONDS).close()


def _refusal(place: str | None, said: str) -> str:
    """Why there is no Ray at a place, or none of our own where that is None, and what to do."""
    versions = re.findall(r"(?:Ray|Python): (\S+)", said)
    if said.startswith("Version mismatch") and len(versions) == 4:
        theirs, ours = " and Python ".join(versions[:2]), " and Python ".join(versions[2:])
        return (
            f"the cluster at {place} runs Ray {theirs}, this process Ray {ours}, and they must be equal; run this in "
            "the cluster's image, or use `unlearn submit`, whose command runs there"
        )
    reason = said.split("\n", 1)[0].rstrip(".")
    if place is None:
        return (
            f"Ray did not start on this machine: {reason}; it needs half a minute at most, and room in memory "
            f"and in {_SHORT or tempfile.gettempdir()}: end what keeps the machine busy, or give fewer --workers, and "
            "give the same command again"
        )
    return (
        f"no Ray cluster at {place}: {reason}; start one with `ray start --head`, "
        "or leave --address out to use this machine"
    )


def sized(workers: int | None, gpus_per_worker: float, *, can_grow: bool = False) -> Cluster:
    """The Ray that we are connected to, with as many workers as asked for and as it can hold; InputError for none.

    One that `can_grow` gets all that are asked for: those without a place wait, and an autoscaler adds nodes for them.
    """
    import ray

    if can_grow and workers is not None:
        return Cluster(workers, gpus_per_worker)
    return fitting(ray.cluster_resources(), workers, gpus_per_worker)  # type: ignore[no-untyped-call]


def fitting(resources: Mapping[str, float], workers: int | None, gpus_per_worker: float) -> Cluster:
    """As many workers as asked for and as the resources hold; InputError for none."""
    room = int(resources.get("CPU", 0))
    if gpus_per_worker > 0:
        room = min(room, int(resources.get("GPU", 0) / gpus_per_worker + 1e-9))
    if room < 1:
        raise InputError(
            f"the cluster has {resources.get('CPU', 0):g} cores and {resources.get('GPU', 0):g} GPUs; "
            f"a worker takes 1 core and {gpus_per_worker:g} GPUs: change --gpus-per-worker, add nodes, "
            "or say --workers where an autoscaler adds them"
        )
    return Cluster(min(workers or room, room), gpus_per_worker)


def _num_cores() -> int:
    """The cores that this process may use, which on a shared machine are fewer than it has."""
    return len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count() or 1


def _store_bytes() -> int:
    """Shared memory for a local object store: half of what is free, between 80 MB and 2 GB."""
    free = 2**31
    with contextlib.suppress(OSError, AttributeError):
        stat = os.statvfs("/dev/shm")
        free = stat.f_bavail * stat.f_frsize // 2
    return max(80 * 2**20, min(2**31, free))
