"""How the ranks that a launcher started find each other.

Rank 0 listens where the ranks meet. Every other rank connects to it (its channel), says hello, and names the
port where it listens itself. When all have come, rank 0 sends them the addresses of all ranks and a token.
Then every rank connects to the ranks below it, with another hello that holds the token.

A hello has a fixed size. It says which rank of which bundle and job this is. Rank 0 closes connections of
other programs and refuses ranks of other jobs. A rank that cannot belong to this job is an error of all.
The hellos are for mistakes. They keep nobody out who can read the traffic.
"""

from __future__ import annotations

import contextlib
import hashlib
import ipaddress
import json
import secrets
import select
import socket
import struct
import time
from collections.abc import Iterable, Iterator, Mapping
from dataclasses import dataclass, field

import llmc
from llmc.runtime.errors import RankError
from llmc.runtime.parallel.communicator import RankEnded
from llmc.runtime.parallel.launch import TIMEOUT, Meeting, Place
from llmc.runtime.parallel.messages import receive_line

_MAGIC = b"llmc-tp1"
_HELLO = struct.Struct("<8s32s32sIIH32s")
_RETRY = 0.05  # seconds between attempts to connect
_UNKNOWN = 64  # connections that have not said hello


class Refused(RankError):
    """Rank 0 does not take this rank, and prints the reason itself."""


@dataclass(frozen=True)
class Hello:
    """The first message of a connection to another rank."""

    rank: int
    size: int
    #: The sha256 of the bundle's manifest, as bytes.
    manifest: bytes
    #: The sha256 of the name of the job, or the token of rank 0.
    key: bytes
    #: Where this rank listens; 0 in a connection for collectives.
    port: int = 0
    version: str = field(default_factory=lambda: llmc.__version__)

    def pack(self) -> bytes:
        version = self.version.encode()[:32]
        return _HELLO.pack(_MAGIC, self.manifest, self.key, self.rank, self.size, self.port, version)

    @classmethod
    def unpack(cls, data: bytes) -> Hello:
        _, manifest, key, rank, size, port, version = _HELLO.unpack(data)
        return cls(rank, size, manifest, key, port, version.rstrip(b"\0").decode(errors="replace"))


@dataclass
class Group:
    """The connections of a rank."""

    #: Rank 0: rank -> its channel. Other ranks: 0 -> the channel to rank 0.
    channels: dict[int, socket.socket] = field(default_factory=dict)
    #: Rank -> the connection for collectives.
    links: dict[int, socket.socket] = field(default_factory=dict)

    def close(self) -> None:
        for link in (*self.channels.values(), *self.links.values()):
            link.close()


def gather(place: Place, meeting: Meeting, manifest_sha256: str) -> Group:
    """Meet the other ranks, as rank 0. Raises RankError if they do not come or do not fit together."""
    deadline = time.monotonic() + meeting.seconds
    mine = Hello(0, place.size, bytes.fromhex(manifest_sha256), _sha256(meeting.job))
    group, addresses = Group(), [("", 0)] * place.size
    try:
        with _listen(meeting, place) as listener:
            for link, hello in _hellos(listener, deadline):
                if hello.key != mine.key or not hello.port:
                    _refuse([link], "rank 0 belongs to another job", printed=False)
                    continue
                if fault := _fault(mine, hello, group.channels):
                    _refuse([link], fault, printed=True)
                    raise RankError(fault, "start all ranks with the same command and the same installation")
                group.channels[hello.rank] = _tuned(link)
                addresses[hello.rank] = (link.getpeername()[0], hello.port)
                if len(group.channels) == place.size - 1:
                    break
            else:
                missing = set(range(1, place.size)) - set(group.channels)
                who = f"{_ranks(missing)} did not connect to {meeting.host}, port {meeting.port}"
                raise _late(who, meeting)
            token = secrets.token_bytes(32)
            table = json.dumps({"token": token.hex(), "addresses": addresses}).encode() + b"\n"
            for rank, channel in group.channels.items():
                _send(rank, channel, table)
            _accept_links(group, listener, token, set(group.channels), deadline, meeting)
    except BaseException as error:
        if isinstance(error, RankError):
            _refuse(group.channels.values(), error.message, printed=True)
        group.close()
        raise
    return group


