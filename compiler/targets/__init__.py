"""What each target needs of the canonical graph."""
