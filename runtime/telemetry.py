"""Switch off the telemetry of the libraries that llmc imports.

ONNX Runtime sends events to Microsoft from its import on: it writes a device id and an event database to the
home directory. OpenVINO's converter reports its import to Google Analytics. huggingface_hub adds the versions
of installed libraries to every request.
"""

from __future__ import annotations

import os
import sys

# Read when the library is imported, so they must be set before.
VARIABLES = {"ORT_DISABLE_TELEMETRY": "1", "HF_HUB_DISABLE_TELEMETRY": "1"}
_OPENVINO_PACKAGE = "openvino_telemetry"


def disable_telemetry() -> None:
    """Switch telemetry off in this process and in those that inherit its environment.

    OpenVINO has no variable for this. Without its telemetry package it uses a stub that sends nothing.
    """
    os.environ.update(VARIABLES)
    sys.modules.setdefault(_OPENVINO_PACKAGE, None)  # type: ignore[arg-type]  # an import raises ImportError
