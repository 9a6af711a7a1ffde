"""Pictures among the tokens of a text: a picture's features are asked for by ids beyond every vocabulary.

So whatever steps, batches, keeps or compares tokens treats a picture like so many of them: what is computed once stays in a row's cache
as long as the conversation begins with the same ids. With several rows of positions (mrope) a picture's tokens stand on a grid:

    text i        (p, p, p), and p + 1 follows
    picture y, x  (p, p + y, p + x), and p + max(height, width) follows
"""

import numpy as np

from suture.core.step_inputs import Embed

FIRST = 1 << 40  # the first id of a picture


class Seen:
    """Embeddings of tokens, by `embed`, and of the pictures that were added: suture.core.step_inputs.Embed."""

    def __init__(self, embed: Embed):
        self.embed = embed
        self.features = np.zeros((0, 0), np.float32)
        self.steps = np.zeros(0, np.int64)  # by how much the next token's position is further on
        self.offsets = np.zeros((3, 0), np.int64)  # temporal, height and width, from where the picture begins

    def add(self, features: np.ndarray, grid: tuple[int, int]) -> list[int]:
        """The ids of a picture [tokens, hidden], whose tokens are grid's rows by columns where that is their number."""
        count, first = len(features), len(self.steps)
        self.features = np.concatenate([self.features, features]) if first else features
        rows, columns = np.divmod(np.arange(count), grid[1])
        self.offsets = np.concatenate([self.offsets, [np.zeros(count, np.int64), rows, columns]], 1)
        self.steps = np.concatenate([self.steps, np.zeros(count - 1, np.int64), [max(grid)]])
        return list(range(FIRST + first, FIRST + first + count))

    def __call__(self, ids_BS: np.ndarray) -> np.ndarray:
        pictured = ids_BS >= FIRST
        values = self.embed(np.where(pictured, 0, ids_BS))
        if pictured.any():
            values = values.copy()
            values[pictured] = self.features[ids_BS[pictured] - FIRST]
        return values

    def step(self, ids: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
        """Of ids [S] how much further on each makes the next position, int64 [S], and where it stands itself, [3,S]."""
        pictured = ids >= FIRST
        steps, offsets = np.ones(len(ids), np.int64), np.zeros((3, len(ids)), np.int64)
        steps[pictured] = self.steps[ids[pictured] - FIRST]
        offsets[:, pictured] = self.offsets[:, ids[pictured] - FIRST]
        return steps, offsets


class Placed:
    """Positions [3,B,S] of the tokens of rows, which remember where each of their tokens has left off."""

    def __init__(self, seen: Seen, batch: int):
        self.seen = seen
        self.after = [np.zeros(0, np.int64) for _ in range(batch)]

    def __call__(self, ids_BS: np.ndarray, counts: np.ndarray, lengths: np.ndarray, rows: slice) -> np.ndarray:
        """Of a step of some adjacent rows, `lengths` tokens long before it. Padding repeats a row's last position."""
        positions = np.zeros((3, *ids_BS.shape), np.int64)
        for place, row in enumerate(range(len(self.after))[rows]):
            before, count = self.after[row][: lengths[place]], counts[place]
            steps, offsets = self.seen.step(ids_BS[place, :count])
            ends = (before[-1] if len(before) else 0) + np.cumsum(steps)
            positions[:, place, :count] = ends - steps + offsets
            positions[:, place, count:] = positions[:, place, count - 1 : count] if count else 0
            self.after[row] = np.concatenate([before, ends])
        return positions


def placed_by(embed: object, rows: int | None, batch: int) -> Placed | None:
    """What places the tokens of a batch, where they have several positions and pictures may be among them."""
    return Placed(embed, batch) if rows == 3 and isinstance(embed, Seen) else None
