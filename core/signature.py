"""The inputs and outputs of a language model's graph, by what they are for.

Two signatures (shapes in the field's letters: B batch, S tokens of this step, P tokens before it, L capacity):

    growing   input_ids [B,S]  position_ids [B,S]  attention_mask [B,P+S]  past [B,kv_heads,P,head_dim]
    static    input_ids [B,S]  position_ids [B,S]  write_indices [B]       past [B,kv_heads,L,head_dim]

In place of input_ids a graph may take inputs_embeds [B,S,hidden], and with mrope position_ids are [3,B,S]: temporal, height
and width.

Causal, but for models whose prompt sees itself in both directions (metadata suture.bidirectional): there a step's tokens see
each other and all before. In the static form these take sequence_lengths [B], too: what a step is padded with must be hidden.

Suture writes the names below. Graphs made elsewhere are read by `find_signature`, which goes by what names and shapes
have in common across exporters.
"""

import math
import re
from dataclasses import dataclass

import onnx

from suture.core.cache_flow import grown
from suture.core.cpm_inputs import LAYOUT, PLACED
from suture.core.dtypes import FLOATS
from suture.core.errors import UserError
from suture.core.traits import named_input

TOKENS = "input_ids"
EMBEDDINGS = "inputs_embeds"
POSITIONS = "position_ids"
MASK = "attention_mask"
WRITE_INDICES = "write_indices"
SEQUENCE_LENGTHS = "sequence_lengths"
NTK_ALPHA = "ntk_alpha"
LOGITS = "logits"
QUANTISED = (onnx.TensorProto.INT8, onnx.TensorProto.FLOAT8E4M3FN)  # what a cache may be instead
FEATURES = "input_features"  # of an encoder: log-mel spectrograms [B, mel bins, frames]
TOKEN_NAMES = r"input_ids|tokens|decoder_input"
EMBEDDING_NAMES = r"inputs?_embed"
LOGIT_NAMES = r"logits|lm_head|output"
ROLES = ("tokens", "positions", "mask", "write_indices", "logits")  # of inputs and outputs, where names do not say
SIDES = {"encoder": "encoder.", "cross": "encoder.", "decoder": "decoder."}
QUANTIZED = "suture.quantized"  # metadata of a quantised graph: the format, and the rest of the options that made it
NTK_TRAINED_LENGTH = "suture.ntk_trained_length"  # metadata of a graph that takes ntk_alpha: the config's seq_length
BIDIRECTIONAL = "suture.bidirectional"  # metadata of a graph in which a step's tokens see each other
PREFIX = "suture.prefix"  # metadata: the tokens that begin every row, before the text
WANTS_FLOAT32 = "suture.wants_float32"  # metadata of a graph whose numbers pass what float16 holds, as its makers say
LEARNED_POSITIONS = "suture.learned_positions"  # metadata of a graph with a table of positions: its rows


def past_name(layer: int, role: str) -> str:
    return f"past_key_values.{layer}.{role}"


def present_name(layer: int, role: str) -> str:
    return f"present.{layer}.{role}"


def ntk_alpha(prompt_length: int, trained_length: int) -> float:
    """The scale of the rotary base that a prompt of this many tokens gets, kept while decoding: 1, 3, 7, 15 ...

    Dynamic NTK as in the original Qwen (modeling_qwen.py, get_ntk_alpha): 2^ceil(log2(length / trained) + 1) - 1.
    """
    return float(max(2 ** math.ceil(math.log2(max(prompt_length, 1) / trained_length) + 1) - 1, 1))


@dataclass(frozen=True)
class Cache:
    """One cached tensor of one attention layer: `past` goes in, `present` comes out."""

    layer: int
    role: str  # "key" or "value", after the prefix "decoder." or "encoder." where a model has both
    past: str
    present: str | None  # None for an encoder's keys and values, which no step changes


