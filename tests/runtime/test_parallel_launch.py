"""Ranks that torchrun, mpirun or srun started: their environment, how they meet, and what ends them."""

from __future__ import annotations

import contextlib
import os
import shutil
import signal
import socket
import struct
import subprocess
import sys
import threading
import time
from collections.abc import Callable, Iterator, Mapping
from concurrent.futures import ThreadPoolExecutor
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from llmc.runtime.bundle.reader import Bundle
from llmc.runtime.errors import BundleError, LlmcError, RankError
from llmc.runtime.parallel import rendezvous
from llmc.runtime.parallel.launch import Meeting, Place, local_rank_of, meeting_of, place_of
from llmc.runtime.parallel.launched import LaunchedFollowers
from llmc.runtime.parallel.messages import END, Job, receive_step
from llmc.runtime.parallel.rendezvous import Group, Hello, Refused, gather, join
from llmc.runtime.parallel.tcp import TcpCommunicator
from support.waiting import LONG

pytestmark = pytest.mark.skipif(sys.platform != "linux", reason="ranks in processes run on Linux only")

SHA = "ab" * 32
TORCHRUN = {"RANK": "1", "WORLD_SIZE": "4", "LOCAL_RANK": "1", "LOCAL_WORLD_SIZE": "2"}
OPEN_MPI = {
    "OMPI_COMM_WORLD_RANK": "3",
    "OMPI_COMM_WORLD_SIZE": "4",
    "OMPI_COMM_WORLD_LOCAL_SIZE": "4",
    "PMIX_NAMESPACE": "prterun-vm-12617@1",
}
MPICH = {"PMI_RANK": "0", "PMI_SIZE": "2", "MPI_LOCALRANKID": "0", "MPI_LOCALNRANKS": "2"}
SLURM = {"SLURM_PROCID": "5", "SLURM_NTASKS": "8", "SLURM_JOB_ID": "77", "SLURM_STEP_ID": "0"}


@pytest.mark.parametrize(
    ("environment", "place"),
    [
        ({}, None),
        ({"RANK": "0"}, None),
        ({"RANK": "0", "WORLD_SIZE": "1"}, None),
        (TORCHRUN, Place(1, 4, 2, "WORLD_SIZE")),
        ({"RANK": "3", "WORLD_SIZE": "4"}, Place(3, 4, None, "WORLD_SIZE")),
        (OPEN_MPI, Place(3, 4, 4, "OMPI_COMM_WORLD_SIZE")),
        (MPICH, Place(0, 2, 2, "PMI_SIZE")),
        (SLURM, Place(5, 8, None, "SLURM_NTASKS")),
        (SLURM | {"SLURM_STEP_NUM_NODES": "2"}, Place(5, 8, 4, "SLURM_NTASKS")),
        ({"SLURM_PROCID": "0", "SLURM_NTASKS": "8"}, None),  # a batch script
        (SLURM | {"WORLD_SIZE": "1", "SLURM_NTASKS": "1"}, None),
        # srun with PMI-2, and MPICH's mpirun in an allocation, whose daemons srun starts
        (SLURM | {"PMI_RANK": "5", "PMI_SIZE": "8", "PMI_FD": "9"}, Place(5, 8, None, "SLURM_NTASKS")),
        (SLURM | MPICH, Place(0, 2, 2, "PMI_SIZE")),
        (SLURM | OPEN_MPI, Place(3, 4, 4, "OMPI_COMM_WORLD_SIZE")),  # mpirun in an allocation
    ],
)
def test_the_place_of_a_process(environment: Mapping[str, str], place: Place | None) -> None:
    assert place_of(environment) == place


@pytest.mark.parametrize(
    ("environment", "local"),
    [
        ({}, None),
        (TORCHRUN | {"LOCAL_RANK": "1"}, 1),
        (OPEN_MPI | {"OMPI_COMM_WORLD_LOCAL_RANK": "2"}, 2),
        (MPICH | {"MPI_LOCALRANKID": "0"}, 0),
        (SLURM | {"SLURM_LOCALID": "3"}, 3),
    ],
)
def test_the_number_among_the_ranks_of_a_machine(environment: Mapping[str, str], local: int | None) -> None:
    assert local_rank_of(environment) == local


