"""Questions about drawn pictures: their answers follow from the scene, and tiny-vlm's tokenizer has every word of them."""

import numpy as np
import pytest

from suture.models.drawn_pictures import Scene, Shape, random_scene
from suture.models.drawn_questions import ASKED, CAPTION, MOST, WORDS, questions
from suture.models.library_tokenizer import LibraryTokenizer
from suture.models.named import checkpoint_folder

TWO = Scene((Shape("square", "blue", 20, 50, 8), Shape("circle", "red", 22, 14, 8)), "grey", (0, 0))
EXPECTED = {
    "How many squares?": "one",
    "How many crosses?": "zero",
    "How many shapes?": "two",
    "What colour is the circle?": "red",
    "What colour is the background?": "grey",
    "What shape is blue?": "a square",
    "Is there a red circle?": "yes",
    "Is there a red square?": "no",
    "What is left of the blue square?": "a red circle",
    "What is right of the red circle?": "a blue square",
    CAPTION: "a red circle left of a blue square on a grey background",
}


def test_answers_follow_from_the_scene():
    asked = dict(pair for seed in range(80) for pair in questions(TWO, np.random.default_rng(seed), len(ASKED)))
    assert {question: asked[question] for question in EXPECTED} == EXPECTED


def test_as_often_yes_as_no_and_no_question_twice():
    random, answers = np.random.default_rng(0), []
    for number in range(400):
        asked = questions(random_scene(random, 64, 64, number % MOST + 1), random, len(ASKED))
        assert len({question for question, _ in asked}) == len(asked) == len(ASKED)
        answers += [answer for question, answer in asked if question.startswith("Is there")]
    assert 0.4 < answers.count("yes") / len(answers) < 0.6


def test_every_word_is_a_token():
    tokenizer = LibraryTokenizer(checkpoint_folder("tiny-vlm"))
    ids = tokenizer.encode(" ".join(WORDS))
    assert len(set(ids)) == len(ids) == len(WORDS) + 1  # and the one that begins every text
    assert tokenizer.decode(ids[1:]) == " ".join(WORDS)


def test_the_chat_template_puts_pictures_where_they_are_said():
    tokenizer = LibraryTokenizer(checkpoint_folder("tiny-vlm"))
    asked = [{"type": "image"}, {"type": "text", "text": "How many squares?"}]
    turns = [{"role": "user", "content": asked}, {"role": "assistant", "content": "two"}, {"role": "user", "content": CAPTION}]
    text = "<s> USER: <image> How many squares? ASSISTANT: two </s> USER: Describe the picture. ASSISTANT:"
    assert tokenizer.decode(tokenizer.chat(turns)) == text
    with pytest.raises(ValueError, match="there is no role system"):
        tokenizer.chat([{"role": "system", "content": "no"}])