@dataclass(frozen=True)
class Signature:
    """Names of a graph's inputs and outputs; None for what it does not have."""

    tokens: str | None  # ids, or embeddings; None only in graphs without caches, such as encoders
    logits: str | None
    positions: str | None
    mask: str | None
    write_indices: str | None
    sequence_lengths: str | None
    ntk_alpha: str | None
    caches: tuple[Cache, ...]
    kv_heads: int
    head_dim: int
    capacity: int | None  # slots of a static cache; None where the cache grows
    dtype: int  # onnx.TensorProto type of the cache
    ntk_trained_length: int | None
    learned_positions: int | None = None  # rows of a table of positions: no sequence can be longer
    encoder_caches: tuple[Cache, ...] = ()  # what a decoder's cross-attention reads; decoding does not change it
    logits_dtype: int = onnx.TensorProto.UNDEFINED
    last_only: bool = False  # logits [batch, 1, vocab], of each row's last valid token
    bidirectional: bool = False  # a step's tokens see each other, so a prompt in chunks is another one
    layout: tuple[str, ...] = ()  # inputs of suture.core.cpm_inputs
    prefix: tuple[int, ...] = ()  # tokens that begin every row, before the text
    embedding_width: int | None = None  # where `tokens` are embeddings [B,S,width]
    position_rows: int | None = None  # where positions are [rows,B,S]: temporal, height and width
    vocabulary: int | None = None  # of the logits, where they say it

    @property
    def inputs(self) -> set[str]:
        """The names of all inputs whose meaning is known."""
        named = (self.tokens, self.positions, self.mask, self.write_indices, self.sequence_lengths, self.ntk_alpha)
        caches = (cache.past for cache in (*self.caches, *self.encoder_caches))
        return {*filter(None, named), *self.layout, *caches}

    @property
    def placed(self) -> tuple[str, ...]:
        """Those inputs of suture.core.cpm_inputs that have a value for each place of a row: as many as a static cache has slots."""
        return tuple(name for name in self.layout if name in PLACED)

    @property
    def static(self) -> bool:
        return self.write_indices is not None

    @property
    def float_dtype(self) -> int:
        """The type that the graph computes in: the cache's, or, where that is quantised, the logits'."""
        return self.dtype if self.dtype in FLOATS else self.logits_dtype

    @property
    def layers(self) -> int:
        return 1 + max(cache.layer for cache in self.caches)


def find_signature(
    model: onnx.ModelProto,
    name: object = "graph",
    past_pattern: str | None = None,
    need_caches: bool = True,
    given: dict[str, str] | None = None,
) -> Signature:
    """Reads the signature of a decoder graph with a KV cache. `past_pattern` (a regular expression) overrides what
    counts as a cache input, `given` (by role: ROLES) which input or output is for what. Raises UserError naming what could
    not be paired, and, with `need_caches`, for a graph without any cache (an encoder). In such a graph a name alone says
    nothing: what has not the type and shape of tokens, positions or a mask is an input like any other."""
    initializers = {tensor.name for tensor in model.graph.initializer}
    inputs = {value.name: value for value in model.graph.input if value.name not in initializers}
    outputs = {value.name: value for value in model.graph.output}
    flow = grown(model.graph)
    pasts = [n for n, value in inputs.items() if _is_cache(value, past_pattern, flow)]
    unshaped = [n for n, value in outputs.items() if not value.type.tensor_type.HasField("shape") and n in flow.values()]
    presents = [n for n, value in outputs.items() if (_is_kept(value) or n in unshaped) and n != LOGITS]
    if past_pattern is None and not any(past in flow for past in pasts):
        pasts = []  # nothing grows, so there is no cache, whatever inputs are called
    elif past_pattern is None:
        places = {_place(past) for past in pasts}  # by name too: of latents, attention sees what a product makes
        named = {n for n in presents if "present" in n and _place(n) in places}
        presents = [n for n in presents if n in flow.values() or n in named or _place(n)[1].startswith("encoder.")]
    if not pasts and (need_caches or past_pattern is not None):
        raise UserError(name, "no cache inputs found", "name them with --past REGEX, or export with a KV cache")
    given = _known(name, given or {}, inputs, outputs)
    if not need_caches and past_pattern is None and not _may_be_decoder(inputs, given):
        pasts = []  # they stay as they are: nothing says which of the inputs are the step's tokens
    caches, encoder_caches = _pair(name, pasts, presents, flow) if pasts else ([], [])
    shape = _shape(inputs[caches[0].past]) if caches else [0, 0, 0, 0]
    metadata = {entry.key: entry.value for entry in model.metadata_props}
    writes = {named_input(node, "write_indices") for node in model.graph.node if node.op_type == "TensorScatter"} - {""}
    in_place = writes or any(node.op_type == "GroupQueryAttention" for node in model.graph.node)
    write_indices = _first(inputs, r"^write_ind|^cache_position$|^past_lengths?$", rank=1) if in_place and caches else None
    write_indices = write_indices or next((written for written in inputs if caches and written in writes), None)
    find = _required if caches else lambda name, values, pattern, what: _first(values, pattern)
    write_indices = given.get("write_indices", write_indices)
    logits = given.get("logits") or find(name, outputs, LOGIT_NAMES, "logits output")
    sequence_lengths = _first(inputs, r"^sequence_lengths$", rank=1)
    tokens = given.get("tokens") or (_tokens(inputs) if caches else None) or find(name, inputs, TOKEN_NAMES, "token input")
    roles: dict[str, str | None] = {
        "tokens": tokens,
        "positions": _first(inputs, r"pos(ition)?_?(ids?|s)$|^positions?$"),
        "mask": _first(inputs, r"^(?!.*(encoder|cross)).*mask"),
    }
    if not pasts:
        roles = {role: _of_a_batch(role, inputs.get(tensor or "")) for role, tensor in roles.items()}
    tokens, positions, mask = (given.get(role) or tensor for role, tensor in roles.items())
    return Signature(
        tokens=tokens,
        logits=logits,
        positions=positions,
        mask=mask,
        write_indices=write_indices,
        sequence_lengths=sequence_lengths,
        ntk_alpha=_first(inputs, r"^ntk_alpha$", rank=1),
        caches=tuple(caches),
        kv_heads=_static(shape[1]),
        head_dim=_static(shape[3]),
        capacity=_static(shape[2]) if write_indices else None,
        dtype=inputs[caches[0].past].type.tensor_type.elem_type if caches else onnx.TensorProto.UNDEFINED,
        ntk_trained_length=int(metadata[NTK_TRAINED_LENGTH]) if NTK_TRAINED_LENGTH in metadata else None,
        learned_positions=int(metadata[LEARNED_POSITIONS]) if LEARNED_POSITIONS in metadata else None,
        encoder_caches=tuple(encoder_caches),
        logits_dtype=outputs[logits].type.tensor_type.elem_type if logits else onnx.TensorProto.UNDEFINED,
        last_only=sequence_lengths is not None and _shape(outputs[logits])[1] == 1,
        bidirectional=BIDIRECTIONAL in metadata,
        layout=tuple(name for name in LAYOUT if name in inputs and BIDIRECTIONAL in metadata),
        prefix=tuple(map(int, metadata[PREFIX].split())) if PREFIX in metadata else (),
        embedding_width=_width(name, inputs[tokens]) if tokens else None,
        position_rows=_position_rows(name, inputs[positions]) if positions else None,
        vocabulary=_size(outputs[logits], -1) if logits else None,
    )