def test_a_launcher_that_does_not_number_the_ranks_of_a_machine() -> None:
    with pytest.raises(RankError, match="LOCAL_RANK is not set"):
        local_rank_of({"RANK": "0", "WORLD_SIZE": "2"})


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"WORLD_SIZE": "two"}, "WORLD_SIZE is 'two', not a number from 1"),
        ({"WORLD_SIZE": "0"}, "WORLD_SIZE is '0', not a number from 1"),
        ({"WORLD_SIZE": "9" * 5000}, "WORLD_SIZE is '999"),
        ({"RANK": "4"}, "RANK is '4', not a number from 0 to 3"),
        ({"RANK": "-1"}, "RANK is '-1'"),
        ({"RANK": "²"}, "RANK is '²'"),
        ({"RANK": None}, "RANK is not set"),
        ({"LOCAL_WORLD_SIZE": "5"}, "LOCAL_WORLD_SIZE is '5', not a number from 1 to 4"),
    ],
)
def test_a_malformed_environment_names_the_variable(changes: Mapping[str, Any], message: str) -> None:
    environment = {name: text for name, text in (TORCHRUN | changes).items() if text is not None}
    with pytest.raises(RankError) as error:
        place_of(environment)
    assert error.value.message.startswith(message)
    assert error.value.hint


def meeting(environment: Mapping[str, str]) -> Meeting:
    place = place_of(environment)
    assert place
    return meeting_of(environment, place)


def test_where_the_ranks_meet() -> None:
    address = {"MASTER_ADDR": "node7", "MASTER_PORT": "29500"}
    assert meeting(TORCHRUN | address) == Meeting("node7", 29500, "", 60)
    # torchrun itself listens on MASTER_PORT
    assert meeting(TORCHRUN | address | {"TORCHELASTIC_RUN_ID": "x"}) == Meeting("node7", 29501, "x", 60)
    assert meeting(OPEN_MPI | address | {"TORCHELASTIC_RUN_ID": "x"}).port == 29500
    assert meeting(SLURM | address | {"LLMC_RENDEZVOUS_TIMEOUT": "1.5"}) == Meeting(
        "node7", 29500, "77 0", 1.5
    )
    local = meeting(OPEN_MPI)
    assert local.host == "127.0.0.1"
    assert local == meeting(OPEN_MPI | {"OMPI_COMM_WORLD_RANK": "0"})
    assert local.port != meeting(OPEN_MPI | {"PMIX_NAMESPACE": "prterun-vm-12618@1"}).port
    assert meeting(SLURM | {"SLURM_STEP_NUM_NODES": "1"}).host == "127.0.0.1"


@pytest.mark.parametrize(
    ("environment", "message"),
    [
        (TORCHRUN, "the 4 ranks are on several machines, and MASTER_ADDR is not set"),
        (SLURM, "the 8 ranks have no meeting, and MASTER_ADDR is not set"),
        (MPICH, "the 2 ranks have no meeting, and MASTER_ADDR is not set"),
        (TORCHRUN | {"MASTER_ADDR": "a"}, "MASTER_ADDR is set, and MASTER_PORT is not"),
        (TORCHRUN | {"MASTER_ADDR": "a", "MASTER_PORT": "65536"}, "MASTER_PORT is '65536', not a number"),
        (TORCHRUN | {"LLMC_RENDEZVOUS_TIMEOUT": "nan"}, "LLMC_RENDEZVOUS_TIMEOUT is 'nan'"),
    ],
)
def test_no_place_to_meet(environment: Mapping[str, str], message: str) -> None:
    with pytest.raises(RankError) as error:
        meeting(environment)
    assert error.value.message.startswith(message)
    assert "MASTER_PORT" in error.value.hint or "unset" in error.value.hint


