"""A name under which other programs import what they need."""

from library.training.hub import upload

__all__ = ["upload"]