def _width(name: object, tokens: onnx.ValueInfoProto) -> int | None:
    """Of embeddings; None for token ids."""
    if tokens.type.tensor_type.elem_type not in FLOATS:
        return None
    shape = _shape(tokens)
    if len(shape) != 3 or not isinstance(shape[2], int) or shape[2] < 1:
        raise UserError(name, f"{tokens.name} is {shape}, not [batch, sequence, a fixed width]", "export it with a fixed width")
    return shape[2]


def _position_rows(name: object, positions: onnx.ValueInfoProto) -> int | None:
    """How many positions a token has; None for one, in [B,S]."""
    shape = _shape(positions)
    if len(shape) != 3:
        return None
    if not isinstance(shape[0], int) or shape[0] < 3:
        raise UserError(name, f"{positions.name} is {shape}, not [3, batch, sequence]", "export it with that many fixed rows")
    return shape[0]


def _known(name: object, given: dict[str, str], inputs: dict, outputs: dict) -> dict[str, str]:
    """What was given. Raises UserError for a role or a tensor that does not exist."""
    for role, tensor in given.items():
        if role not in ROLES:
            raise UserError(f"{role}={tensor}", "no such role", f"choose from {', '.join(ROLES)}")
        ends = outputs if role == "logits" else inputs
        if tensor not in ends:
            what = "output" if role == "logits" else "input"
            raise UserError(name, f"has no {what} {tensor}", f"choose from {', '.join(ends)}")
    return given


def _tokens(inputs: dict) -> str | None:
    """The input with the step's tokens, or with their embeddings."""
    return _first(inputs, TOKEN_NAMES) or _first(inputs, EMBEDDING_NAMES, rank=3)


def _may_be_decoder(inputs: dict[str, onnx.ValueInfoProto], given: dict[str, str]) -> bool:
    """Whether one of the inputs can be the tokens of a batch, or their embeddings."""
    tokens = given.get("tokens") or _tokens(inputs)
    if tokens is not None:
        return len(_shape(inputs[tokens])) in (2, 3)
    types = (onnx.TensorProto.INT64, onnx.TensorProto.INT32)
    return any(len(_shape(value)) == 2 and value.type.tensor_type.elem_type in types for value in inputs.values())


