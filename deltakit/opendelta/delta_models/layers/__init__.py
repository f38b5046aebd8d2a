"""Layers that delta models use."""
