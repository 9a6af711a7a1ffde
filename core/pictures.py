"""The parts of a model that looks at pictures and answers, and what they pass on: names that export, validate and generate share.

    vision (VISION)   pixel_values [batch, 3, height, width] → image_features [batch, tokens, hidden]
    embed             input_ids → inputs_embeds, which features take the place of where a picture stands in a text
    decoder           a step over embeddings

A picture's features are asked for like tokens: their ids follow the vocabulary's, in the order in which pictures were read
(suture.runtime.seen).
"""

VISION, DECODER = "vision", "decoder"
PIXELS, FEATURES = "pixel_values", "image_features"
INSTRUCTION, COUNTS = "qformer_input_ids", "qformer_attention_mask"  # of a tower that reads what is asked, too


def answers_about_pictures(names: set[str]) -> bool:
    """Whether these are the parts of such a model."""
    return {VISION, DECODER} <= names


def with_pictures(messages: list[dict], count: int) -> list[dict]:
    """A conversation whose first user's turn shows so many pictures, as chat templates take it."""
    first = next((place for place, message in enumerate(messages) if message["role"] == "user"), None)
    if first is None:
        return messages
    content = [*[{"type": "image"}] * count, {"type": "text", "text": messages[first]["content"]}]
    return [*messages[:first], {"role": "user", "content": content}, *messages[first + 1 :]]