def join(place: Place, meeting: Meeting, manifest_sha256: str) -> Group:
    """Meet the other ranks, as a rank above 0. Raises RankError, and Refused if rank 0 prints the reason."""
    deadline = time.monotonic() + meeting.seconds
    manifest, group = bytes.fromhex(manifest_sha256), Group()
    try:
        channel = group.channels[0] = _connect(0, meeting.host, meeting.port, deadline, meeting)
        address = channel.getsockname()[0]
        with socket.create_server((address, 0), family=channel.family, backlog=place.size) as listener:
            port = listener.getsockname()[1]
            hello = Hello(place.rank, place.size, manifest, _sha256(meeting.job), port)
            try:
                _send(0, channel, hello.pack())
            except RankEnded as error:  # it has refused another rank
                raise _no_rank0(meeting) from error
            token, addresses = _table(channel, place, deadline, meeting)
            addresses[0] = (meeting.host, meeting.port)
            hello = Hello(place.rank, place.size, manifest, token)
            for rank in range(place.rank):
                group.links[rank] = _connect(rank, *addresses[rank], deadline, meeting)
                _send(rank, group.links[rank], hello.pack())
            higher = set(range(place.rank + 1, place.size))
            _accept_links(group, listener, token, higher, deadline, meeting)
        channel.settimeout(None)
    except BaseException:
        group.close()
        raise
    return group


def _fault(mine: Hello, hello: Hello, known: Mapping[int, object]) -> str:
    """Return why a rank cannot belong to this job; "" if it can."""
    who = f"rank {hello.rank}"
    if hello.version != mine.version:
        return f"{who} runs llmc {hello.version}, and rank 0 llmc {mine.version}"
    if hello.size != mine.size:
        return f"{who} is one of {hello.size} ranks, and rank 0 one of {mine.size}"
    if not 0 < hello.rank < mine.size:
        return f"{who} does not exist: there are {mine.size}, from 0"
    if hello.manifest != mine.manifest:
        return f"{who} and rank 0 have different bundles"
    return f"two processes are {who}" if hello.rank in known else ""


def _hellos(listener: socket.socket, deadline: float) -> Iterator[tuple[socket.socket, Hello]]:
    """Yield the connections that have said hello, until the deadline. Close those of other programs."""
    poll = select.poll()
    poll.register(listener, select.POLLIN)
    listener.setblocking(False)
    unknown: dict[int, tuple[socket.socket, bytearray]] = {}
    try:
        while (left := deadline - time.monotonic()) > 0:
            for number, _ in poll.poll(1000 * left):
                if number == listener.fileno():
                    with contextlib.suppress(OSError):  # the client may have left
                        link, _ = listener.accept()
                        link.setblocking(False)
                        if len(unknown) == _UNKNOWN:
                            oldest = next(iter(unknown))
                            poll.unregister(oldest)
                            unknown.pop(oldest)[0].close()
                        unknown[link.fileno()] = link, bytearray()
                        poll.register(link, select.POLLIN)
                    continue
                if number not in unknown:
                    continue
                link, data = unknown[number]
                try:
                    received = link.recv(_HELLO.size - len(data))
                except OSError:
                    received = b""
                data += received
                mine = data[: len(_MAGIC)] == _MAGIC[: len(data)]
                if received and mine and len(data) < _HELLO.size:
                    continue
                poll.unregister(number)
                del unknown[number]
                if received and mine:
                    link.setblocking(True)
                    yield link, Hello.unpack(bytes(data))
                else:
                    link.close()
    finally:
        for link, _ in unknown.values():
            link.close()


def _accept_links(
    group: Group,
    listener: socket.socket,
    token: bytes,
    missing: set[int],
    deadline: float,
    meeting: Meeting,
) -> None:
    """Accept the connections for collectives of the ranks `missing`."""
    if not missing:
        return
    for link, hello in _hellos(listener, deadline):
        if hello.key != token or hello.port or hello.rank not in missing:
            link.close()
            continue
        group.links[hello.rank] = _tuned(link)
        missing.remove(hello.rank)
        if not missing:
            return
    raise _late(f"{_ranks(missing)} did not connect", meeting)


