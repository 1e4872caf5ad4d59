"""Write the weight files of an engine."""
