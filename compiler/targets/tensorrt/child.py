"""The child process that `build.py` starts. Its task is an EngineJob, its result a BuiltEngine."""

from __future__ import annotations

import ctypes
import hashlib
import importlib
import os
import resource
import sys
import threading
import time
from collections import Counter
from collections.abc import Mapping
from dataclasses import asdict
from typing import Any

from llmc.compiler.child_process import Messages, serve
from llmc.compiler.targets.tensorrt.build import BuiltEngine, EngineJob
from llmc.compiler.targets.tensorrt.errors import REPORT, explain
from llmc.compiler.targets.tensorrt.mapped_pages import kept_small
from llmc.plugins.collectives import tensorrt_plugin as collectives
from llmc.plugins.paged_attention import tensorrt_plugin as attention
from llmc.runtime.errors import BuildError, UnsupportedError

_STEPS = 1000  # of the progress bar
_ADDR_NO_RANDOMIZE, _ASK = 0x0040000, 0xFFFFFFFF  # personality(2)


def _logger(trt: Any) -> Any:
    class Logger(trt.ILogger):
        def __init__(self) -> None:
            trt.ILogger.__init__(self)
            self.errors: list[str] = []

        def log(self, severity: Any, message: str) -> None:
            if severity <= trt.ILogger.ERROR:
                self.errors.append(message)
                print(message, file=sys.stderr, flush=True)

    return Logger()


def _monitor(trt: Any, messages: Messages) -> Any:
    class Monitor(trt.IProgressMonitor):
        """Reports the progress of a build. Phases nest: an unfinished step counts by its inner phase."""

        def __init__(self) -> None:
            trt.IProgressMonitor.__init__(self)
            self._phases: dict[str, tuple[str | None, int, int]] = {}  # name -> parent, steps, steps done
            self._said = 0
            self._lock = threading.Lock()

        def phase_start(self, name: str, parent: str | None, steps: int) -> None:
            with self._lock:
                self._phases[name] = (parent, steps, 0)

        def step_complete(self, name: str, step: int) -> bool:
            with self._lock:
                parent, steps, _ = self._phases[name]
                self._phases[name] = (parent, steps, step + 1)
                now = int(_STEPS * self._done(None))
                if now <= self._said:
                    return True
                self._said = now
            try:
                messages.bar(now, _STEPS)
            except OSError:
                return False  # the parent is gone: stop the build
            return True

        def phase_finish(self, name: str) -> None:
            with self._lock:
                self._phases.pop(name, None)

        def _done(self, inside: str | None) -> float:
            """Return the finished share, 0 to 1, of the first phase whose parent is `inside`."""
            for name, (parent, steps, done) in self._phases.items():
                if parent == inside:
                    return min(1.0, (done + (self._done(name) if done < steps else 0.0)) / steps)
            return 0.0

    return Monitor()


def _writer(trt: Any, path: str) -> Any:
    class Writer(trt.IStreamWriter):
        """Writes the engine to the file in pieces, so that memory never holds all of it."""

        def __init__(self) -> None:
            trt.IStreamWriter.__init__(self)
            self.file, self.digest, self.error = open(path, "wb"), hashlib.sha256(), ""  # noqa: SIM115

        def write(self, data: bytes) -> int:
            try:
                self.file.write(data)
            except OSError as error:
                self.error = str(error.strerror)
                return 0
            self.digest.update(data)
            return len(data)

    return Writer()


def _modules(path: str) -> dict[str, str]:
    """Return node name -> module of the checkpoint. Raises BuildError for a file that is no ONNX model."""
    import onnx

    try:
        graph = onnx.load(path, load_external_data=False).graph
    except Exception as error:  # protobuf's own kinds
        raise BuildError(
            f"the graph file {os.path.basename(path)} is damaged: {error}", "build again"
        ) from error
    return {
        node.name: prop.value
        for node in graph.node
        for prop in node.metadata_props
        if prop.key == "llmc.module"
    }


def _parse(parser: Any, path: str, modules: Mapping[str, str]) -> None:
    if parser.parse_from_file(path):
        return
    errors = [parser.get_error(index) for index in range(parser.num_errors)]
    for error in errors:
        if name := error.node_name():
            raise BuildError(
                f"TensorRT's parser refuses operator {error.node_operator()} of module "
                f"{modules.get(name, name)}: {error.desc()}",
                REPORT,
            )
    raise explain([error.desc() for error in errors], modules)


