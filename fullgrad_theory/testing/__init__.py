"""Random architectures, the properties that hold of every one, and campaigns over many."""

from .campaign import Campaign, shrink
from .properties import Outcome, PropertyError, check_properties
from .strategies import Architecture, architectures, random_architecture, weight

__all__ = [
    "Architecture",
    "Campaign",
    "Outcome",
    "PropertyError",
    "architectures",
    "check_properties",
    "random_architecture",
    "shrink",
    "weight",
]
