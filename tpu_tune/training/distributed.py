"""Several hosts as one run: finding them from the environment, joining them, and agreeing before what cannot be undone.

Every host runs the same command. On a TPU pod slice and under SLURM nothing has to be said; elsewhere three variables,
`JAX_COORDINATOR_ADDRESS=host:port JAX_NUM_PROCESSES=n JAX_PROCESS_ID=i`. A host that stays away is named after
`TPU_TUNE_BARRIER_SECONDS` (300). One that dies ends the others: at once where a transfer breaks, else after
`TPU_TUNE_HEARTBEAT_SECONDS` (100); the same command on all of them goes on from the last checkpoint.
"""

from __future__ import annotations

import contextlib
import dataclasses
import glob
import os
import re
import sys
import traceback
import urllib.error
import urllib.request
from collections.abc import Callable, Iterator, Mapping, Sequence
from typing import Any, TypeVar

import jax
import numpy as np
from jax.experimental import multihost_utils
from orbax.checkpoint import multihost

from tpu_tune.errors import UserError
from tpu_tune.training.roll_call import MissingProcesses, roll_call

T = TypeVar("T")

TPU_PORT = 8476
_METADATA = "http://metadata.google.internal/computeMetadata/v1/instance/attributes/"
_MESSAGE_BYTES = 1000


class MissingHosts(UserError):
    """Some hosts have not come, so this process ends without waiting for them."""


class SharedError(UserError):
    """A mistake that every process knows of: all end now, and jax can shut down as usual."""


@dataclasses.dataclass(frozen=True)
class Cluster:
    """The processes of a run.

    Attributes:
      kind: how the processes were found: tpu | slurm | multislice | address.
      coordinator: host:port of process 0; "" where jax is to find it itself (SLURM's steps, TPU multislice).
      num_processes: number of processes of the run.
      process_id: number of this process, from 0.
      hosts: host names or addresses by process, where they are known.
    """

    kind: str
    coordinator: str
    num_processes: int
    process_id: int
    hosts: tuple[str, ...] = ()

    def name(self, process: int) -> str:
        """Return a process as the user knows it: its number and its host."""
        host = f" ({self.hosts[process]})" if process < len(self.hosts) else ""
        return f"process {process}{host}"


_joined: Cluster | None = None  # jax's own state is a process-wide one too


def find_cluster(
    environ: Mapping[str, str] = os.environ,
    metadata: Callable[[str], str | None] | None = None,
    has_tpu: Callable[[], bool] | None = None,
) -> Cluster | None:
    """Find the hosts of this run; None where there is only this one.

    Looked at in this order: JAX_COORDINATOR_ADDRESS; a SLURM step of several tasks; TPU_WORKER_HOSTNAMES (GKE); a TPU
    VM's metadata. Google's libraries and jax read the same names.

    Args:
      environ: the environment.
      metadata: attribute -> its value on a Google VM, or None; asked on a machine with a TPU only.
      has_tpu: whether there is one.

    Raises:
      UserError: an address without the number of processes or of this one, or numbers that make no sense.
    """
    if environ.get("JAX_COORDINATOR_ADDRESS"):
        return _from_address(environ)
    tasks = environ.get("SLURM_NTASKS", "")
    if (
        tasks.isdigit()
        and int(tasks) > 1
        and {"SLURM_STEP_NODELIST", "SLURM_PROCID", "SLURM_LOCALID"} <= environ.keys()
    ):
        return Cluster("slurm", "", int(tasks), int(environ["SLURM_PROCID"]))
    if environ.get("MEGASCALE_COORDINATOR_ADDRESS"):
        return Cluster("multislice", "", 0, 0)  # jax adds up the slices
    if environ.get("TPU_WORKER_HOSTNAMES"):
        hosts, number = environ["TPU_WORKER_HOSTNAMES"], environ.get("TPU_WORKER_ID")
    elif environ.get("TPU_SKIP_MDS_QUERY") or not (has_tpu or _has_tpu)():
        return None
    else:
        ask = metadata or _metadata
        hosts, number = ask("worker-network-endpoints") or "", ask("agent-worker-number")
    # Google writes addresses alone, or name:number:address.
    names = tuple(entry.strip().rsplit(":", 1)[-1] for entry in hosts.split(",") if entry.strip())
    if len(names) < 2:
        return None
    if number is None or not number.strip().isdigit() or int(number) >= len(names):
        raise UserError(
            f"this TPU slice has {len(names)} hosts, and this one's number is not known ('{number or ''}'); "
            "set TPU_WORKER_ID"
        )
    return Cluster("tpu", f"{names[0]}:{TPU_PORT}", len(names), int(number), names)


