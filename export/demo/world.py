"""The demo model's world: pictures of one to three flat shapes, and questions with exact answers.

A scene is a plain light background and one to three shapes, each in another quadrant, no two of the same shape or the
same colour. Everything is seeded, so that pictures can be drawn anew and their answers are known.

>>> rng = random.Random(7)
>>> scene = sample_scene(rng)
>>> picture = draw(scene, 480, 360)
>>> for question, answer, kind in questions(scene): ...
"""

from __future__ import annotations

import io
import math
import random
from collections.abc import Iterable
from dataclasses import dataclass
from typing import NamedTuple

from PIL import Image, ImageDraw

RGB = tuple[int, int, int]

SHAPES = ("circle", "square", "triangle", "star")

COLORS: dict[str, RGB] = {
    "red": (220, 40, 40),
    "green": (40, 170, 60),
    "blue": (40, 80, 220),
    "yellow": (240, 210, 40),
    "purple": (140, 50, 170),
    "orange": (245, 140, 30),
    "black": (20, 20, 20),
    "white": (250, 250, 250),
}

#: How far each channel of a shape may be from its colour's value.
COLOR_TOLERANCE = 12

BACKGROUNDS: tuple[RGB, ...] = ((200, 200, 200), (225, 215, 200), (190, 210, 225), (215, 225, 205))

#: Name of a quadrant -> its centre as fractions of width and height; in the order in which objects are listed.
QUADRANTS: dict[str, tuple[float, float]] = {
    "top left": (0.25, 0.25),
    "top right": (0.75, 0.25),
    "bottom left": (0.25, 0.75),
    "bottom right": (0.75, 0.75),
}

RADIUS_RANGE = (0.11, 0.19)
CENTER_TOLERANCE = 0.05
COUNT_WORDS = {1: "one", 2: "two", 3: "three"}

#: Kinds of questions, in the order of the table in the documentation.
KINDS = ("color", "shape", "where", "count", "exists", "describe")

#: How a scene is laid out in a picture that is not square; see :func:`draw`.
LAYOUTS = ("spread", "centered", "stretched")

MIN_SIDE = 60
MAX_SIDE = 800
MAX_ASPECT = 16 / 9


@dataclass(frozen=True)
class SceneObject:
    """One shape of a scene.

    Attributes:
        shape: one of :data:`SHAPES`.
        color: one of :data:`COLORS`.
        rgb: the colour it is drawn in, each channel within :data:`COLOR_TOLERANCE` of the named colour.
        quadrant: one of :data:`QUADRANTS`.
        offset: centre minus the quadrant's centre, as fractions of the side.
        radius: as a fraction of the side.
        proportion: 0 .. 1, what the outline leaves open: how far a square, a triangle and the notches of a star fill
            the box of half-side ``radius``. A circle has no such choice.
    """

    shape: str
    color: str
    rgb: RGB
    quadrant: str
    offset: tuple[float, float]
    radius: float
    proportion: float

    @property
    def name(self) -> str:
        return f"{self.color} {self.shape}"


@dataclass(frozen=True)
class Scene:
    """A background and its objects, in listing order: top row first, left to right."""

    background: RGB
    objects: tuple[SceneObject, ...]


class Question(NamedTuple):
    """A question about a scene, its one right answer, and which of :data:`KINDS` it is."""

    question: str
    answer: str
    kind: str


class Box(NamedTuple):
    """Where an object lies in a picture: centre and half-sides, in pixels, as real numbers."""

    center_x: float
    center_y: float
    half_width: float
    half_height: float


@dataclass(frozen=True)
class Picture:
    """A scene as an image file.

    Attributes:
        scene: what is in it.
        width, height: in pixels.
        layout: one of :data:`LAYOUTS`.
        format: ``PNG`` or ``JPEG``.
        data: the bytes of the file.
    """

    scene: Scene
    width: int
    height: int
    layout: str
    format: str
    data: bytes

    @property
    def suffix(self) -> str:
        return ".png" if self.format == "PNG" else ".jpg"

    def image(self) -> Image.Image:
        """Decodes the file to RGB."""
        return Image.open(io.BytesIO(self.data)).convert("RGB")


