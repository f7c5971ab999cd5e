"""What each operation is: tables by algebraic class, one line an operation."""

from . import (
    composite,
    elementwise,
    freezing,
    homogeneous,
    libraries,
    linear,
    normaliser,
    smooth,
    structural,
)

TABLES = (
    structural.TABLE,
    linear.TABLE,
    homogeneous.TABLE,
    elementwise.TABLE,
    normaliser.TABLE,
    smooth.TABLE,
    freezing.TABLE,
    composite.TABLE,
)
LIBRARIES = libraries.TABLE
