"""SaveLoadMixin, under its name in OpenDelta."""

from deltakit.opendelta.loading import SaveLoadMixin

__all__ = ["SaveLoadMixin"]
