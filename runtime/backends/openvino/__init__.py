"""The OpenVINO backend, on the CPU. Start at backend.py."""
