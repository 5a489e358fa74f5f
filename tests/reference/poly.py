"""Polytropon: LoRAs mixed by a task's weights."""

from reference.mhr import output

__all__ = ["output"]
