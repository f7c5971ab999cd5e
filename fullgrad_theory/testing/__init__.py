"""Random architectures, the properties that hold of every one, and campaigns over many."""

from .strategies import Architecture, architectures, random_architecture, weight

__all__ = ["Architecture", "architectures", "random_architecture", "weight"]
