"""llmc: compiles large language models ahead of time into verified bundles, and runs them."""

__version__ = "0.1.0"
