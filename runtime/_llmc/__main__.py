"""`python -m llmc` is the command `llmc`."""

import sys

from llmc.cli.main import main

sys.exit(main())
