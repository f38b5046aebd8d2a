"""OpenDelta's helpers, under its module names."""
