"""Write the files of an engine's weights."""
