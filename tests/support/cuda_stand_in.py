"""A stand-in for the NVIDIA driver: a libcuda.so.1 in C that calls Python.

cuda-python loads it where LD_LIBRARY_PATH says so. Memory is the host's, kernels run in Triton's interpreter,
and graphs are recorded and replayed. Calls arrive in `StandIn.event`.
"""

from __future__ import annotations

import ctypes
import os
import subprocess
import sys
from collections.abc import Callable, Iterable
from pathlib import Path
from typing import Any

import numpy as np

from llmc.plugins.paged_attention import launch
from llmc.plugins.sampling import launch as sampling
from support.gpu_bundle import ATTENTION, PAIR, kernels, sampling_kernels

_DRIVER = r"""
#include <stdint.h>
#include <stdlib.h>
#include <string.h>
typedef int R; typedef uint64_t U;
static U (*event)(const char *, U, U, U);
void stand_in(void *f) { event = f; }
#define SAY(name, a, b, c) (R)event(name, (U)(a), (U)(b), (U)(c))
static U room(U n) { return (n + 511) / 512 * 512; }
R cuInit(unsigned f) { return 0; }
R cuDeviceGetCount(int *n) { const char *v = getenv("LLMC_TEST_GPUS"); *n = v ? atoi(v) : 1; return 0; }
R cuDeviceGet(int *d, int o) { *d = o; return 0; }
R cuDriverGetVersion(int *v) { *v = 13040; return 0; }
R cuDeviceGetName(char *n, int l, int d) { strncpy(n, "stand-in", l); return 0; }
R cuDeviceGetAttribute(int *v, int a, int d) {
  *v = a == 75 ? 8 : a == 76 ? 9 : a == 16 ? 8 : a == 97 ? 101376 : -1; return 0; }
R cuDevicePrimaryCtxRetain(U *c, int d) { *c = 17; return SAY("retain", d, 0, 0); }
R cuDevicePrimaryCtxRelease(int d) { return SAY("release", 0, 0, 0); }
R cuCtxSetCurrent(U c) { return c == 17 ? 0 : 201; }
R cuStreamCreate(U *s, unsigned f) { *s = 34; return f == 1 ? SAY("stream", 0, 0, 0) : 1; }
R cuStreamDestroy(U s) { return SAY("drop stream", s, 0, 0); }
R cuStreamSynchronize(U s) { return SAY("wait", s, 0, 0); }
R cuStreamQuery(U s) { return SAY("ask", s, 0, 0); }
R cuMemGetInfo(U *f, U *t) { *f = (U)1 << 33; *t = (U)1 << 34; return 0; }
R cuMemAlloc(U *p, U n) { *p = (U)aligned_alloc(512, room(n)); memset((void *)*p, 255, n);
  return SAY("allocate", *p, n, 0); }
R cuMemFree(U p) { R r = SAY("free", p, 0, 0); free((void *)p); return r; }
R cuMemHostAlloc(U *p, U n, unsigned f) {
  *p = (U)aligned_alloc(512, room(n)); return SAY("pin", *p, n, 0); }
R cuMemFreeHost(U p) { R r = SAY("unpin", p, 0, 0); free((void *)p); return r; }
R cuMemcpyHtoDAsync(U d, const void *s, U n, U st) {
  memcpy((void *)d, s, n); return SAY("upload", d, n, st); }
R cuMemcpyDtoHAsync(void *d, U s, U n, U st) {
  memcpy(d, (void *)s, n); return SAY("download", s, n, st); }
R cuStreamBeginCapture(U s, int mode) { return mode == 1 ? SAY("begin capture", s, 0, 0) : 1; }
R cuStreamEndCapture(U s, U *g) { *g = 51; return SAY("end capture", s, 0, 0); }
R cuGraphInstantiateWithFlags(U *e, U g, U f) { *e = 0; return SAY("instantiate", e, g, f); }
R cuGraphUpload(U e, U s) { return SAY("upload graph", e, s, 0); }
R cuGraphDestroy(U g) { return 0; }
R cuGraphLaunch(U e, U s) { return SAY("replay", e, s, 0); }
R cuGraphExecDestroy(U e) { return SAY("drop graph", e, 0, 0); }
R cuModuleLoadData(U *m, const void *d) { *m = 0; return SAY("load", m, d, 0); }
R cuModuleUnload(U m) { return SAY("unload", m, 0, 0); }
R cuModuleGetFunction(U *f, U m, const char *n) { *f = m; return SAY("function", m, n, 0); }
R cuFuncLoad(U f) { return SAY("load function", f, 0, 0); }
R cuFuncSetAttribute(U f, int a, int v) { return SAY("attribute", f, a, v); }
R cuLaunchKernel(U f, unsigned gx, unsigned gy, unsigned gz, unsigned bx, unsigned by, unsigned bz,
                 unsigned shared, U s, void **parameters, void **extra) {
  U shape[8] = {gx, gy, gz, bx, by, bz, shared, s};
  return extra ? 1 : SAY("launch", f, shape, parameters); }
R cuGetErrorName(int e, const char **s) { *s = "CUDA_ERROR_STAND_IN"; return 0; }
R cuGetErrorString(int e, const char **s) { *s = "as it was told to"; return 0; }
static struct { const char *name; void *f; } table[] = { TABLE {0, 0}};
R cuGetProcAddress_v2(const char *name, void **f, int v, U flags, int *status) {
  *f = strcmp(name, "cuGetProcAddress") ? 0 : cuGetProcAddress_v2;
  for (int i = 0; table[i].name; i++) if (!strcmp(table[i].name, name)) *f = table[i].f;
  if (status) *status = !*f;
  return *f ? 0 : 500; }
R cuGetProcAddress(const char *name, void **f, int v, U flags) {
  return cuGetProcAddress_v2(name, f, v, flags, 0); }
"""


