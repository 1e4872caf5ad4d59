"""OpenVINO on the CPU: start at backend.py."""