def _from_address(environ: Mapping[str, str]) -> Cluster:
    address = environ["JAX_COORDINATOR_ADDRESS"]
    if not re.fullmatch(r".+:\d+", address):
        raise UserError(
            f"JAX_COORDINATOR_ADDRESS={address} has no port; write it as host:port, e.g. {address}:{TPU_PORT}"
        )
    numbers = []
    for name in ("JAX_NUM_PROCESSES", "JAX_PROCESS_ID"):
        value = environ.get(name, "")
        if not value.isdigit():
            raise UserError(
                f"JAX_COORDINATOR_ADDRESS is set, and {name} is '{value}'; set JAX_NUM_PROCESSES to the number of "
                "hosts and JAX_PROCESS_ID to this one's number, from 0"
            )
        numbers.append(int(value))
    if numbers[1] >= numbers[0]:
        raise UserError(f"JAX_PROCESS_ID={numbers[1]} must be below JAX_NUM_PROCESSES={numbers[0]}")
    return Cluster("address", address, *numbers)


def _has_tpu() -> bool:
    return bool(glob.glob("/dev/accel*") or glob.glob("/dev/vfio/[0-9]*"))


def _metadata(attribute: str) -> str | None:
    request = urllib.request.Request(_METADATA + attribute, headers={"Metadata-Flavor": "Google"})
    try:
        with urllib.request.urlopen(request, timeout=5) as answer:
            return answer.read().decode()
    except (urllib.error.URLError, OSError):
        return None


def join(environ: Mapping[str, str] = os.environ) -> Cluster | None:
    """Join the other hosts, where there are any; before anything else of jax is used.

    Raises:
      MissingHosts: some of them have not come in time; they are named.
      UserError: the coordinator's port is taken, or the environment makes no sense.
    """
    global _joined
    cluster = find_cluster(environ)
    if cluster is None or jax.distributed.is_initialized():
        return _joined
    where = {}
    if cluster.coordinator:
        where = {
            "coordinator_address": cluster.coordinator,
            "num_processes": cluster.num_processes,
            "process_id": cluster.process_id,
            "cluster_detection_method": "deactivate",
        }
    seconds = barrier_seconds(environ)
    try:
        if cluster.coordinator:
            roll_call(cluster.coordinator, cluster.num_processes, cluster.process_id, seconds)
        jax.distributed.initialize(
            **where,
            initialization_timeout=seconds,
            heartbeat_timeout_seconds=_seconds(environ, "TPU_TUNE_HEARTBEAT_SECONDS", 100),
            shutdown_timeout_seconds=seconds,
        )
    except MissingProcesses as error:
        raise MissingHosts(_missing(error.processes, cluster, seconds, "joining", error.reason)) from error
    except OSError as error:
        raise UserError(
            f"{cluster.coordinator}: process 0 cannot listen there ({error.strerror or error}); "
            "end what uses the port, or choose another"
        ) from error
    except RuntimeError as error:
        raise MissingHosts(f"the hosts could not come together: {_short(error)}") from error
    _joined = cluster
    return cluster


def barrier_seconds(environ: Mapping[str, str] = os.environ) -> int:
    """How long hosts wait for each other outside of steps."""
    return _seconds(environ, "TPU_TUNE_BARRIER_SECONDS", 300)


def _seconds(environ: Mapping[str, str], name: str, default: int) -> int:
    value = environ.get(name) or str(default)
    if not value.isdigit() or int(value) < 1:
        raise UserError(f"{name} is '{value}'; it must be a whole number of seconds")
    return int(value)


