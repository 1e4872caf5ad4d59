"""The ground floor of the CPU engine: its C sources, how they are compiled, and the libraries. Start at engine.c."""
