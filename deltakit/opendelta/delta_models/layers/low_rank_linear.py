"""The linear layer of low-rank adapters, under its name in OpenDelta."""

from deltakit.methods.low_rank_adapter import LowRankLinear

__all__ = ["LowRankLinear"]
