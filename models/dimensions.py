"""What a stage needs to know of any decoder to give its graph inputs and outputs."""

from dataclasses import dataclass


@dataclass(frozen=True)
class Dimensions:
    layers: int
    heads: int
    kv_heads: int
    head_dim: int  # of query and key
    hidden: int
    vocab: int
    ntk_trained_length: int | None = None  # the config's seq_length where the model takes ntk_alpha, else None
    positions: int | None = None  # rows of a table of learned positions, where the model has one: no sequence is longer
    bidirectional: bool = False  # whether a step's tokens see each other, not only those before: a prompt is one step
    prefix: tuple[int, ...] = ()  # tokens that begin every row, before the text
    segmented: bool = False  # whether the model takes segments beside tokens: suture.core.cpm_inputs
    value_dim: int | None = None  # of a value, where it is not head_dim: multi-head latent attention
    encoder_slots: int | None = None  # keys of cross-attention, where the decoder attends to an encoder
    position_rows: int | None = None  # positions of a token, where it has several (mrope): temporal, height and width