def sample_scene(rng: random.Random, count: int | None = None) -> Scene:
    """Draws a scene at random.

    Args:
        rng: the source of chance; the same state gives the same scene.
        count: how many objects, 1 .. 3; chosen evenly if not given.

    Raises:
        ValueError: ``count`` is not in 1 .. 3.
    """
    if count is None:
        count = rng.randint(1, 3)
    if count not in COUNT_WORDS:
        raise ValueError(f"a scene has {min(COUNT_WORDS)} to {max(COUNT_WORDS)} shapes, not {count}")
    quadrants = sorted(rng.sample(list(QUADRANTS), count), key=list(QUADRANTS).index)
    shapes = rng.sample(SHAPES, count)
    colors = rng.sample(list(COLORS), count)

    def jitter() -> float:
        return rng.uniform(-CENTER_TOLERANCE, CENTER_TOLERANCE)

    def near(channel: int) -> int:
        return min(255, max(0, channel + rng.randint(-COLOR_TOLERANCE, COLOR_TOLERANCE)))

    objects = tuple(
        SceneObject(
            shape=shape,
            color=color,
            rgb=tuple(near(channel) for channel in COLORS[color]),
            quadrant=quadrant,
            offset=(jitter(), jitter()),
            radius=rng.uniform(*RADIUS_RANGE),
            proportion=rng.random(),
        )
        for shape, color, quadrant in zip(shapes, colors, quadrants, strict=True)
    )
    return Scene(background=rng.choice(BACKGROUNDS), objects=objects)


def placement(scene: Scene, width: int, height: int, layout: str = "spread") -> list[Box]:
    """Where each object of ``scene`` lies in a picture of ``width`` x ``height``; see :func:`draw`."""
    if layout not in LAYOUTS:
        raise ValueError(f"layout {layout!r} is not one of {', '.join(LAYOUTS)}")
    side = min(width, height)
    boxes = []
    for item in scene.objects:
        x = QUADRANTS[item.quadrant][0] + item.offset[0]
        y = QUADRANTS[item.quadrant][1] + item.offset[1]
        if layout == "centered":
            center = ((width - side) / 2 + x * side, (height - side) / 2 + y * side)
        else:
            center = (x * width, y * height)
        half = (item.radius * side, item.radius * side)
        if layout == "stretched":
            half = (item.radius * width, item.radius * height)
        boxes.append(Box(*center, *half))
    return boxes


def _outline(item: SceneObject) -> list[tuple[float, float]]:
    """Corners of a polygon in the box -1 .. 1, y downwards. Its centre (0, 0) is always inside."""
    fill = item.proportion
    if item.shape == "square":
        half = 0.8 + 0.2 * fill
        return [(-half, -half), (half, -half), (half, half), (-half, half)]
    if item.shape == "triangle":
        # From the equilateral triangle in the unit circle to the one that fills the box.
        half, base = math.sqrt(0.75) * (1 - fill) + fill, 0.5 + 0.5 * fill
        return [(0.0, -1.0), (half, base), (-half, base)]
    inner = 0.38 + 0.12 * fill
    corners = []
    for corner in range(10):
        radius = inner if corner % 2 else 1.0
        angle = math.pi * corner / 5
        corners.append((radius * math.sin(angle), -radius * math.cos(angle)))
    return corners


def draw(scene: Scene, width: int, height: int, layout: str = "spread", supersample: int | None = None) -> Image.Image:
    """Draws a scene as an RGB picture.

    A picture need not be square; the scene's quadrants are always the picture's quadrants, before and after it is
    padded to a square. How the square scene is fitted in is the layout:

    * ``spread``: the objects lie about the centres of the picture's quadrants; sizes are fractions of the shorter side.
    * ``centered``: a square scene in the middle, with more background on two sides.
    * ``stretched``: a square scene resized to the picture, so that a circle becomes an ellipse.

    Args:
        scene: what to draw.
        width, height: of the picture, in pixels.
        layout: one of :data:`LAYOUTS`; of no effect on a square picture.
        supersample: draw at so many times the size and average, for smooth edges; 1 gives hard edges. By default
            4 for small and 2 for large pictures.

    Raises:
        ValueError: a side or ``supersample`` below 1, or an unknown layout.
    """
    if min(width, height) < 1:
        raise ValueError(f"a picture has at least 1 x 1 pixels, not {width} x {height}")
    if supersample is None:
        supersample = 4 if max(width, height) < 200 else 2
    if supersample < 1:
        raise ValueError(f"supersample is at least 1, not {supersample}")
    scale = supersample
    image = Image.new("RGB", (width * scale, height * scale), scene.background)
    canvas = ImageDraw.Draw(image)
    for item, box in zip(scene.objects, placement(scene, width, height, layout), strict=True):
        # A pixel's centre is at half-integers, PIL's coordinates name pixels: hence the - 0.5.
        x, y = box.center_x * scale - 0.5, box.center_y * scale - 0.5
        rx, ry = box.half_width * scale, box.half_height * scale
        if item.shape == "circle":
            canvas.ellipse((x - rx, y - ry, x + rx, y + ry), fill=item.rgb)
        else:
            canvas.polygon([(x + rx * u, y + ry * v) for u, v in _outline(item)], fill=item.rgb)
    return image.reduce(scale) if scale > 1 else image


