"""Images of textured objects with exact masks, made on the fly: data for when there are none.

A class is a texture and a shape, so neither alone tells it; colours, places, angles, backgrounds
and clutter are drawn independently of the class. The label is the class of the largest object.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass

import numpy as np
import torch
from numpy.typing import NDArray
from torch.utils.data import Dataset

from ..errors import InputError
from .sample import Sample

SHAPES = ("circle", "triangle", "cross")
TEXTURES = ("striped", "dotted", "checkered")
CLASSES = tuple(f"{texture} {shape}" for texture in TEXTURES for shape in SHAPES)
KEEP = ("all", "others", "none")

OBJECTS, CLUTTER = 3, 3
CANDIDATES = 32  # places tried for an object before it is left out
UNIFORMS = 512  # numbers an item may draw
TURN = 0.2  # figures and patterns are turned by up to as much, in radians
Range = tuple[float, float]  # of a channel, for the dark and for the light colour
GROUND: tuple[Range, Range] = ((0.0, 0.3), (0.0, 0.3))
FIGURE: tuple[Range, Range] = ((0.15, 0.5), (0.6, 1.0))
CHUNK = 64  # images rendered at a time: they fit into the cache

Array = NDArray[np.floating]
Mask = NDArray[np.bool_]
Ints = NDArray[np.int64]
Predicate = Callable[[Array, Array], Mask]

# Every figure has the area of the circle of radius 1. `REACH`: the farthest point from its centre.
SQUARE, EVERYWHERE = 3, 4
REACH = np.array([1.0, 1.555, 1.49, 1.253], np.float32)
FIGURES: tuple[Predicate, ...] = (
    lambda x, y: x * x + y * y < 1,
    lambda x, y: np.maximum(np.abs(x) * 3**0.5 - y, 2 * y) < 2 * 0.7775,
    lambda x, y: (
        (np.maximum(np.abs(x), np.abs(y)) < 1.459) & (np.minimum(np.abs(x), np.abs(y)) < 0.3)
    ),
    lambda x, y: np.maximum(np.abs(x), np.abs(y)) < 0.8862,
    lambda x, y: np.ones(x.shape, bool),
)

# Each covers half of the plane; x and y count periods, taken modulo 1 around 0.
PLAIN = 3
PATTERNS: tuple[Predicate, ...] = (
    lambda x, y: np.abs(x) < 0.25,
    lambda x, y: x * x + y * y < 1 / (2 * np.pi),
    lambda x, y: (x < 0) ^ (y < 0),
    lambda x, y: np.ones(x.shape, bool),
)


@dataclass(frozen=True)
class Rendered:
    """`images`: (B, 3, H, W) uint8; `classes`: (B, 3) of the objects, -1 for none, the first being
    the label; `masks`: (B, 3, H, W) bool of the same objects."""

    images: NDArray[np.uint8]
    classes: Ints
    masks: Mask


@dataclass(frozen=True)
class Layer:
    """One figure of every image, all of shape (B,), colours (B, 2, 3) in [0, 1], lengths in pixels.
    `figure` and `pattern` count in `FIGURES` and `PATTERNS`; `shown`: whether it is painted."""

    figure: Ints
    pattern: Ints
    colours: Array
    centre: Array
    radius: Array
    angle: Array
    period: Array
    phase: Array
    pattern_angle: Array
    shown: Mask


class Scenes(Dataset[Sample]):
    """`n` images of one to three objects of `CLASSES` among clutter, as `Sample`s in [-1, 1].

    `size`: H = W, or (H, W), at least 16; item i depends on `seed` and i alone. `keep`: "others"
    draws the very same scenes without the labelled object, "none" without any; labels and masks
    stay those of the full scene. So one sees what a model knows that does not see the object.
    """

    def __init__(
        self, n: int, seed: int = 0, size: int | tuple[int, int] = 64, keep: str = "all"
    ) -> None:
        self.size = (size, size) if isinstance(size, int) else (size[0], size[1])
        if n < 1 or seed < 0 or min(self.size) < 16:
            raise InputError(
                f"scenes need n >= 1, seed >= 0 and a size of at least 16, got {n}, {seed}, {size}"
            )
        if keep not in KEEP:
            raise InputError(f"keep is one of {', '.join(KEEP)}, got {keep!r}")
        self.n, self.seed, self.keep = n, seed, keep

    def __len__(self) -> int:
        return self.n

    def __iter__(self) -> Iterator[Sample]:
        for start in range(0, self.n, CHUNK):
            items = range(start, min(start + CHUNK, self.n))
            yield from _samples(self.render(items))

    def __getitem__(self, index: int) -> Sample:
        if not -self.n <= index < self.n:
            raise IndexError(f"item {index} of {self.n} scenes")
        return next(_samples(self.render([index % self.n])))

    def render(self, items: Sequence[int] | None = None) -> Rendered:
        """The images of `items` (None: all), in bytes: the fast way to many."""
        items = range(self.n) if items is None else items
        chunks = [items[i : i + CHUNK] for i in range(0, len(items), CHUNK)]
        parts = [_render(self.seed, chunk, self.size, self.keep) for chunk in chunks]
        return Rendered(
            np.concatenate([p.images for p in parts]),
            np.concatenate([p.classes for p in parts]),
            np.concatenate([p.masks for p in parts]),
        )


def caption(classes: Sequence[int]) -> str:
    """In words: "a striped circle, a dotted cross and a dotted circle", the label first."""
    names = [f"a {CLASSES[c]}" for c in classes if c >= 0]
    return " and ".join(filter(None, (", ".join(names[:-1]), names[-1])))


def _samples(rendered: Rendered) -> Iterator[Sample]:
    images = torch.from_numpy(rendered.images).float() / 127.5 - 1
    for image, classes, masks in zip(images, rendered.classes, rendered.masks, strict=True):
        seen = [int(c) for c in classes]
        found = {c: torch.from_numpy(m) for c, m in zip(seen, masks, strict=True) if c >= 0}
        yield Sample(image, seen[0], found.pop(seen[0]), found, caption(seen))


# --------------------------------------------------------------------------- drawing the numbers


class _Draw:
    """Uniform numbers in [0, 1), each item's from a stream of its own, handed out in columns."""

    def __init__(self, seed: int, items: Sequence[int], pixels: int) -> None:
        streams = [np.random.default_rng((seed, int(i))) for i in items]
        self.numbers = np.stack([s.random(UNIFORMS, np.float32) for s in streams])
        self.noise = np.stack([np.frombuffer(s.bytes(pixels), np.uint8) for s in streams])
        self.used = 0

    def __call__(self, *shape: int, low: float = 0.0, high: float = 1.0) -> Array:
        """(B, *shape) in [low, high)."""
        count = int(np.prod(shape))
        part = self.numbers[:, self.used : self.used + count]
        self.used += count
        assert self.used <= UNIFORMS
        return (low + (high - low) * part).reshape(-1, *shape)

    def choice(self, n: int) -> Ints:
        """(B,) in 0..n-1."""
        return (self(1)[:, 0] * n).astype(np.int64)


