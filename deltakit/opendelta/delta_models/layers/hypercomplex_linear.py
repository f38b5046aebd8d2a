"""The linear layer of Compacter, under its name in OpenDelta."""

from deltakit.methods.compacter import PHMLinear

__all__ = ["PHMLinear"]
