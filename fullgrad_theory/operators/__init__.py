"""What each operation is: tables by algebraic class, one line an operation."""

from . import elementwise, freezing, homogeneous, linear, normaliser, smooth, structural
from .base import LEMMAS, Algebra, Call, Mode, Operand, Operator, Relation, bind, target_name
from .registry import lookup, register, registered

__all__ = [
    "LEMMAS",
    "Algebra",
    "Call",
    "Mode",
    "Operand",
    "Operator",
    "Relation",
    "bind",
    "lookup",
    "register",
    "registered",
    "target_name",
]

TABLES = (structural, linear, homogeneous, elementwise, normaliser, smooth, freezing)
