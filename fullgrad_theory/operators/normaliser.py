"""Normalisation layers: of no degree in their input with eps > 0; under `freeze`, linear in it."""

from .base import Algebra
from .registry import register

for _name, _signature in {
    "aten.layer_norm.default": "input*weight + bias",
    "aten.native_layer_norm.default": "input*weight + bias ; - ; -",
    "aten.group_norm.default": "input*weight + bias",
    "aten.rms_norm.default": "input*weight",
}.items():
    register(_name, Algebra.NORMALISER, _signature)

# with running statistics it would be affine, with running_mean a bias leaf
register(
    "aten.instance_norm.default",
    Algebra.NORMALISER,
    "input*weight + bias",
    refuses=lambda a: (
        None if a["use_input_stats"] else "instance norm with running statistics is a batch norm"
    ),
)
