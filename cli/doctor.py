"""`llmc doctor`: check that this machine has what llmc needs."""

from __future__ import annotations

import re
from dataclasses import asdict, dataclass

from llmc import __version__
from llmc.cli.errors import error_of
from llmc.cli.machine import Machine
from llmc.cli.output import Json, print_json
from llmc.cli.text import count, size, table
from llmc.runtime.errors import BackendError, LlmcError

_REQUIREMENT = re.compile(r"\s*([A-Za-z0-9._-]+)\s*([^;]*?)\s*(?:;\s*(.*))?")
_USES = {  # extra of llmc, "" for the installation without extras -> what needs its libraries
    "": "llmc run",
    "build": "llmc build",
    "openvino": "--engine openvino",
    "onnxruntime": "--engine onnxruntime",
    "kernels": "GPU kernels",
    "tensorrt-rtx": "tensorrt-rtx",
    "tensorrt": "tensorrt",
}
_GPU_TARGETS = ("tensorrt-rtx", "tensorrt")


@dataclass(frozen=True)
class Library:
    """A library that llmc requires."""

    name: str
    #: The extra of llmc that installs it; "" for a library that `llmc run` needs.
    extra: str
    #: The required version, such as ">=1.2,==1.*".
    wanted: str
    #: The installed version; None if it is missing.
    version: str | None

    @property
    def fits(self) -> bool:
        """Whether a suitable version is installed."""
        return self.version is not None and satisfies(self.version, self.wanted)

    @property
    def remark(self) -> str:
        """The problem and how to solve it; "" if the library fits."""
        if self.fits:
            return ""
        from llmc.runtime.installation import install_hint

        return f"{'missing' if self.version is None else 'the wrong version'}: {install_hint(self.extra)}"


def doctor(
    as_json: Json = False,
) -> None:
    """Check whether this machine has what llmc needs.

    The command fails if no engine can run on this CPU. Libraries that only `llmc build`, GPU engines or the
    other CPU engines need may be missing.
    """
    from llmc.runtime.installation import install_hint

    machine = Machine.current()
    required = libraries()
    native, native_fault = native_engine()
    nccl = nccl_version()
    installed = any(library.extra == "openvino" and library.version for library in required)
    attention = attention_fault() if installed else None
    openvino = "its attention passed the test" if installed else "not installed"
    if attention:
        openvino = attention.message
    fault: LlmcError | None = None
    if native_fault and (attention or not installed):
        fault = BackendError(
            f"no engine works here: the native engine: {native_fault}; OpenVINO: {openvino}",
            install_hint("openvino"),
        )
    if broken := [library for library in required if library.extra == "" and not library.fits]:
        name, version, wanted = broken[0].name, broken[0].version, broken[0].wanted
        problem = f"{name} is missing" if version is None else f"{name} is {version}, not {wanted}"
        fault = BackendError(f"`llmc run` cannot work here: {problem}", install_hint())
    if as_json:
        print_json(
            {
                "llmc": __version__,
                "machine": asdict(machine),
                "libraries": [{**asdict(library), "fits": library.fits} for library in required],
                "openvino_attention": {
                    "passed": installed and attention is None,
                    "fault": None if installed and attention is None else openvino,
                },
                "native_engine": {"library": native, "fault": native_fault},
                "nccl": nccl,
                "run": fault is None,
                "build": complete(required, "", "build"),
                **{target: complete(required, "", "build", "kernels", target) for target in _GPU_TARGETS},
            },
            error_of(fault) if fault else None,
        )
    else:
        facts = [
            ("llmc", __version__),
            ("python", machine.python),
            ("system", machine.system),
            (
                "processor",
                f"{machine.cpu}, {count(machine.cores, 'logical CPU')} for this process{_quota(machine)}",
            ),
            ("memory", _memory(machine)),
            ("native engine", native or native_fault or ""),
            ("OpenVINO", openvino),
            ("NCCL", nccl or "not installed; it is for several ranks on GPUs (`--tp`)"),
        ]
        rows = [("LIBRARY", "FOR", "WANTED", "INSTALLED", "")]
        rows += [(lib.name, _USES[lib.extra], lib.wanted, lib.version or "-", lib.remark) for lib in required]
        print(f"{table(facts)}\n\n{table(rows)}")
    if fault:
        raise fault


