"""Runs the property tests with one new seed after another, until a test fails or the time is up.

A failure is printed as soon as it is known, with the command that repeats it. Without one the exit code is 0.
"""

from __future__ import annotations

import argparse
import os
import random
import shlex
import signal
import subprocess
import sys
import tempfile
import time

FAILURES = "LLMC_TEST_FAILURES"  # the file that conftest.py writes failures to
COMMAND = (sys.executable, "-m", "pytest", "-q", "-m", "hypothesis", "--hypothesis-profile=fuzz")


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--seconds", type=float, default=120)
    parser.add_argument("tests", nargs="*", default=["tests"], help="files or directories (default: tests)")
    options = parser.parse_args()
    end, rounds = time.monotonic() + options.seconds, 0
    while (left := end - time.monotonic()) > 0:
        command = [*COMMAND, f"--hypothesis-seed={random.getrandbits(32)}", *options.tests]
        with tempfile.NamedTemporaryFile("r") as failures:
            code = run([*command, "-n", "auto", "--maxfail=1"], left, {FAILURES: failures.name})
            found = failures.read()
        if found or code:
            print(f"\n{found}\nto repeat it: {shlex.join(command)}", flush=True)
            return code or 1
        if code is None:
            break
        rounds += 1
    print(f"no failure in {rounds} rounds and the beginning of another")
    return 0


def run(command: list[str], seconds: float, environment: dict[str, str]) -> int | None:
    """The exit code of a command, or None if `seconds` end it; its children end with it."""
    with subprocess.Popen(command, start_new_session=True, env=os.environ | environment) as process:
        try:
            return process.wait(seconds)
        except subprocess.TimeoutExpired:
            os.killpg(process.pid, signal.SIGKILL)
            return None
        except KeyboardInterrupt:
            os.killpg(process.pid, signal.SIGKILL)
            raise


if __name__ == "__main__":
    sys.exit(main())
