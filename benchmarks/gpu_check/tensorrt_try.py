"""Load a TensorRT bundle (`--engine BUNDLE`) with llmc's runtime and generate a few tokens."""

from __future__ import annotations

import importlib
import time
from collections.abc import Iterator
from pathlib import Path

from .options import Options, Row

_PROMPT = [1, 2, 3, 4, 5]
_TOKENS = 8


def rows(options: Options) -> Iterator[Row]:
    name = f"engine {Path(options.engine).name}" if options.engine else "engine"
    if not options.engine:
        yield {"name": name, "status": "absent", "error": "no --engine BUNDLE was given"}
        return
    row: Row = {"name": name}
    try:
        library = _library(options.engine)
        version = importlib.import_module(library).__version__
    except ImportError as error:
        yield row | {"status": "absent", "error": f"{type(error).__name__}: {error}"}
        return
    except Exception as error:
        yield row | {"status": "failed", "error": _describe(error)}
        return
    row["library"] = f"{library} {version}"
    begin = time.perf_counter()
    try:
        from llmc.runtime.load import load_engine
        from llmc.runtime.sampling import SamplingParams

        engine = load_engine(options.engine)
        loaded = time.perf_counter()
        output = engine.generate([_PROMPT], SamplingParams(max_tokens=_TOKENS, temperature=0.0))[0]
        row |= {"load_seconds": loaded - begin, "seconds": time.perf_counter() - loaded}
        yield row | {"status": "passed", "token_ids": list(output.token_ids), "text": output.text}
    except Exception as error:
        yield row | {"status": "failed", "error": _describe(error)}


def _library(engine: str) -> str:
    """Return the Python module of the TensorRT that the bundle was built for."""
    from llmc.runtime.backends.tensorrt.checks import MODULES
    from llmc.runtime.bundle.reader import Bundle

    return MODULES[Bundle.open(engine, verify_hashes=False).manifest.target.engine]


def _describe(error: Exception) -> str:
    hint = getattr(error, "hint", "")
    return f"{type(error).__name__}: {error}" + (f" ({hint})" if hint else "")
