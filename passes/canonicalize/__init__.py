"""From the traced graph to the canonical one."""
