"""The names of what an operation can be: its algebraic class, and its roles. Needs no torch."""

from __future__ import annotations

from enum import StrEnum


class Algebra(StrEnum):
    """The algebraic classes; what each brings is in `classes.CLASSES`."""

    STRUCTURAL = "structural"
    AFFINE = "affine"
    MULTILINEAR = "multilinear"
    HOMOGENEOUS = "homogeneous"
    PIECEWISE = "piecewise linear"
    ZERO_ORIGIN = "zero-origin elementwise"
    ELEMENTWISE = "elementwise"
    NORMALISER = "normaliser"
    ATTENTION = "attention"
    SMOOTH = "smooth"
    SINGULAR = "singular"
    FREEZING = "freezing"
    FACTORY = "factory"
    COMPOSITE = "composite"


class Role(StrEnum):
    """What an operation is used for, where the class does not tell: rooms ask for these, not for
    names. `register(..., roles=(Role.SOFTMAX,))`."""

    ADDITION = "addition"
    """the sum of two tensors, which may join a residual branch to its stream"""
    QUOTIENT = "quotient"
    """one tensor by another"""
    SUM = "sum"
    """a sum over given dimensions"""
    REDUCTION = "reduction"
    """a value over given dimensions of its first operand: mean, sum, largest, smallest"""
    CAST = "cast"
    """element by element its operand, in another dtype, place or layout"""
    LOOKUP = "lookup"
    """rows of a table by integers: where integers come in, attribution ends at its result"""
    INDICATOR = "indicator"
    """1 or true where an integer is a given one: a product with it looks a row of a table up"""
    WINDOW = "window"
    """a result belongs to the operand's places under its stride: convolution, pooling, resizing"""
    WEIGHTED = "weighted"
    """a layer with weights: linear, convolution"""
    LINEAR = "linear"
    """the linear layer: it mixes the last dimension"""
    CONTRACTION = "contraction"
    """a @ b: the last dimension of the first operand with the last but one of the second"""
    EQUATION = "equation"
    """a product that its first argument writes down, as einsum does"""
    TOKEN_PRODUCT = "token product"
    """the products that attention over tokens is written with"""
    SOFTMAX = "softmax"
    """weights over one dimension that are positive and sum to 1"""
    POINTWISE = "pointwise"
    """element by element its operands, where torch's own tag does not say so"""
    PROBABILITY = "probability"
    """its value is a probability or the logarithm of one, and no logit"""
