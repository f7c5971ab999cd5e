"""Attribution maps: what each place in an image contributes to an output, by many methods."""

from .explainer import Explainer, explain
from .map import Map
from .methods import METHODS, Method
from .ray import mean_along_ray

__all__ = ["METHODS", "Explainer", "Map", "Method", "explain", "mean_along_ray"]