@pytest.fixture
def port() -> int:
    with socket.create_server(("127.0.0.1", 0)) as server:
        return int(server.getsockname()[1])


def meet(size: int, port: int, seconds: float = LONG, **others: Any) -> list[Any]:
    """Return the group, or the exception, of every rank. others: "rank1" -> its manifest, place or job"""

    def run(rank: int) -> Group:
        sha, place, job = {"sha": SHA, "place": Place(rank, size, size, "WORLD_SIZE"), "job": "j"}.values()
        other = others.get(f"rank{rank}", {})
        at = Meeting("127.0.0.1", port, other.get("job", job), seconds)
        place = other.get("place", place)
        return (join if rank else gather)(place, at, other.get("sha", sha))

    with ThreadPoolExecutor(size) as pool:
        jobs = [pool.submit(run, rank) for rank in range(size)]
        return [job.exception() or job.result() for job in jobs]


@contextlib.contextmanager
def met(size: int, port: int) -> Iterator[list[Group]]:
    groups = meet(size, port)
    assert all(isinstance(group, Group) for group in groups), groups
    yield groups
    for group in groups:
        group.close()


@pytest.mark.parametrize("size", [2, 4])
def test_every_two_ranks_are_connected(size: int, port: int) -> None:
    with met(size, port) as groups:
        for rank, group in enumerate(groups):
            assert set(group.links) == set(range(size)) - {rank}
            assert set(group.channels) == (set(range(1, size)) if rank == 0 else {0})
            for other, link in group.links.items():
                assert link.getpeername() == groups[other].links[rank].getsockname()
                assert link.getsockopt(socket.IPPROTO_TCP, socket.TCP_NODELAY)
                assert link.getsockopt(socket.SOL_SOCKET, socket.SO_KEEPALIVE)


def test_other_programs_are_ignored(port: int) -> None:
    """They send garbage, half a hello or nothing, and connect more often than a rank does."""
    half = Hello(1, 2, bytes(32), bytes(32), 5).pack()[:60]
    clients: list[socket.socket] = []

    def disturb() -> None:
        for number in range(100):
            client = rendezvous._connect(0, "127.0.0.1", port, time.monotonic() + LONG, Meeting("", 0, "", 9))
            clients.append(client)
            with contextlib.suppress(OSError):
                client.sendall([b"GET / HTTP/1.1\r\n\r\n" * 99, half, b"", os.urandom(500)][number % 4])

    disturber = threading.Thread(target=disturb)
    disturber.start()
    ranks: list[Any] = []
    first = threading.Thread(
        target=lambda: ranks.append(
            gather(Place(0, 2, 2, ""), Meeting("127.0.0.1", port, "j", LONG), SHA),
        )
    )
    first.start()
    disturber.join()
    ranks.append(join(Place(1, 2, 2, ""), Meeting("127.0.0.1", port, "j", LONG), SHA))
    first.join()
    assert [set(group.links) for group in ranks] in ([{0}, {1}], [{1}, {0}])
    for end in (*ranks, *clients):
        end.close()


@pytest.mark.parametrize(
    ("other", "message"),
    [
        ({"sha": "cd" * 32}, "rank 1 and rank 0 have different bundles"),
        ({"place": Place(1, 4, 4, "")}, "rank 1 is one of 4 ranks, and rank 0 one of 3"),
        ({"place": Place(2, 3, 3, "")}, "two processes are rank 2"),
    ],
)
def test_ranks_that_do_not_fit_together(other: dict[str, Any], message: str, port: int) -> None:
    first, second, third = meet(3, port, seconds=2, rank1=other)  # the third may be late
    assert isinstance(first, RankError)
    assert first.message == message
    assert {type(second), type(third)} <= {Refused, RankError}
    assert isinstance(second, Refused) or "two processes" in message


