"""Who the processes of a run are: one resolver for all launchers, and what they must agree on before step 0."""

import contextlib
import ctypes
import dataclasses
import os
import re
import shutil
import signal
import subprocess
import threading
from collections.abc import Iterator, Mapping
from typing import Any

PORT = 8476  # of the coordinator, where a launcher names a host alone


@dataclasses.dataclass(frozen=True)
class Place:
    """This process among those of its run."""

    coordinator: str  # host:port of process 0
    count: int
    index: int
    launcher: str


Environment = Mapping[str, str]


def resolve(environment: Environment) -> Place | None:
    """This process's place by the variables of its launcher; None where there is none.

    Of several launchers the most explicit wins: JAX's own variables, then those that JobSet, XPK, SkyPilot, SLURM
    and TPU VMs set. Raises ValueError, naming the variables, where they make no sense.
    """
    for find in (_explicit, _indexed_job, _nodes, _skypilot, _tpu, _slurm):
        if place := find(environment):
            if not 0 <= place.index < place.count:
                raise ValueError(f"{place.launcher}: process {place.index} isn't among 0 to {place.count - 1}")
            return place
    return None


def _numbers(environment: Environment, *names: str) -> list[int]:
    for name in names:
        if not environment.get(name, "").isdecimal():
            raise ValueError(f"set all of {', '.join(names)} to whole numbers; {name} is {environment.get(name)!r}")
    return [int(environment[name]) for name in names]


def _with_port(address: str, environment: Environment) -> str:
    if address.count(":") > 1 and not address.startswith("["):  # IPv6
        address = f"[{address}]"
    if re.search(r"[^:]:\d+$", address):
        return address
    return f"{address}:{environment.get('JAX_COORDINATOR_PORT') or PORT}"


def _explicit(environment: Environment) -> Place | None:
    """JAX_COORDINATOR_ADDRESS, JAX_NUM_PROCESSES, JAX_PROCESS_ID."""
    names = ("JAX_COORDINATOR_ADDRESS", "JAX_NUM_PROCESSES", "JAX_PROCESS_ID")
    if not environment.get("JAX_PROCESS_ID") and (
        environment.get("JOB_COMPLETION_INDEX") or environment.get("NODE_RANK")
    ):
        return None  # a pod: its index comes from elsewhere
    if not any(environment.get(name) for name in names):
        return None
    if not environment.get(names[0]):
        raise ValueError(f"set all of {', '.join(names)}; {names[0]} is missing")
    count, index = _numbers(environment, *names[1:])
    return Place(_with_port(environment[names[0]], environment), count, index, "JAX's variables")


def _indexed_job(environment: Environment) -> Place | None:
    """A pod of an Indexed Job: JOB_COMPLETION_INDEX; the manifest names JAX_COORDINATOR_ADDRESS, JAX_NUM_PROCESSES."""
    if not (environment.get("JOB_COMPLETION_INDEX") and environment.get("JAX_NUM_PROCESSES")):
        return None
    count, index = _numbers(environment, "JAX_NUM_PROCESSES", "JOB_COMPLETION_INDEX")
    if not (address := environment.get("JAX_COORDINATOR_ADDRESS")):
        raise ValueError("JOB_COMPLETION_INDEX and JAX_NUM_PROCESSES are set, but not JAX_COORDINATOR_ADDRESS")
    return Place(_with_port(address, environment), count, index, "Indexed Job")


def _nodes(environment: Environment) -> Place | None:
    """XPK on GPUs: NNODES, NODE_RANK and JAX_COORDINATOR_ADDRESS, without a port."""
    if not (environment.get("NNODES") and environment.get("JAX_COORDINATOR_ADDRESS")):
        return None
    count, index = _numbers(environment, "NNODES", "NODE_RANK")
    return Place(_with_port(environment["JAX_COORDINATOR_ADDRESS"], environment), count, index, "XPK")


def _skypilot(environment: Environment) -> Place | None:
    """SKYPILOT_NODE_IPS, a line each, of a TPU slice each host's; SKYPILOT_NODE_RANK."""
    addresses = environment.get("SKYPILOT_NODE_IPS", "").split()
    if not addresses:
        return None
    (index,) = _numbers(environment, "SKYPILOT_NODE_RANK")
    return Place(_with_port(addresses[0], environment), len(addresses), index, "SkyPilot")


def _tpu(environment: Environment) -> Place | None:
    """TPU_WORKER_HOSTNAMES, TPU_WORKER_ID; of several slices also MEGASCALE_NUM_SLICES, MEGASCALE_SLICE_ID."""
    hosts = [host for host in environment.get("TPU_WORKER_HOSTNAMES", "").split(",") if host]
    if not environment.get("TPU_WORKER_ID") or hosts in ([], ["localhost"]):
        return None
    (worker,) = _numbers(environment, "TPU_WORKER_ID")
    if not environment.get("MEGASCALE_NUM_SLICES"):
        return Place(_with_port(hosts[0], environment), len(hosts), worker, "TPU VMs")
    slices, this = _numbers(environment, "MEGASCALE_NUM_SLICES", "MEGASCALE_SLICE_ID")
    first = environment.get("MEGASCALE_COORDINATOR_ADDRESS", "")
    if not first:
        raise ValueError("MEGASCALE_NUM_SLICES is set, but not MEGASCALE_COORDINATOR_ADDRESS")
    # The slices' own coordinator listens on the port that stands there.
    first = re.sub(r":\d+$", "", first)
    index = this * len(hosts) + worker
    return Place(_with_port(first, environment), slices * len(hosts), index, "TPU slices")


