"""The drawn pictures: what a scene says of itself agrees with what is drawn, and pictures of other scenes are told apart."""

from dataclasses import replace

import numpy as np
import pytest

from suture.models.drawn_pictures import BACKGROUNDS, COLOURS, Scene, Shape, random_scene, shows

SIZE = 64, 96


@pytest.fixture(scope="module")
def scenes() -> list[Scene]:
    random = np.random.default_rng(1)
    return [random_scene(random, *SIZE) for _ in range(20)]


def test_a_caption_says_where_the_first_shape_lies_from_the_second():
    circle, square = Shape("circle", "red", 30, 20, 9), Shape("square", "blue", 33, 60, 9)
    assert Scene((circle, square), "grey", (0, 0)).caption() == "a red circle left of a blue square on a grey background"
    assert Scene((square, circle), "grey", (0, 0)).caption() == "a blue square right of a red circle on a grey background"
    assert Scene((circle,), "white", (0, 0)).caption() == "a red circle on a white background"


def test_shapes_keep_apart_and_inside_the_picture():
    for shapes in (1, 2, 3, 5):
        masks = random_scene(np.random.default_rng(shapes), *SIZE, shapes).masks(*SIZE)
        assert masks.any((1, 2)).all()
        assert masks.sum(0).max() == 1
        assert not masks[:, [0, -1]].any()
        assert not masks[:, :, [0, -1]].any()


def test_edges_are_the_outermost_pixels_of_each_shape(scenes):
    for scene in scenes:
        edges, mask = scene.edges(*SIZE)[..., 0] > 0, scene.masks(*SIZE).any(0)
        assert edges.any()
        assert not (edges & ~mask).any()
        assert 0 < (mask & ~edges).sum() < mask.sum()


def test_a_picture_shows_its_own_scene_and_no_other(scenes):
    pictures = [scene.picture(*SIZE) for scene in scenes]
    assert all(map(shows, pictures, scenes))
    assert not any(map(shows, pictures[1:], scenes))


def test_one_wrong_colour_place_or_background_is_seen(scenes):
    for scene in scenes:
        first, second = scene.shapes
        colour = next(c for c in COLOURS if c not in (first.colour, second.colour))
        ground = next(b for b in BACKGROUNDS if b != scene.background)
        wrong = [
            replace(scene, shapes=(first, replace(second, colour=colour))),
            replace(scene, shapes=(first, replace(second, x=second.x + 5))),
            replace(scene, shapes=(first,)),
            replace(scene, background=ground),
        ]
        assert not any(shows(other.picture(*SIZE), scene) for other in wrong)