def describe(scene: Scene) -> str:
    """The whole scene in words, one sentence per object."""
    return " ".join(f"A {item.name} is at the {item.quadrant}." for item in scene.objects)


def questions(scene: Scene) -> list[Question]:
    """Every question that has an answer in ``scene``, in the order of :data:`KINDS`.

    Shapes and colours that are absent are asked for by "Is there a ...?" only.
    """
    present = {(item.color, item.shape) for item in scene.objects}
    return [
        *(Question(f"What color is the {o.shape}?", o.color, "color") for o in scene.objects),
        *(Question(f"What shape is {o.color}?", o.shape, "shape") for o in scene.objects),
        *(Question(f"Where is the {o.shape}?", o.quadrant, "where") for o in scene.objects),
        Question("How many shapes are there?", COUNT_WORDS[len(scene.objects)], "count"),
        *(
            Question(f"Is there a {c} {s}?", "yes" if (c, s) in present else "no", "exists")
            for c in COLORS
            for s in SHAPES
        ),
        Question("Describe the image.", describe(scene), "describe"),
    ]


def sample_question(scene: Scene, kind: str, rng: random.Random) -> Question:
    """One question of a kind. "Is there" is asked so that half the answers are yes, and half of the noes are near
    misses: a colour and a shape that are both there, but not together, or only one of them."""
    choices = [q for q in questions(scene) if q.kind == kind]
    if kind == "exists":
        if rng.random() < 0.5:
            choices = [q for q in choices if q.answer == "yes"]
        else:
            choices = [q for q in choices if q.answer == "no"]
            words = {o.color for o in scene.objects} | {o.shape for o in scene.objects}
            near = [q for q in choices if words & set(q.question.rstrip("?").split())]
            if near and rng.random() < 0.7:
                choices = near
    return rng.choice(choices)


def sample_picture(rng: random.Random, count: int | None = None) -> Picture:
    """A random scene as a file: half of them square, sides of 60 to 800 pixels, PNG and JPEG of several qualities."""
    scene = sample_scene(rng, count)
    aspect = 1.0 if rng.random() < 0.45 else rng.uniform(1.0, MAX_ASPECT)
    longer = math.exp(rng.uniform(math.log(MIN_SIDE * aspect), math.log(MAX_SIDE)))
    width, height = round(longer), max(MIN_SIDE, round(longer / aspect))
    if rng.random() < 0.5:
        width, height = height, width
    layout = rng.choices(LAYOUTS, weights=(50, 30, 20))[0]
    image = draw(scene, width, height, layout, supersample=1 if rng.random() < 0.15 else None)
    buffer = io.BytesIO()
    if rng.random() < 0.5:
        file_format = "PNG"
        image.save(buffer, file_format, compress_level=1)
    else:
        file_format = "JPEG"
        image.save(buffer, file_format, quality=rng.choice((60, 75, 85, 92, 97)))
    return Picture(scene, width, height, layout, file_format, buffer.getvalue())


def vocabulary_sentences() -> Iterable[str]:
    """Every question and every answer of the world, for training a tokenizer and for testing it."""
    for shape in SHAPES:
        yield f"What color is the {shape}?"
        yield f"Where is the {shape}?"
        yield shape
    for color in COLORS:
        yield f"What shape is {color}?"
        yield color
        for shape in SHAPES:
            yield f"Is there a {color} {shape}?"
            for quadrant in QUADRANTS:
                yield f"A {color} {shape} is at the {quadrant}."
    yield from ("How many shapes are there?", "Describe the image.", "yes", "no")
    yield from COUNT_WORDS.values()
    yield from QUADRANTS
