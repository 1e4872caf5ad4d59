"""The compiler, from a checkpoint to a verified bundle: start at driver.py."""