def compile_driver(compiler: str, folder: Path) -> None:
    """Compile libcuda.so.1 into `folder` with a C compiler."""
    functions = [line[2:].split("(")[0] for line in _DRIVER.splitlines() if line.startswith("R cu")]
    table = " ".join(f'{{"{name}", {name}}},' for name in functions if "ProcAddress" not in name)
    library, code = folder / "libcuda.so.1", folder / "driver.c"
    code.write_text(_DRIVER.replace("TABLE", table))
    subprocess.run([compiler, "-shared", "-fPIC", "-w", "-o", str(library), str(code)], check=True)


class StandIn:
    """The driver in Python: it keeps memory, runs kernels in Triton's interpreter and records graphs."""

    def __init__(self, fail: str = "", others: Iterable[launch.Variant] = ()) -> None:
        """fail: the event that fails. others: variants beside those of `gpu_bundle`."""
        self.fail, self.log = fail, []
        self.memory: dict[int, int] = {}
        self.modules: dict[int, str] = {}
        self.graphs: dict[int, list[Callable[[], None]]] = {}
        self.recording: list[Callable[[], None]] | None = None
        self._kind = ctypes.CFUNCTYPE(ctypes.c_uint64, ctypes.c_char_p, *[ctypes.c_uint64] * 3)
        self._callback = self._kind(self.event)
        ctypes.CDLL("libcuda.so.1").stand_in(self._callback)
        self.variants: dict[str, Any] = {str(v): v for v in launch.variants_for(ATTENTION, [PAIR])}
        self.variants |= {sampling.variant(name): name for name in sampling.ARGUMENTS}
        self.variants |= {str(v): v for v in others}
        files = (*kernels((89, "cubin")), *sampling_kernels((89, "cubin")))
        self.sizes = {str(v): (launch.configure(v, 89).num_warps, 0) for v in others}  # warps, shared memory
        self.sizes |= {file.variant: (file.num_warps, file.shared_memory) for file in files}
        self.downloads: list[int] = []  # bytes
        self.hangs = False  # whether work on the stream waits for something that does not come

    def event(self, name: bytes, a: int, b: int, c: int) -> int:
        try:
            self.log.append(what := name.decode())
            if what == self.fail:
                self.recording = None
                return 900
            return getattr(self, "on_" + what.replace(" ", "_"), lambda *_: None)(a, b, c) or 0
        except BaseException as error:  # would be lost in C
            print(what, repr(error), file=sys.stderr)
            os._exit(1)

    def submit(self, work: Callable[[], None]) -> None:
        (work() if self.recording is None else self.recording.append(work))

    def on_allocate(self, address: int, size: int, _: int) -> None:
        self.memory[address] = size

    def hang(self, hangs: bool) -> None:
        self.hangs = hangs

    def on_ask(self, *_: int) -> int:
        return 600 if self.hangs else 0  # CUDA_ERROR_NOT_READY

    def on_retain(self, device: int, *_: int) -> None:
        self.device = device

    def on_free(self, address: int, *_: int) -> None:
        del self.memory[address]

    on_pin, on_unpin = on_allocate, on_free

    def on_upload(self, address: int, size: int, stream: int) -> None:
        assert stream == 34
        assert self.recording is None
        self.view(address, np.uint8, (size,))  # lies in allocated memory

    def on_download(self, address: int, size: int, stream: int) -> None:
        self.on_upload(address, size, stream)
        self.downloads.append(size)

    def on_load(self, place: int, data: int, _: int) -> None:
        self.modules[handle := len(self.modules) + 1000] = ctypes.string_at(data).decode()
        ctypes.c_uint64.from_address(place).value = handle

    def on_unload(self, handle: int, *_: int) -> None:
        del self.modules[handle]

    def on_function(self, handle: int, name: int, _: int) -> None:
        assert ctypes.string_at(name).decode() == self.modules[handle].split("-")[0]

    def on_begin_capture(self, *_: int) -> None:
        assert self.recording is None
        self.recording = []

    def on_end_capture(self, *_: int) -> None:
        self.finished, self.recording = self.recording, None

    def on_instantiate(self, place: int, *_: int) -> None:
        assert self.finished
        self.graphs[handle := len(self.log)] = self.finished
        ctypes.c_uint64.from_address(place).value = handle

    def on_replay(self, handle: int, stream: int, _: int) -> None:
        assert stream == 34
        for work in self.graphs[handle]:
            work()

    def on_drop_graph(self, handle: int, *_: int) -> None:
        del self.graphs[handle]

    def view(self, address: int, dtype: Any, shape: tuple[int, ...]) -> np.ndarray:
        """Return device memory as an array. Memory that was not allocated is an error."""
        size = int(np.prod(shape)) * np.dtype(dtype).itemsize
        assert any(start <= address and address + size <= start + n for start, n in self.memory.items())
        return np.frombuffer((ctypes.c_uint8 * size).from_address(address), dtype).reshape(shape)

    def on_launch(self, function: int, shape: int, parameters: int) -> None:
        name = self.modules[function]
        variant = self.variants[name]
        *sizes, stream = (ctypes.c_uint64 * 8).from_address(shape)
        warps, shared = self.sizes[name]
        assert sizes[3:] == [32 * warps, 1, 1, shared]
        assert stream == 34
        types = sampling.ARGUMENTS.get(variant) or launch.signature(variant)
        places = (ctypes.c_void_p * (len(types) + 2)).from_address(parameters)
        raw = [ctypes.string_at(place, 8) for place in places]
        assert raw[-2:] == [bytes(8)] * 2
        self.submit(
            lambda: self.run(variant, tuple(sizes[:3]), dict(zip(types.items(), raw[:-2], strict=True)))
        )

    def run(self, variant: Any, grid: tuple[int, ...], raw: dict[tuple[str, str], bytes]) -> None:
        import torch

        from llmc.plugins.paged_attention import kernels as attention_kernels
        from llmc.plugins.sampling import kernels as sampling_kernels

        arguments: dict[str, Any] = {}
        for (name, type_), data in raw.items():
            if not type_.startswith("*"):
                arguments[name] = np.frombuffer(data, {"i32": np.int32, "fp32": np.float32}[type_])[0].item()
                continue
            address = int.from_bytes(data, "little")
            dtype = {
                "*bf16": torch.bfloat16, "*fp16": torch.float16, "*fp32": torch.float32,
                "*i32": torch.int32, "*i64": torch.int64, "*u8": torch.uint8,
            }[type_]  # fmt: skip
            if not address:
                arguments[name] = torch.full((1,), float("nan"))
                continue
            start, size = next((s, n) for s, n in self.memory.items() if s <= address < s + n)
            left = (start + size - address) // dtype.itemsize * dtype.itemsize
            arguments[name] = torch.frombuffer((ctypes.c_uint8 * left).from_address(address), dtype=dtype)
        if variant in sampling.ARGUMENTS:
            constants = sampling.configure(variant).constants
            getattr(sampling_kernels, variant)[grid](**arguments, **constants)
        else:
            constants = launch.configure(variant, 89).constants
            getattr(attention_kernels, variant.kernel)[grid](**arguments, **constants)
