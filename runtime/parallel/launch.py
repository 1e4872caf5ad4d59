"""The environment of a process that torchrun, mpirun or srun started: its rank, and where the ranks meet.

    launcher            rank, number of ranks, those on this machine
    torchrun            RANK, WORLD_SIZE, LOCAL_WORLD_SIZE
    mpirun (Open MPI)   OMPI_COMM_WORLD_RANK, OMPI_COMM_WORLD_SIZE, OMPI_COMM_WORLD_LOCAL_SIZE
    mpirun (MPICH)      PMI_RANK, PMI_SIZE, MPI_LOCALNRANKS
    srun                SLURM_PROCID, SLURM_NTASKS, SLURM_STEP_NUM_NODES

The number among the ranks of a machine, which chooses a GPU, is LOCAL_RANK, OMPI_COMM_WORLD_LOCAL_RANK,
MPI_LOCALRANKID or SLURM_LOCALID.

The ranks meet at MASTER_ADDR and MASTER_PORT. Without these variables, ranks of one machine meet at 127.0.0.1
and a port that follows from the job.
"""

from __future__ import annotations

import hashlib
import math
import socket
from collections.abc import Mapping
from typing import NamedTuple

from llmc.runtime.errors import RankError

#: Environment variable: the seconds in which all ranks must have met.
TIMEOUT = "LLMC_RENDEZVOUS_TIMEOUT"
_SECONDS = 60.0
_PORTS = range(20000, 32768)  # below the ports that Linux gives to outgoing connections
_SET_ADDRESS = (
    "set MASTER_ADDR to a host name or address of rank 0 that all ranks reach, and MASTER_PORT to a free port"
)
_VARIABLES = (
    ("RANK", "WORLD_SIZE", "LOCAL_WORLD_SIZE"),
    ("OMPI_COMM_WORLD_RANK", "OMPI_COMM_WORLD_SIZE", "OMPI_COMM_WORLD_LOCAL_SIZE"),
    ("PMI_RANK", "PMI_SIZE", "MPI_LOCALNRANKS"),
    ("SLURM_PROCID", "SLURM_NTASKS", ""),
)

_LOCAL_RANKS = {  # the variable of the size -> that of the rank among those of the machine
    "WORLD_SIZE": "LOCAL_RANK",
    "OMPI_COMM_WORLD_SIZE": "OMPI_COMM_WORLD_LOCAL_RANK",
    "PMI_SIZE": "MPI_LOCALRANKID",
    "SLURM_NTASKS": "SLURM_LOCALID",
}
#: The variables that hold the number of ranks.
SIZES = tuple(size for _, size, _ in _VARIABLES)


class Place(NamedTuple):
    """The place of this process among the ranks that a launcher started."""

    rank: int
    size: int
    #: The number of ranks on this machine; None if the launcher does not say.
    local_size: int | None
    #: The variable that holds the size.
    variable: str


class Meeting(NamedTuple):
    """Where and until when the ranks meet."""

    host: str
    port: int
    #: The name of the job, which differs from other jobs' on the same machine if the launcher gives it one.
    job: str
    seconds: float


def place_of(environment: Mapping[str, str]) -> Place | None:
    """Return the place of this process, or None if no launcher started several.

    Raises RankError, naming the variable, for a number that is malformed, missing or out of range.
    """
    for rank_name, size_name, local_name in _VARIABLES:
        if size_name.startswith("SLURM") and "SLURM_STEP_ID" not in environment:
            continue  # a batch script, not a process that srun started
        if size_name == "PMI_SIZE" and "SLURM_STEP_ID" in environment and local_name not in environment:
            continue  # srun sets PMI_SIZE, too
        if size_name not in environment or (size := _number(environment, size_name, 1)) == 1:
            continue
        rank = _number(environment, rank_name, 0, size - 1)
        local = None
        if local_name in environment:
            local = _number(environment, local_name, 1, size)
        elif size_name.startswith("SLURM") and "SLURM_STEP_NUM_NODES" in environment:
            local = math.ceil(size / _number(environment, "SLURM_STEP_NUM_NODES", 1))
        return Place(rank, size, local, size_name)
    return None