def _slurm(environment: Environment) -> Place | None:
    """The step's SLURM_STEP_NUM_TASKS, SLURM_PROCID and its first node; the port is made from the job's number. (Other
    variables are the job's: an interactive shell in it is a step of one task.)"""
    nodes = environment.get("SLURM_STEP_NODELIST") or environment.get("SLURM_JOB_NODELIST")
    if not nodes or not environment.get("SLURM_PROCID") or not environment.get("SLURM_STEP_ID"):
        return None  # not within srun: a shell on a login or compute node
    tasks = "SLURM_STEP_NUM_TASKS" if environment.get("SLURM_STEP_NUM_TASKS") else "SLURM_NTASKS"
    count, index, job = _numbers(environment, tasks, "SLURM_PROCID", "SLURM_JOB_ID")
    port = environment.get("JAX_COORDINATOR_PORT") or 61440 + job % 4096
    return Place(f"{_first_host(nodes)}:{port}", count, index, "SLURM")


def _first_host(nodes: str) -> str:
    """Of SLURM's host list: SLURM is asked where it is; else r[1-2]n[03-10,12]-ib,m1 -> r1n03-ib."""
    if scontrol := shutil.which("scontrol"):
        asked = subprocess.run([scontrol, "show", "hostnames", nodes], capture_output=True, text=True, check=False)
        if not asked.returncode and asked.stdout.split():
            return asked.stdout.split()[0]
    first = re.match(r"(?:[^,\[\]]|\[[^\[\]]*\])+", nodes)
    if not first:
        raise ValueError(f"SLURM_STEP_NODELIST is {nodes!r}, no list of hosts")
    return re.sub(r"\[(\w+)[^\]]*\]", r"\1", first[0])


def join(heartbeat_seconds: int, lost_exit_code: int = 1) -> Place | None:
    """Joins the other processes of this run, before JAX starts; one that is dead for `heartbeat_seconds`, or doesn't
    come at all, ends all with `lost_exit_code`.

    Raises ValueError for an environment that makes no sense.
    """
    place = resolve(os.environ)
    if place is None or place.count == 1:
        return None
    import jax

    if place.index == 0:
        print(f"{place.count} processes by {place.launcher}, coordinator {place.coordinator}", flush=True)
    with _aborts_exit_with(lost_exit_code):
        jax.distributed.initialize(
            place.coordinator,
            place.count,
            place.index,
            # JAX's own detection would give each process of SLURM one GPU.
            cluster_detection_method="deactivate",
            heartbeat_timeout_seconds=heartbeat_seconds,
        )
    return place


@contextlib.contextmanager
def _aborts_exit_with(code: int) -> Iterator[None]:
    """JAX ends a process that lost another one by abort(), from a thread of its own; its callback for that can't be
    used from Python (jaxlib 0.10: std::bad_cast). Within the block it aborts in this thread too, when none comes.
    """
    joining = True

    @ctypes.CFUNCTYPE(None, ctypes.c_int)
    def on_abort(number: int) -> None:
        if joining or threading.get_ident() not in {thread.ident for thread in threading.enumerate()}:
            says = (
                b"poisonjax: ended by JAX (see above), perhaps since another process is dead, or doesn't answer; its "
            )
            os.write(2, says + b"own output tells. The same command goes on from the last checkpoint\n")
            os._exit(code)

    _HANDLERS.append(on_abort)
    ctypes.CDLL(None).signal(signal.SIGABRT, on_abort)  # Python's own handlers run when the process is gone
    yield
    joining = False


_HANDLERS: list[Any] = []  # what is called by the system must live as long as the process


class Disagreement(ValueError):
    """The processes of a run don't read the same config, data or program."""


def require_agreement(values: Mapping[str, str]) -> None:
    """Raises Disagreement, in all processes, naming every value that isn't the same everywhere.

    All processes call it with the same names. It waits for all of them: run it under the watchdog.
    """
    import jax
    import numpy as np
    from jax.experimental import multihost_utils

    if jax.process_count() == 1:
        return
    width = 256  # bytes of a value that are compared
    mine = np.zeros((len(values), width), np.uint8)
    for row, value in zip(mine, values.values(), strict=True):
        encoded = value.encode()[:width]
        row[: len(encoded)] = np.frombuffer(encoded, np.uint8)
    everywhere = np.asarray(multihost_utils.process_allgather(mine))
    lines = []
    for number, name in enumerate(values):
        seen: dict[str, list[int]] = {}
        for process, value in enumerate(everywhere[:, number]):
            seen.setdefault(bytes(value).rstrip(b"\0").decode(errors="replace"), []).append(process)
        if len(seen) > 1:
            which = "; ".join(f"{value} in {_named(processes)}" for value, processes in seen.items())
            lines.append(f"{name}: {which}")
    if lines:
        raise Disagreement(
            "the processes don't agree; start all with the same command, files and packages:\n" + "\n".join(lines)
        )


def _named(processes: list[int]) -> str:
    more = f" and {len(processes) - 4} more" if len(processes) > 4 else ""
    return f"process{'es' * (len(processes) > 1)} {', '.join(map(str, processes[:4]))}{more}"
