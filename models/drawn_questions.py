"""Questions about drawn pictures, and their answers: what the small vision-language model is trained and judged on.

    How many squares?      two                         What is left of the red circle?   a blue square
    Is there a red cross?  no                          Describe the picture.             a red circle left of a blue square on a grey background

Every answer follows from the scene alone. In a picture of two shapes the one further left or above is named first, in others
they are named from left to right.
"""

from collections.abc import Callable
from dataclasses import replace

import numpy as np

from suture.models.drawn_pictures import BACKGROUNDS, COLOURS, KINDS, Scene, Shape

NUMBERS = ("zero", "one", "two", "three", "four")
MOST = len(NUMBERS) - 1  # shapes of a picture
PLURALS = {kind: f"{kind}es" if kind.endswith("s") else f"{kind}s" for kind in KINDS}
CAPTION = "Describe the picture."
WORDS = (  # of all questions and answers
    *NUMBERS, *COLOURS, *BACKGROUNDS, *KINDS, *PLURALS.values(), "a", "and", "on", "background", "left", "right", "above", "below",
    "of", "How", "many", "shapes", "What", "colour", "shape", "is", "the", "Is", "there", "yes", "no", "Describe", "picture",
)  # fmt: skip
MARKS = ("?", ".", ",")

Question = tuple[str, str]  # and its answer


def how_many(scene: Scene, random: np.random.Generator) -> Question:
    kind = str(random.choice([*KINDS, "shape"]))
    count = sum(kind in ("shape", shape.kind) for shape in scene.shapes)
    return f"How many {PLURALS.get(kind, 'shapes')}?", NUMBERS[count]


def which_colour(scene: Scene, random: np.random.Generator) -> Question:
    """Of a shape that is the only one of its kind, or of the background."""
    kinds = [shape.kind for shape in scene.shapes]
    single = [shape for shape in scene.shapes if kinds.count(shape.kind) == 1]
    if not single or random.random() < 0.2:
        return "What colour is the background?", scene.background
    shape = single[random.integers(len(single))]
    return f"What colour is the {shape.kind}?", shape.colour


def which_shape(scene: Scene, random: np.random.Generator) -> Question:
    shape = scene.shapes[random.integers(len(scene.shapes))]
    return f"What shape is {shape.colour}?", f"a {shape.kind}"


def is_there(scene: Scene, random: np.random.Generator) -> Question:
    """As often yes as no; half of those that are not there have a colour that is."""
    shape = scene.shapes[random.integers(len(scene.shapes))]
    colour, kind = shape.colour, shape.kind
    if random.random() < 0.5:
        kind = str(random.choice([each for each in KINDS if each != shape.kind]))
        colour = colour if random.random() < 0.5 else str(random.choice(list(COLOURS)))
    there = any((each.colour, each.kind) == (colour, kind) for each in scene.shapes)
    return f"Is there a {colour} {kind}?", "yes" if there else "no"


def what_is_beside(scene: Scene, random: np.random.Generator) -> Question:
    """Of two shapes one, by where it lies from the other."""
    if len(scene.shapes) != 2:
        return how_many(scene, random)
    first, second = in_order(scene).shapes[:: int(random.choice([1, -1]))]
    place = replace(scene, shapes=(first, second)).caption().split(first.kind, 1)[1].split(" a ")[0].strip()
    return f"What is {place} the {second.colour} {second.kind}?", f"a {first.colour} {first.kind}"


def caption(scene: Scene, random: np.random.Generator) -> Question:
    return CAPTION, in_order(scene).caption()


ASKED: tuple[Callable[[Scene, np.random.Generator], Question], ...] = (
    how_many, which_colour, which_shape, is_there, what_is_beside, caption,
)  # fmt: skip


def in_order(scene: Scene) -> Scene:
    """The same picture, its shapes in the order in which they are named."""
    shapes = sorted(scene.shapes, key=lambda shape: shape.x)
    if len(shapes) == 2 and not _beside(*shapes):
        shapes.sort(key=lambda shape: shape.y)
    return replace(scene, shapes=tuple(shapes))


def questions(scene: Scene, random: np.random.Generator, count: int) -> list[Question]:
    """`count` of them, each of another kind as long as there are kinds; none twice."""
    order = random.permutation(len(ASKED))
    asked: dict[str, str] = {}
    for place in range(8 * count):
        if len(asked) == count:
            break
        question, answer = ASKED[order[place % len(ASKED)]](scene, random)
        asked[question] = answer
    return list(asked.items())


def _beside(one: Shape, other: Shape) -> bool:
    return abs(one.x - other.x) > abs(one.y - other.y)