def local_rank_of(environment: Mapping[str, str]) -> int | None:
    """Return the number of this process among those of its machine; None if no launcher started several.

    Raises RankError as `place_of` does, also if the launcher does not say.
    """
    place = place_of(environment)
    if place is None:
        return None
    return _number(environment, _LOCAL_RANKS[place.variable], 0, place.size - 1)


def meeting_of(environment: Mapping[str, str], place: Place) -> Meeting:
    """Return where the ranks meet. Raises RankError if the environment does not say, or not properly."""
    seconds = _SECONDS
    if text := environment.get(TIMEOUT):
        try:
            seconds = float(text)
        except ValueError:
            seconds = math.nan
        if not 0 < seconds < math.inf:
            raise RankError(f"{TIMEOUT} is {text!r}, not a number of seconds", f"unset {TIMEOUT}")
    host = environment.get("MASTER_ADDR")
    if host and "MASTER_PORT" not in environment:
        raise RankError("MASTER_ADDR is set, and MASTER_PORT is not", _SET_ADDRESS)
    job = _job(environment, place.variable)
    if host:
        # torchrun itself listens on MASTER_PORT.
        torchrun = "TORCHELASTIC_RUN_ID" in environment and place.variable == "WORLD_SIZE"
        port = _number(environment, "MASTER_PORT", 1, 65534 if torchrun else 65535) + torchrun
        return Meeting(host, port, job, seconds)
    if not job or place.local_size != place.size:
        where = "are on several machines" if place.local_size not in (None, place.size) else "have no meeting"
        raise RankError(f"the {place.size} ranks {where}, and MASTER_ADDR is not set", _SET_ADDRESS)
    digest = hashlib.sha256(job.encode()).digest()
    return Meeting("127.0.0.1", _PORTS[int.from_bytes(digest[:8], "little") % len(_PORTS)], job, seconds)


def _job(environment: Mapping[str, str], variable: str) -> str:
    """Return what names the job in the environment of the launcher that sets `variable`; "" if nothing."""
    names = {
        "WORLD_SIZE": ("TORCHELASTIC_RUN_ID",),
        "OMPI_COMM_WORLD_SIZE": ("PMIX_NAMESPACE", "OMPI_MCA_ess_base_jobid"),
        "PMI_SIZE": (),
        "SLURM_NTASKS": ("SLURM_JOB_ID", "SLURM_STEP_ID"),
    }[variable]
    job = " ".join(environment[name] for name in names if name in environment)
    if job or variable != "PMI_SIZE" or "PMI_FD" not in environment:
        return job
    return _hydra_job(_number(environment, "PMI_FD", 3))


def _hydra_job(descriptor: int) -> str:
    """Ask MPICH's process manager for the name of the job's key-value space (protocol PMI-1)."""
    answer = b""
    try:
        with socket.socket(fileno=descriptor) as manager:
            manager.settimeout(10)
            for line in (b"cmd=init pmi_version=1 pmi_subversion=1", b"cmd=get_my_kvsname", b"cmd=finalize"):
                manager.sendall(line + b"\n")
                reply = manager.recv(1024)
                answer = reply if b"kvsname=" in reply else answer
    except OSError:  # another process manager, which may name no job
        return ""
    return answer.decode(errors="replace").partition("kvsname=")[2].strip()


def _number(environment: Mapping[str, str], name: str, least: int, most: int = 1 << 20) -> int:
    text = environment.get(name)
    hint = f"start all ranks with torchrun, mpirun or srun, or unset {name}"
    if text is None:
        raise RankError(f"{name} is not set, although the number of ranks is", hint)
    if not (text.isascii() and text.isdigit() and len(text) < 10 and least <= int(text) <= most):
        raise RankError(f"{name} is {text!r}, not a number from {least} to {most}", hint)
    return int(text)