def _listen(meeting: Meeting, place: Place) -> socket.socket:
    where = f"{meeting.host}, port {meeting.port}"
    try:
        family, _, _, _, address = socket.getaddrinfo(
            meeting.host, meeting.port, type=socket.SOCK_STREAM, flags=socket.AI_PASSIVE
        )[0]
        host = str(address[0])
        loopback = ipaddress.ip_address(host.partition("%")[0]).is_loopback
        if loopback and meeting.host not in (host, "localhost") and place.local_size != place.size:
            host = ""  # /etc/hosts may map the name of this machine to 127.0.1.1
        return socket.create_server((host, meeting.port), family=family, backlog=_UNKNOWN)
    except (OSError, UnicodeError) as error:  # UnicodeError: no host has such a name
        raise RankError(
            f"rank 0 cannot listen on {where}: {getattr(error, 'strerror', None) or error}",
            "set MASTER_ADDR to an address of rank 0, and MASTER_PORT to a free port",
        ) from error


def _connect(rank: int, host: str, port: int, deadline: float, meeting: Meeting) -> socket.socket:
    """Connect to a rank, which may not listen yet. Raises RankError when it is too late."""
    reason = "timed out"
    while (left := deadline - time.monotonic()) > 0:
        try:
            link = socket.create_connection((host, port), left)
            if link.getsockname() != link.getpeername():  # else the system has connected it to itself
                return _tuned(link)
            link.close()
        except (OSError, UnicodeError) as error:
            reason = getattr(error, "strerror", None) or str(error)
        time.sleep(min(_RETRY, max(0.0, deadline - time.monotonic())))
    raise _late(f"rank {rank} cannot be reached at {host}, port {port} ({reason})", meeting)


def _table(
    channel: socket.socket, place: Place, deadline: float, meeting: Meeting
) -> tuple[bytes, list[tuple[str, int]]]:
    """Wait for the addresses of all ranks. Return the token and the addresses."""
    channel.settimeout(max(_RETRY, deadline + _RETRY - time.monotonic()))
    try:
        answer = json.loads(receive_line(channel))
        if "error" in answer:
            kind = Refused if answer["printed"] else RankError
            raise kind(str(answer["error"]), "set MASTER_PORT to another free port")
        token, addresses = bytes.fromhex(answer["token"]), answer["addresses"]
        if len(addresses) != place.size:
            raise ValueError
        return token, [(str(host), int(port)) for host, port in addresses]
    except TimeoutError:
        raise _late("rank 0 did not send the addresses of the ranks", meeting) from None
    except (ValueError, TypeError, KeyError) as error:
        raise _no_rank0(meeting) from error


def _send(rank: int, link: socket.socket, data: bytes) -> None:
    try:
        link.sendall(data, socket.MSG_NOSIGNAL)
    except OSError as error:
        raise RankEnded(rank, "the rendezvous") from error


def _refuse(links: Iterable[socket.socket], message: str, printed: bool) -> None:
    line = json.dumps({"error": message, "printed": printed}).encode() + b"\n"
    for link in links:
        with contextlib.suppress(OSError):  # it has ended
            link.sendall(line, socket.MSG_NOSIGNAL | socket.MSG_DONTWAIT)
        link.close()


def _tuned(link: socket.socket) -> socket.socket:
    """Send small messages at once, and notice the end of a machine that cannot say so."""
    link.settimeout(None)
    link.setsockopt(socket.IPPROTO_TCP, socket.TCP_NODELAY, 1)
    link.setsockopt(socket.SOL_SOCKET, socket.SO_KEEPALIVE, 1)
    for name, value in (("TCP_KEEPIDLE", 10), ("TCP_KEEPINTVL", 5), ("TCP_KEEPCNT", 4)):
        link.setsockopt(socket.IPPROTO_TCP, getattr(socket, name), value)
    link.setsockopt(socket.IPPROTO_TCP, socket.TCP_USER_TIMEOUT, 30_000)
    return link


def _no_rank0(meeting: Meeting) -> RankError:
    return RankError(
        f"rank 0 ended early, or {meeting.host}, port {meeting.port} is another program",
        "see the error of rank 0, or set MASTER_PORT to another free port",
    )


def _late(what: str, meeting: Meeting) -> RankError:
    return RankError(
        f"{what} within {meeting.seconds:g} s",
        f"start all ranks at about the same time, check MASTER_ADDR and MASTER_PORT, or set {TIMEOUT}",
    )


def _ranks(ranks: set[int]) -> str:
    names = ", ".join(map(str, sorted(ranks)))
    return f"rank {names}" if len(ranks) == 1 else f"ranks {names}"


def _sha256(text: str) -> bytes:
    return hashlib.sha256(text.encode()).digest()