def barrier(name: str, seconds: int | None = None) -> None:
    """Wait until every process has come to this point.

    Raises:
      MissingHosts: some have not come in time; they are named.
    """
    if jax.process_count() == 1:
        return
    seconds = seconds or barrier_seconds()
    try:
        multihost.get_barrier_sync_fn()(key=name, timeout_ms=1000 * seconds)
    except RuntimeError as error:
        # One number a line; older versions write /job:jax_worker/replica:0/task:1.
        listed = re.findall(r"^(?:/.*task:)?(\d+)$", str(error).partition("timed out task names:")[2], re.MULTILINE)
        missing = sorted({int(number) for number in listed})
        raise MissingHosts(_missing(missing, _cluster(), seconds, name, _short(error))) from error


def _missing(processes: Sequence[int], cluster: Cluster, seconds: int, what: str, reason: str) -> str:
    if not processes:
        return f"the hosts could not come together ({what}): {reason}"
    who = ", ".join(cluster.name(process) for process in processes[:8]) + (", ..." if len(processes) > 8 else "")
    return (
        f"{who} of {cluster.num_processes} did not come within {seconds} s ({what}); look at the log there, and start "
        "the same command on every host within that time (TPU_TUNE_BARRIER_SECONDS)"
    )


def _short(error: BaseException) -> str:
    return " ".join(str(error).split())[:300]


def _cluster() -> Cluster:
    return _joined or Cluster("address", "", jax.process_count(), jax.process_index())


def together(what: str, act: Callable[[], T]) -> T:
    """Return act(), called on every process; where it fails on one with a user's mistake, all fail with that message.

    Without this the others would wait for the one that has ended.

    Raises:
      SharedError: act's own mistake, or another process's with its name before it.
      MissingHosts: a process has not come.
    """
    if jax.process_count() == 1:
        return act()
    result, problem = None, None
    try:
        result = act()
    except UserError as error:
        problem = error
    barrier(what)
    messages = [_decode(row) for row in np.asarray(multihost_utils.process_allgather(_encode(str(problem or ""))))]
    if problem is not None:
        raise SharedError(str(problem)) from problem
    first = next((process for process, text in enumerate(messages) if text), None)
    if first is not None:
        raise SharedError(f"{_cluster().name(first)}: {messages[first]}")
    return result


def _encode(text: str) -> np.ndarray:
    data = text.encode()[:_MESSAGE_BYTES]
    return np.frombuffer(data.ljust(_MESSAGE_BYTES, b"\0"), np.uint8)


def _decode(row: np.ndarray) -> str:
    return row.tobytes().rstrip(b"\0").decode(errors="replace")


def from_main(values: Sequence[int], what: str) -> list[int]:
    """Return process 0's whole numbers (below 2**31) on every process."""
    if jax.process_count() == 1:
        return list(values)
    barrier(what)
    return [int(value) for value in multihost_utils.broadcast_one_to_all(np.asarray(values, np.int32))]


def full_array(leaf: Any) -> Any:
    """Return an array that this process can read in full; collective where several processes share it."""
    if jax.process_count() == 1:
        return leaf
    return multihost_utils.process_allgather(leaf, tiled=True)


@contextlib.contextmanager
def leaving_alone() -> Iterator[None]:
    """End the process at once where it has to leave the others, with one line for what a user can mend.

    jax would wait for the others first, and they wait for this process in a step: `SharedError`, which all know of, is
    the one that may go its usual way. The others notice the broken connection or the missing heartbeat.
    """
    try:
        yield
    except SharedError:
        raise
    except BaseException as error:
        alone = isinstance(error, MissingHosts) or (jax.distributed.is_initialized() and jax.process_count() > 1)
        if not alone:
            raise
        lost = re.search(r"Gloo|Connection (closed|reset)|UNAVAILABLE|heartbeat|peer", str(error))
        if isinstance(error, UserError):
            text = str(error)
        elif isinstance(error, RuntimeError) and lost:
            text = (
                f"another host has gone ({_short(error)[:120]}); its log says why. The same command on every host goes "
                "on from the last checkpoint"
            )
        else:
            traceback.print_exc()
            text = f"process {jax.process_index()} of {jax.process_count()} ends here, and with it the others"
        print(f"tpu-tune: {' '.join(text.split())}", file=sys.stderr, flush=True)
        sys.stdout.flush()
        os._exit(1)
