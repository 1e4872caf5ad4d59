"""`python -m llmc` is the command `llmc`."""

from llmc.cli.start import script

if __name__ == "__main__":
    script()