def test_another_version_of_llmc(port: int, monkeypatch: pytest.MonkeyPatch) -> None:
    pack = Hello.pack
    monkeypatch.setattr(Hello, "pack", lambda hello: pack(Hello(*pack_fields(hello), version="0.0.1")))
    first, second = meet(2, port)
    assert first.message.startswith("rank 1 runs llmc 0.0.1, and rank 0 llmc ")
    assert isinstance(second, Refused)


def pack_fields(hello: Hello) -> tuple[Any, ...]:
    return hello.rank, hello.size, hello.manifest, hello.key, hello.port


def test_a_rank_of_another_job_is_refused_and_the_others_wait(port: int) -> None:
    first, second = meet(2, port, seconds=1, rank1={"job": "another"})
    assert first.message == f"rank 1 did not connect to 127.0.0.1, port {port} within 1 s"
    assert second.message == "rank 0 belongs to another job"
    assert "MASTER_PORT" in second.hint


def test_nobody_is_there(port: int) -> None:
    place, nowhere = Place(1, 2, 2, ""), Meeting("127.0.0.1", port, "", 0.2)
    with pytest.raises(
        RankError, match=f"rank 0 cannot be reached at 127.0.0.1, port {port} .* within 0.2 s"
    ):
        join(place, nowhere, SHA)
    with pytest.raises(RankError, match=f"ranks 1, 2 did not connect to 127.0.0.1, port {port} within 0.2 s"):
        gather(Place(0, 3, 3, ""), nowhere, SHA)


@pytest.mark.parametrize("host", ["a..b", "x" * 64, "no such host"])
def test_an_address_that_is_none(host: str) -> None:
    at = Meeting(host, 29500, "", 0.05)
    with pytest.raises(RankError, match=f"rank 0 cannot listen on {host}, port 29500: "):
        gather(Place(0, 2, 2, ""), at, SHA)
    with pytest.raises(RankError, match=rf"rank 0 cannot be reached at {host}, port 29500 \(.*\) within"):
        join(Place(1, 2, 2, ""), at, SHA)


def test_a_port_in_use() -> None:
    with socket.create_server(("127.0.0.1", 0)) as server:
        port = server.getsockname()[1]
        at = Meeting("127.0.0.1", port, "", 0.2)
        message = f"rank 0 cannot listen on 127.0.0.1, port {port}: .*in use"
        with pytest.raises(RankError, match=message) as error:
            gather(Place(0, 2, 2, ""), at, SHA)
        assert "MASTER_PORT" in error.value.hint
        with pytest.raises(RankError, match=r"did not send the addresses of the ranks within 0\.2 s"):
            join(Place(1, 2, 2, ""), at, SHA)


@pytest.mark.parametrize(
    "answer", [b"HTTP/1.1 400 Bad Request\r\n\r\n", b"", b'{"token": 1}\n', b"[]\n", b"x" * (1 << 17)]
)
def test_another_program_answers(answer: bytes) -> None:
    with socket.create_server(("127.0.0.1", 0)) as server:
        port = server.getsockname()[1]

        def serve() -> None:
            client, _ = server.accept()
            with client:
                client.recv(1)
                client.sendall(answer)

        other = threading.Thread(target=serve)
        other.start()
        with pytest.raises(RankError, match=f"127.0.0.1, port {port} is another program"):
            join(Place(1, 2, 2, ""), Meeting("127.0.0.1", port, "", LONG), SHA)
        other.join()


def test_rank_0_is_gone_before_the_hello(monkeypatch: pytest.MonkeyPatch) -> None:
    """Rank 0 has refused another rank. It ended when this one had connected."""
    with socket.create_server(("127.0.0.1", 0)) as server:
        link = socket.create_connection(server.getsockname())
        client, _ = server.accept()
        client.setsockopt(socket.SOL_SOCKET, socket.SO_LINGER, struct.pack("ii", 1, 0))  # reset, not closed
        client.close()
        with pytest.raises(ConnectionResetError):
            link.recv(1)  # now it has come
    monkeypatch.setattr(rendezvous, "_connect", lambda *_: link)
    with pytest.raises(RankError, match="rank 0 ended early") as error:
        join(Place(1, 2, 2, ""), Meeting("127.0.0.1", 29500, "", LONG), SHA)
    assert type(error.value) is RankError