def libraries() -> list[Library]:
    """Return the libraries that the installed llmc requires, and the installed versions."""
    from importlib.metadata import requires

    from llmc.runtime.installation import DISTRIBUTION

    required = []
    for line in requires(DISTRIBUTION) or []:
        match = _REQUIREMENT.fullmatch(line)
        assert match is not None, line
        name, wanted, marker = match[1], match[2], match[3] or ""
        extra = re.search(r"extra == ['\"](.+?)['\"]", marker)
        if (extra is None and marker) or (extra and extra[1] not in _USES):
            continue  # needed by another version of Python, or by developers
        required.append(Library(name, extra[1] if extra else "", wanted, _installed(name)))
    return required


def complete(found: list[Library], *extras: str) -> bool:
    """Return whether every library of these extras is installed in a version that fits."""
    return all(library.fits for library in found if library.extra in extras)


def satisfies(version: str, wanted: str) -> bool:
    """Return whether `version` satisfies `wanted`, such as ">=1.2,==1.*". Ignores other operators."""
    for clause in filter(None, wanted.replace(" ", "").split(",")):
        operator, number = clause[:2], clause[2:]
        prefix = number.endswith(".*")
        asked = _numbers(number.removesuffix(".*"))
        got = _numbers(version)
        if operator == "==" and (got[: len(asked)] if prefix else got) != asked:
            return False
        if operator == ">=" and got < asked:
            return False
    return True


def attention_fault() -> LlmcError | None:
    """Run the start-up test of the OpenVINO backend. Return its error, or None."""
    from llmc.runtime.installation import install_hint

    try:
        from llmc.runtime.backends.openvino.backend import tested_core

        tested_core()
    except ImportError as error:
        return BackendError(f"OpenVINO cannot be imported: {error}", install_hint("openvino"))
    except LlmcError as error:
        return error
    except Exception as error:  # the operator is private: another OpenVINO may refuse it in any way
        reason = (str(error).strip().splitlines() or [type(error).__name__])[0]
        return BackendError(f"OpenVINO refuses its own attention: {reason}", install_hint("openvino"))
    return None


def native_engine() -> tuple[str | None, str | None]:
    """Return (name of the native engine's library for this CPU, None), or (None, why there is none)."""
    from llmc.plugins.cpu import library

    try:
        return library.choose(), None
    except OSError as error:
        return None, str(error)


def nccl_version() -> str | None:
    """Return the version of NCCL that ranks on GPUs would use; None if there is none."""
    from llmc.runtime.backends.tensorrt.nccl import Nccl

    try:
        return Nccl().version()
    except BackendError:
        return None


def _installed(name: str) -> str | None:
    from importlib.metadata import PackageNotFoundError, version

    try:
        return version(name)
    except PackageNotFoundError:
        return None


def _numbers(version: str) -> list[int]:
    """Return the numbers of a version: "2.13.0+cpu" -> [2, 13, 0]."""
    match = re.match(r"[0-9]+(\.[0-9]+)*", version)
    return [int(part) for part in match[0].split(".")] if match else []


def _memory(machine: Machine) -> str:
    if machine.memory is None or machine.available_memory is None:
        return "unknown"
    limit = " (the container's limit)" if machine.memory == machine.memory_limit else ""
    return f"{size(machine.memory)}{limit}, {size(machine.available_memory)} of it available"


def _quota(machine: Machine) -> str:
    return " (the container's CPU quota)" if machine.cores == machine.cpu_quota else ""
