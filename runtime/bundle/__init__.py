"""The bundle format: FORMAT.md."""
