"""Attribution maps: what each place in an image or a text contributes, by many methods."""

from .axes import Axes
from .explainer import Explainer, explain
from .map import Map
from .methods import METHODS, Method
from .ray import mean_along_ray

__all__ = ["METHODS", "Axes", "Explainer", "Map", "Method", "explain", "mean_along_ray"]
