"""llmc: compiles large language models ahead of time into verified bundles, and runs them."""

from llmc.runtime.telemetry import disable_telemetry

__version__ = "0.1.0"

disable_telemetry()  # here, because every process of llmc imports this first