def test_a_message_of_another_collective_allocates_nothing(port: int) -> None:
    """The other side of a connection sends a header of a huge array, or garbage."""
    with met(2, port) as (first, second):
        second.links[0].sendall(b"\xff" * 24)
        with pytest.raises(RankError, match=r"the ranks disagree: .* rank 1 in an unknown collective"):
            TcpCommunicator(0, first.links).all_reduce(np.zeros((1, 4), np.float32))


RANK = """
import sys, numpy as np
from llmc.runtime.parallel.launched import Place, TcpCommunicator, gather, join, meeting_of, place_of
import os
place = place_of(os.environ)
group = (join if place.rank else gather)(place, meeting_of(os.environ, place), "ab" * 32)
ranks = TcpCommunicator(place.rank, group.links)
numbers = np.random.default_rng(place.rank).standard_normal((700, 1200)).astype(np.float32)
whole = np.zeros((700, 1200 * place.size), np.float32)
ranks.all_gather(numbers, whole)
for _ in range(3):
    ranks.all_reduce(numbers)
np.save(sys.argv[1] + str(place.rank), np.concatenate([whole, numbers], axis=1))
"""


def start(command: list[str], rank: int, size: int, port: int, **more: str) -> subprocess.Popen[str]:
    """Start a rank as torchrun does."""
    place = {"RANK": str(rank), "WORLD_SIZE": str(size), "LOCAL_WORLD_SIZE": str(size)}
    at = {"MASTER_ADDR": "127.0.0.1", "MASTER_PORT": str(port), "LLMC_RENDEZVOUS_TIMEOUT": str(LONG)}
    return subprocess.Popen(
        [sys.executable, *command],
        env=os.environ | place | at | more,
        stdin=subprocess.DEVNULL,
        stdout=subprocess.PIPE,
        stderr=subprocess.PIPE,
        text=True,
    )


def ends(processes: list[subprocess.Popen[str]]) -> list[tuple[int, str, str]]:
    """Wait for all. Return the exit code, stdout and stderr of each."""
    texts = [process.communicate(timeout=LONG) for process in processes]
    return [(process.returncode, *text) for process, text in zip(processes, texts, strict=True)]


@pytest.mark.parametrize("size", [2, 4])
def test_collectives_of_real_processes(size: int, port: int, tmp_path: Path) -> None:
    """Arrays of 3 MB, which are larger than the buffers of a connection."""
    command = ["-c", RANK, str(tmp_path / "rank")]
    assert ends([start(command, rank, size, port) for rank in range(size)]) == [(0, "", "")] * size
    parts = [np.random.default_rng(rank).standard_normal((700, 1200)).astype("f4") for rank in range(size)]
    total = sum(parts[1:], parts[0])
    for _ in range(2):
        total = sum([total] * (size - 1), total)
    expected = np.concatenate([*parts, total], axis=1)
    for rank in range(size):
        assert np.load(tmp_path / f"rank{rank}.npy").tobytes() == expected.tobytes()


