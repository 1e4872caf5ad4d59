"""Operators that combine values of several ranks."""