def _configure(trt: Any, builder: Any, job: EngineJob) -> Any:
    config = builder.create_builder_config()
    config.set_preview_feature(trt.PreviewFeature.ALIASED_PLUGIN_IO_10_03, True)
    if hasattr(trt.BuilderFlag, "REQUIRE_USER_ALLOCATION"):  # RTX: steps can be captured as CUDA graphs
        config.set_flag(trt.BuilderFlag.REQUIRE_USER_ALLOCATION)
    if job.compute_capabilities:
        config.num_compute_capabilities = len(job.compute_capabilities)
    for index, sm in enumerate(job.compute_capabilities):
        if not config.set_compute_capability(getattr(trt.ComputeCapability, f"SM{sm}"), index):
            raise UnsupportedError(f"this TensorRT builds no engine for SM{sm}", "leave it out of --sm")
    shapes = builder.create_optimization_profile()
    for name, (least, best, most) in job.profile.items():
        shapes.set_shape(name, tuple(least), tuple(best), tuple(most))
    if config.add_optimization_profile(shapes) < 0:
        raise BuildError("TensorRT refuses the range of shapes", REPORT)
    return config


def _build(job: EngineJob, messages: Messages) -> BuiltEngine:
    trt = importlib.import_module(job.library)
    modules = _modules(job.onnx)
    logger, creators = _logger(trt), [attention.make_plugin(trt), *collectives.make_plugins(trt)]
    for creator in creators:
        trt.get_plugin_registry().register_creator(creator, attention.NAMESPACE)
    builder = trt.Builder(logger)
    flags = 1 << int(trt.NetworkDefinitionCreationFlag.STRONGLY_TYPED)
    network = builder.create_network(flags)
    start = time.perf_counter()
    _parse(trt.OnnxParser(network, logger), job.onnx, modules)
    parsed = time.perf_counter()
    config = _configure(trt, builder, job)
    monitor = _monitor(trt, messages)  # lives as long as the build, like the creators
    config.progress_monitor = monitor
    writer = _writer(trt, job.plan)
    try:
        with writer.file, kept_small(".safetensors"):
            built = builder.build_serialized_network_to_stream(network, config, writer)
    except OSError as error:  # the last bytes were not written; earlier errors are in writer.error
        built, writer.error = False, writer.error or str(error.strerror)
    if writer.error:
        raise BuildError(f"cannot write the engine: {writer.error}", "make room on the disk")
    if not built:
        raise explain(logger.errors, modules)
    messages.bar(_STEPS, _STEPS)  # TensorRT skips the last steps of its own count
    plugins = _count_plugins(trt, network)
    return BuiltEngine(
        plan_bytes=os.path.getsize(job.plan),
        plan_sha256=writer.digest.hexdigest(),
        attention_layers=plugins[attention.NAME],
        collectives=sum(plugins[name] for name in collectives.NAMES),
        library_version=trt.__version__,
        seconds={"parse": round(parsed - start, 3), "build": round(time.perf_counter() - parsed, 3)},
        peak_bytes=resource.getrusage(resource.RUSAGE_SELF).ru_maxrss << 10,
    )


def _count_plugins(trt: Any, network: Any) -> Counter[str]:
    layers = [network.get_layer(i) for i in range(network.num_layers)]
    found: Counter[str] = Counter()
    for layer in layers:
        if layer.type == trt.LayerType.PLUGIN_V3:
            layer.__class__ = trt.IPluginV3Layer
            found[layer.plugin.plugin_name] += 1
    return found


def _fix_addresses() -> None:
    """Start this process again without address space layout randomization, if Linux allows it.

    TensorRT-RTX 1.7.1 numbers symbolic dimensions in the order of memory addresses and stores the numbers in
    the engine. With random addresses, two engines compute the same but differ in their bytes. For the same
    reason the lowered graph names only one dimension.
    """
    try:
        personality = ctypes.CDLL(None).personality
    except (AttributeError, OSError):
        return  # not Linux
    now = personality(ctypes.c_ulong(_ASK))
    if now < 0 or now & _ADDR_NO_RANDOMIZE:
        return
    personality(ctypes.c_ulong(now | _ADDR_NO_RANDOMIZE))
    if personality(ctypes.c_ulong(_ASK)) & _ADDR_NO_RANDOMIZE:  # containers may forbid it
        os.execv(sys.executable, [sys.executable, "-m", "llmc.compiler.targets.tensorrt.child"])


def _handle(task: dict[str, Any], messages: Messages) -> dict[str, Any]:
    return asdict(_build(EngineJob(**task), messages))


if __name__ == "__main__":
    _fix_addresses()
    serve(_handle)
