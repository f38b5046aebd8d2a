"""Deltas for any frozen PyTorch backbone."""