@pytest.fixture(scope="session")
def two_ranks(checkpoint: Callable[[str], Path], tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A bundle of llama-tiny with two ranks."""
    from llmc.compiler.driver import compile_model
    from llmc.compiler.request import BuildRequest

    path = tmp_path_factory.mktemp("ranks") / "two.llmc"
    return compile_model(BuildRequest(str(checkpoint("llama-tiny")), path, tp=2, verify=False)).path


def llmc(*arguments: object) -> list[str]:
    return ["-m", "llmc", *map(str, arguments)]


@pytest.fixture(scope="session")
def four_ranks(checkpoint: Callable[[str], Path], tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A bundle of llama-tiny with two stages of two ranks."""
    from llmc.compiler.driver import compile_model
    from llmc.compiler.request import BuildRequest

    path = tmp_path_factory.mktemp("ranks") / "four.llmc"
    return compile_model(BuildRequest(str(checkpoint("llama-tiny")), path, tp=2, pp=2, verify=False)).path


@pytest.fixture
def text(two_ranks: Path) -> tuple[list[str], str]:
    """A command, and what it prints if it starts the ranks itself."""
    return answer(two_ranks)


def answer(bundle: Path) -> tuple[list[str], str]:
    """Return a command that runs a bundle, and what it prints if it starts the ranks itself."""
    command = llmc("run", bundle, "Once upon", "--max-tokens", 12, "--threads", 2)
    done = subprocess.run(
        [sys.executable, *command], capture_output=True, text=True, timeout=LONG, check=True
    )
    return command, done.stdout


def test_run_prints_what_ranks_of_its_own_print(text: tuple[list[str], str], port: int) -> None:
    command, stdout = text
    ranks = [start(command, rank, 2, port) for rank in (1, 0)]
    assert ends(ranks) == [(0, "", ""), (0, stdout, "")]


@pytest.mark.slow
@pytest.mark.parametrize("ranks", [2, 4])
@pytest.mark.parametrize("launcher", [["torchrun", "--no-python", "--nproc-per-node"], ["mpirun", "-n"]])
def test_launchers(
    launcher: list[str], ranks: int, request: pytest.FixtureRequest, monkeypatch: pytest.MonkeyPatch
) -> None:
    search = f"{Path(sys.executable).parent}{os.pathsep}{os.environ['PATH']}"
    program = shutil.which(launcher[0], path=search)
    if program is None:
        pytest.skip(f"{launcher[0]} is not installed")
    for name in ("ALLOW_RUN_AS_ROOT", "ALLOW_RUN_AS_ROOT_CONFIRM"):  # of Open MPI
        for prefix in ("OMPI", "PRTE"):
            monkeypatch.setenv(f"{prefix}_{name}", "1")
    # Else Open MPI starts no more processes than there are cores.
    monkeypatch.setenv("PRTE_MCA_rmaps_default_mapping_policy", ":oversubscribe")
    command, stdout = answer(request.getfixturevalue({2: "two_ranks", 4: "four_ranks"}[ranks]))
    started = [program, *launcher[1:], str(ranks), sys.executable, *command]
    done = subprocess.run(started, capture_output=True, text=True, timeout=LONG)
    assert (done.returncode, done.stdout) == (0, stdout), done.stderr


@pytest.mark.slow
def test_stages_meet_by_the_variables_of_open_mpi(four_ranks: Path, port: int) -> None:
    command, stdout = answer(four_ranks)
    size = {"OMPI_COMM_WORLD_SIZE": "4", "OMPI_COMM_WORLD_LOCAL_SIZE": "4", "WORLD_SIZE": "1"}
    ranks = [start(command, 0, 4, port, **size, OMPI_COMM_WORLD_RANK=str(rank)) for rank in range(4)]
    assert ends(ranks) == [(0, stdout, ""), *[(0, "", "")] * 3]


def test_another_number_of_processes_is_one_error(two_ranks: Path, port: int) -> None:
    ranks = [start(llmc("run", two_ranks, "Once"), rank, 3, port) for rank in range(3)]
    first, *others = ends(ranks)
    assert first[:2] == (1, "")
    assert first[2].startswith("error: WORLD_SIZE is 3, and two has 2 ranks\nhint: ")
    assert others == [(1, "", "")] * 2


def test_a_bundle_of_one_rank_ignores_the_environment(bundle: Callable[[str], Path], port: int) -> None:
    command = llmc("run", bundle("llama-tiny"), "Once", "--max-tokens", 2)
    ((code, stdout, _),) = ends([start(command, 1, 2, port, RANK="nonsense")])
    assert code == 0
    assert stdout


def test_different_bundles_are_one_error(two_ranks: Path, port: int, tmp_path: Path) -> None:
    shutil.copytree(two_ranks, tmp_path / "other.llmc")
    manifest = Bundle.open(two_ranks).manifest
    other = replace(manifest, source=replace(manifest.source, name="another"))
    (tmp_path / "other.llmc/manifest.json").write_bytes(other.to_json())
    paths = [two_ranks, tmp_path / "other.llmc"]
    first, second = ends([start(llmc("run", path, "Once"), rank, 2, port) for rank, path in enumerate(paths)])
    assert first[:2] == (1, "")
    assert first[2].startswith("error: rank 1 and rank 0 have different bundles\nhint: ")
    assert second == (1, "", "")


@pytest.mark.parametrize(("killed", "number"), [(1, signal.SIGKILL), (0, signal.SIGTERM)])
def test_a_rank_that_is_killed_ends_the_others(
    two_ranks: Path, port: int, tmp_path: Path, killed: int, number: signal.Signals
) -> None:
    prompts = tmp_path / "prompts"
    prompts.write_text("Once upon a time\n" * 3000)
    command = llmc("run", two_ranks, "--prompts", prompts, "--max-tokens", 100)
    ranks = [start(command, rank, 2, port) for rank in range(2)]
    assert ranks[0].stdout
    assert ranks[0].stdout.readline()  # steps are running
    ranks[killed].send_signal(number)
    first, second = ends(ranks)
    if killed:
        assert first[0] == 1
        assert first[2].startswith("error: rank 1 ended in ")
        assert "step" in first[2]
        assert first[2].count("\n") == 2
        assert second == (-number, "", "")
    else:
        assert first[0] == -number
        assert second == (1, "", "")


def test_load_engine_is_for_rank_0(two_ranks: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    from llmc.runtime.load import load_engine

    monkeypatch.setenv("RANK", "1")
    monkeypatch.setenv("WORLD_SIZE", "2")
    with pytest.raises(RankError, match="this process is rank 1 of 2, which follows rank 0"):
        load_engine(two_ranks)


def test_an_error_of_rank_0_ends_the_others(two_ranks: Path, port: int) -> None:
    command = llmc("run", two_ranks, "Once", "--kv-memory", "1")
    first, second = ends([start(command, rank, 2, port) for rank in range(2)])
    assert first[0] == 2
    assert first[2].startswith("error: 1 bytes of KV cache hold no block")
    assert second == (1, "", "")


@pytest.mark.parametrize(
    ("report", "message"),
    [
        (
            b'{"error": {"kind": "BundleError", "message": "bad", "hint": "", "ended": false}}\n',
            "rank 1: bad",
        ),
        (b'{"error": {"kind": "annotations", "message": "", "hint": "", "ended": false}}\n', "that is none"),
        (b'{"error": 1}\n', "that is none"),
        (b"[" * (1 << 17), "that is none"),
        (b"\xff\n", "that is none"),
        (b"", "rank 1 ended while it was loaded"),
    ],
)
def test_reports_of_other_machines_are_checked(report: bytes, message: str) -> None:
    mine, theirs = socket.socketpair()
    followers = LaunchedFollowers({1: mine}, Job("0" * 64, 4, 64, 8, 1, None, 60))
    sender = threading.Thread(target=lambda: (theirs.sendall(report), theirs.shutdown(socket.SHUT_WR)))
    sender.start()
    with pytest.raises(LlmcError, match=message) as error:
        followers.wait_until_loaded()
    assert isinstance(error.value, BundleError if "bad" in message else RankError)
    followers.fail()
    sender.join()
    assert theirs.recv(4096).startswith(b'{"llmc":')
    theirs.close()


def test_a_step_without_end_is_refused() -> None:
    mine, theirs = socket.socketpair()
    with mine, theirs:
        theirs.sendall(b"\xff" * len(END))
        with pytest.raises(RankError, match=r"rank 0 sent a step of \d+ bytes"):
            receive_step(mine)