def _colours(draw: _Draw, dark: Range, light: Range) -> Array:
    """Two colours a figure, (B, 2, 3), each channel within its range."""
    return np.stack([draw(3, low=dark[0], high=dark[1]), draw(3, low=light[0], high=light[1])], 1)


def _layer(
    draw: _Draw,
    size: tuple[int, int],
    figure: Ints,
    pattern: Ints,
    radius: Array,
    colours: tuple[Range, Range],
    centre: Array | None = None,
    shown: Mask | None = None,
) -> Layer:
    unit = min(size)
    return Layer(
        figure,
        pattern,
        _colours(draw, *colours),
        draw(2) * np.array(size, np.float32) if centre is None else centre,
        radius,
        angle=draw(1, low=-TURN, high=TURN)[:, 0],
        period=draw(1, low=0.075 * unit, high=0.1 * unit)[:, 0],
        phase=draw(2),
        pattern_angle=draw(1, low=-TURN, high=TURN)[:, 0],
        shown=np.ones(len(figure), bool) if shown is None else shown,
    )


def _objects(draw: _Draw, size: tuple[int, int]) -> tuple[list[Layer], Ints]:
    """The objects, the largest first, none touching another, with their classes (B, 3)."""
    unit, count = min(size), len(draw.numbers)
    order = np.argsort(draw(len(CLASSES)), axis=1)  # classes of one image are distinct
    wanted = 1 + draw.choice(OBJECTS)
    largest = draw(1, low=0.21, high=0.28)[:, 0] * unit
    classes = np.full((count, OBJECTS), -1)
    layers: list[Layer] = []
    placed: list[tuple[Array, Array]] = []
    for k in range(OBJECTS):
        figure, pattern = order[:, k] % len(SHAPES), order[:, k] // len(SHAPES)
        ratio = draw(1, low=0.45, high=0.6)[:, 0]
        radius = largest if k == 0 else largest * ratio
        reach = radius * REACH[figure]
        span = np.array(size, np.float32) - 2 * reach[:, None]
        places = reach[:, None, None] + draw(CANDIDATES, 2) * span[:, None]
        free = np.ones((count, CANDIDATES), bool)
        for centre, other in placed:
            apart = np.linalg.norm(places - centre[:, None], axis=2)
            free &= apart > (reach + other)[:, None]
        shown = (k < wanted) & free.any(1)
        centre = places[np.arange(count), free.argmax(1)]
        classes[shown, k] = order[shown, k]
        placed.append((centre, np.where(shown, reach, np.float32(-unit * 9))))
        layers.append(_layer(draw, size, figure, pattern, radius, FIGURE, centre, shown))
    return layers, classes


