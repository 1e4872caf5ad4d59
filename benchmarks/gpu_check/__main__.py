"""Run all parts of the check, and write a JSON file and a page of tables under docs/gpu/.

`python benchmarks/gpu_check` exits with 0 if every part that could run here passed, and with 1 if one failed
or if there is no usable GPU.
"""

from __future__ import annotations

import argparse
import json
import runpy
import secrets
import sys
import time
from pathlib import Path
from typing import Any

if not __package__:  # started by its path: run it again as a package
    sys.path[0] = str(Path(__file__).resolve().parents[1])
    runpy.run_module("gpu_check", run_name="__main__", alter_sys=True)
    sys.exit()

from . import ROOT, use_this_checkout
from .options import Options

_TIME_LIMIT = 465.0  # seconds


def main(argv: list[str] | None = None) -> int:
    use_this_checkout()
    arguments = _parser().parse_args(argv)
    if arguments.worker:
        from .parts import work

        name, options, file = json.loads(arguments.worker)
        work(name, Options(**options | {"share": tuple(options["share"])}), Path(file))
        return 0
    from .card import Unusable, current

    try:
        card = current()
    except Unusable as error:
        print(f"error: {error.message}\nhint: {error.hint}", file=sys.stderr)
        return 1
    seed = secrets.randbits(31) if arguments.seed is None else arguments.seed
    options = Options(seed, arguments.quick, arguments.engine)
    if arguments.tune:
        from . import tune
        from .report import machine

        return tune.run(card, seed, machine(card, options), arguments.output, arguments.time_limit)
    return _check(card, options, arguments)


def _check(card: Any, options: Options, arguments: argparse.Namespace) -> int:
    from .parts import PARTS, run_part
    from .report import machine, markdown, save

    wanted = [part for part in PARTS if part.name in (arguments.part or [part.name])]
    deadline = time.monotonic() + arguments.time_limit
    result: dict[str, Any] = {"machine": machine(card, options), "parts": {}}
    print(f"{card.name}, SM{card.sm}, seed {options.seed}")
    for part in wanted:
        print(f"{part.name} ...", flush=True)
        outcome = run_part(part, options, deadline - time.monotonic())
        result["parts"][part.name] = outcome
        print(f"  {outcome['status']}, {outcome['seconds']:.0f} s", flush=True)
        paths = save(result, arguments.output)  # after every part, so that a crash loses no results
    print(f"\n{markdown(result)}\nwritten: {', '.join(map(str, paths))}")
    failed = [name for name, outcome in result["parts"].items() if outcome["status"] == "failed"]
    if failed:
        print(f"error: failed: {', '.join(failed)}", file=sys.stderr)
        print(f"hint: {paths[0]} says what and where", file=sys.stderr)
    return 1 if failed else 0


def _parser() -> argparse.ArgumentParser:
    from .parts import PARTS

    parser = argparse.ArgumentParser(prog="gpu-check", description="Check and measure the kernels on a GPU.")
    parser.add_argument("--quick", action="store_true", help="fewer cases: about two minutes")
    parser.add_argument("--engine", metavar="BUNDLE", help="a TensorRT bundle to load and run")
    parser.add_argument("--tune", action="store_true", help="time other tiles instead of checking")
    parser.add_argument("--seed", type=int, help="of the random inputs (default: a new one)")
    parser.add_argument("--part", action="append", choices=[p.name for p in PARTS], help="only this part")
    parser.add_argument("--output", type=Path, default=ROOT / "docs" / "gpu", help="where results go")
    parser.add_argument("--time-limit", type=float, default=_TIME_LIMIT, help="seconds for all parts")
    parser.add_argument("--worker", help=argparse.SUPPRESS)
    return parser


if __name__ == "__main__":
    sys.exit(main())
