"""Inputs that some models take for a row beside its tokens: which segment each place belongs to, how segments are related, and
which of several alike special tokens stands there. CPM-Bee's; the same through all steps of a row.

    segment_ids        int64 [batch, places]               the segment of the token at each place of the row
    input_id_subs      int64 [batch, places]               its subscript: 2 for <mask_2>, 0 for ordinary tokens
    segment_relations  int64 [batch, segments, segments]   how a token's segment sees another; 0: it is the same one

A static cache has as many places as slots.
"""

import numpy as np
import onnx

SEGMENTS, SUBSCRIPTS, RELATIONS = "segment_ids", "input_id_subs", "segment_relations"
LAYOUT = (SEGMENTS, RELATIONS, SUBSCRIPTS)  # in the order of a module's arguments
PLACED = (SEGMENTS, SUBSCRIPTS)
PLACES = "places"  # the axis' name where the cache grows
MOST_SEGMENTS = 64
MADE_UP_PLACES = 1 << 16  # no row of a growing cache is longer in validation


def made_up(names: tuple[str, ...], batch: int, places: int | None = None) -> dict[str, np.ndarray]:
    """Of these inputs, values that depend on the place alone, so that graphs of any capacity can be compared."""
    place = np.arange(MADE_UP_PLACES if places is None else places)
    rows, columns = np.indices((MOST_SEGMENTS, MOST_SEGMENTS))
    values = {
        SEGMENTS: place // 6 % 5,
        SUBSCRIPTS: np.where(place % 7 == 3, 1 + place % 3, 0),
        RELATIONS: np.where(rows == columns, 0, 1 + (3 * rows + 5 * columns) % 8),
    }
    return {name: np.repeat(values[name][None], batch, axis=0) for name in names}


def set_places(inputs: list[onnx.ValueInfoProto], places: int) -> None:
    """Gives those of a graph's inputs that run over places this many."""
    for value in inputs:
        if value.name in PLACED:
            value.type.tensor_type.shape.dim[1].dim_value = places
