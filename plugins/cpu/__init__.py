"""The native CPU engine: its C sources, the build of its libraries, and their use. Start at engine.c."""
