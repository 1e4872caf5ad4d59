"""From the canonical graph to what one engine takes."""