def _of_a_batch(role: str, value: onnx.ValueInfoProto | None) -> str | None:
    """The name of what can be in this role for a batch of tokens: ids [B,S] or embeddings [B,S,width], positions [B,S] or
    [rows,B,S], a mask [B,S] or [B,1,S,S]. None: it is something else."""
    if value is None or not value.type.tensor_type.HasField("shape"):
        return None
    shape, dtype = _shape(value), value.type.tensor_type.elem_type
    whole = dtype in (onnx.TensorProto.INT64, onnx.TensorProto.INT32)
    embedded = len(shape) == 3 and dtype in FLOATS and isinstance(shape[2], int) and shape[2] > 0
    in_rows = len(shape) == 3 and isinstance(shape[0], int) and shape[0] >= 3
    fits = {
        "tokens": (whole and len(shape) == 2) or embedded,
        "positions": whole and (len(shape) == 2 or in_rows),
        "mask": len(shape) in (2, 4),
    }
    return value.name if fits[role] else None


def _is_cache(value: onnx.ValueInfoProto, pattern: str | None, flow: dict[str, str]) -> bool:
    """What is said to be one, what grows, and what is called one beside that: a cross-attention's does not grow, and one
    that lacks its output is to be named."""
    if pattern is not None:
        return bool(re.search(pattern, value.name))
    said = re.search(r"past|cache", value.name) or _place(value.name)[1].startswith("encoder.")
    return _is_kept(value) and (value.name in flow or bool(said))


def _is_kept(value: onnx.ValueInfoProto) -> bool:
    tensor = value.type.tensor_type
    return tensor.elem_type in (*FLOATS, *QUANTISED) and len(tensor.shape.dim) == 4


def _pair(name: object, pasts: list[str], presents: list[str], flow: dict[str, str]) -> tuple[list[Cache], list[Cache]]:
    """Caches that grow with the outputs that they become, by name or, where names do not say, by what joins new slots to
    them; and an encoder's, which need no output."""
    fixed = [past for past in pasts if _place(past)[1].startswith("encoder.")]
    growing = [past for past in pasts if past not in fixed]
    by_place = {_place(present): present for present in presents}
    encoder_caches = [Cache(*_place(past), past, by_place.get(_place(past))) for past in fixed]
    presents = [present for present in presents if not _place(present)[1].startswith("encoder.")]
    side = "decoder." if fixed else ""
    places = [_place(past) for past in growing]
    if len(set(places)) == len(growing) == len(presents) and all(place in by_place for place in places):
        caches = [
            Cache(layer, role if side in role else side + role, past, by_place[layer, role])
            for past, (layer, role) in zip(growing, places)
        ]
        return sorted(caches, key=lambda cache: cache.layer), encoder_caches
    joined = {past: flow[past] for past in growing if flow.get(past) in presents}
    if len(joined) == len(growing) == len(presents) and len(growing) % 2 == 0:
        roles = [f"{side}key", f"{side}value"]
        return [Cache(i // 2, roles[i % 2], past, joined[past]) for i, past in enumerate(growing)], encoder_caches
    unpaired = [past for past in growing if _place(past) not in by_place and past not in joined]
    unpaired = unpaired or [present for present in presents if present not in joined.values()] or presents
    raise UserError(name, f"cache without its counterpart: {', '.join(unpaired)}", "name pairs alike, or use --past")


def _place(name: str) -> tuple[int, str]:
    """The layer and role that a cache tensor's name says: past_key_values.3.decoder.key, past_k_3, key_cache_3."""
    numbers = re.findall(r"\d+", name)
    roles = re.findall(r"(?:^|[._\W])(k|v)(?:ey|al|alue)?s?(?=[._\W\d]|$)", name)
    role = "key" if roles and roles[-1] == "k" else "value"  # the last: past_key_values.3.value has both
    side = next((side for word, side in SIDES.items() if word in name), "")
    return (int(numbers[0]) if numbers else 0), side + role


def _shape(value: onnx.ValueInfoProto) -> list[int | str]:
    return [dim.dim_value or dim.dim_param for dim in value.type.tensor_type.shape.dim]


def _size(value: onnx.ValueInfoProto, axis: int) -> int | None:
    size = (_shape(value) or [""])[axis]
    return size if isinstance(size, int) else None


def _static(dim: int | str) -> int:
    return dim if isinstance(dim, int) else -1


def _first(values: dict[str, onnx.ValueInfoProto], pattern: str, rank: int | None = None) -> str | None:
    for name, value in values.items():
        if re.search(pattern, name) and rank in (None, len(value.type.tensor_type.shape.dim)):
            return name
    return None


def _required(name: object, values: dict[str, onnx.ValueInfoProto], pattern: str, what: str) -> str:
    found = _first(values, pattern)
    if found is None:
        raise UserError(name, f"no {what} among {', '.join(values)}", "export a language model with logits")
    return found