def _clutter(draw: _Draw, size: tuple[int, int]) -> list[Layer]:
    """What is behind the objects: a faintly textured ground, plain figures and textured squares."""
    unit, count = min(size), len(draw.numbers)
    ground = np.full(count, EVERYWHERE)
    layers = [_layer(draw, size, ground, draw.choice(4), np.ones(count, np.float32), GROUND)]
    for _ in range(CLUTTER):
        figure = draw.choice(4)
        pattern = np.where(figure == SQUARE, draw.choice(3), PLAIN)
        radius = draw(1, low=0.04, high=0.1)[:, 0] * unit
        shown = draw(1)[:, 0] < 0.6
        layers.append(_layer(draw, size, figure, pattern, radius, FIGURE, None, shown))
    return layers


# --------------------------------------------------------------------------- painting


def _turned(angle: Array, y: Array, x: Array) -> tuple[Array, Array]:
    """The plane's (B, H, W) coordinates, turned; y is (B, H, 1) and x (B, 1, W)."""
    cos, sin = np.cos(angle)[:, None, None], np.sin(angle)[:, None, None]
    return cos * x + sin * y, cos * y - sin * x


def _each(functions: Sequence[Predicate], which: Ints, x: Array, y: Array) -> Mask:
    """Row b by function number which[b]."""
    result = np.empty(x.shape, bool)
    for number in np.unique(which):
        rows = which == number
        result[rows] = functions[number](x[rows], y[rows])
    return result


def _inside(layer: Layer, size: tuple[int, int]) -> tuple[Mask, Mask]:
    """Where the figure is, and where its pattern has the second colour: two (B, H, W)."""
    centre = layer.centre.astype(np.float32)
    y = np.arange(size[0], dtype=np.float32)[None, :, None] + 0.5 - centre[:, :1, None]
    x = np.arange(size[1], dtype=np.float32)[None, None, :] + 0.5 - centre[:, 1:, None]
    radius = layer.radius.astype(np.float32)[:, None, None]
    inside = _each(FIGURES, layer.figure, *_turned(layer.angle, y / radius, x / radius))
    period = layer.period[:, None, None]
    u, v = _turned(layer.pattern_angle, y / period, x / period)
    u, v = u + layer.phase[:, :1, None], v + layer.phase[:, 1:, None]
    second = _each(PATTERNS, layer.pattern, u - np.rint(u), v - np.rint(v))
    return inside & layer.shown[:, None, None], second


def _render(seed: int, items: Sequence[int], size: tuple[int, int], keep: str) -> Rendered:
    draw = _Draw(seed, items, size[0] * size[1])
    objects, classes = _objects(draw, size)
    clutter = _clutter(draw, size)
    colour = np.zeros((len(items), *size), np.int64)  # which of the scene's colours a pixel has
    masks = []
    for number, layer in enumerate([*clutter, *objects]):
        inside, second = _inside(layer, size)
        k = number - len(clutter)
        if k >= 0:
            masks.append(inside)
        if k < 0 or keep == "all" or (keep == "others" and k > 0):
            np.copyto(colour, 2 * number + second, where=inside)
    palette = np.concatenate([layer.colours for layer in [*clutter, *objects]], axis=1)
    rows = np.arange(len(items))[:, None, None]
    light = _light(draw, size) + (draw.noise.reshape(-1, *size) / np.float32(255) - 0.5) * 0.1
    painted = palette[rows, colour].transpose(0, 3, 1, 2) * 0.8 + 0.1 + light[:, None]
    images = (np.clip(painted, 0, 1) * 255).astype(np.uint8)
    return Rendered(images, classes, np.stack(masks, axis=1))


def _light(draw: _Draw, size: tuple[int, int]) -> Array:
    """A smooth change of brightness, (B, H, W): a 3 x 3 grid of numbers, interpolated."""
    grid = draw(3, 3, low=-0.15, high=0.15)
    along = [np.linspace(0, 2, s, dtype=np.float32)[:, None] for s in size]
    weights = [np.clip(1 - np.abs(a - np.arange(3, dtype=np.float32)), 0, 1) for a in along]
    return np.asarray(weights[0] @ grid @ weights[1].T)
