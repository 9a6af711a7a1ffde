"""The plan: which passes surgery runs, in which order. To add a pass, write its file, give it its place here, and test it.

Passes stand in phases that run one after the other. PORTABLE makes the portable graph of the source; LOWERING and ORT_CONTRIB
make the lowered graph and that for onnxruntime of the portable one.
"""

from collections.abc import Sequence
from dataclasses import dataclass, replace
from functools import partial
from pathlib import Path

from onnx import TensorProto

from suture.core.errors import UserError
from suture.surgery.options import SurgeryOptions
from suture.surgery.own_passes import load_pass
from suture.surgery.passes import Pass, Phase, of_module, phase
from suture.surgery.passes.import_contrib import (
    block_gather,
    contrib_gelu,
    embed_layer_norm,
    fused_matmul,
    grouped_query_attention,
    multi_head_attention,
    nbits_matmul,
    packed_attention,
    rotary,
    skip_norm,
    unsigned_weights,
)
from suture.surgery.passes.lowering import (
    affine_grid,
    attention_heads,
    attention_mask,
    attention_products,
    bitwise,
    constant_types,
    decomposable_attention,
    deformable_convolution,
    explicit_attributes,
    group_normalization,
    hash_level,
    joint_rotary,
    loop_counter,
    neighbouring_weights,
    pointwise_last,
    quantised_cache,
    sampled_levels,
    single_key,
    split_products,
    transposed_convolution,
    unmasked,
    unsigned_integers,
    zero_points,
)
from suture.surgery.passes.ort_contrib import bias_apart, group_query_attention, quick_gelu
from suture.surgery.passes.ort_contrib import skip_norm as fuse_skip_norm
from suture.surgery.passes.portable import (
    attention,
    attention_sinks,
    constant_branch,
    constants,
    duplicates,
    flat_tokens,
    gelu,
    group_norm,
    interface,
    last_token_logits,
    layer_norm,
    linear,
    merged_weights,
    node_names,
    own_cache,
    packed_heads,
    query_scale,
    repeated_heads,
    rms_norm,
    rotary_embedding,
    rotary_products,
    scattered_cache,
    shapes,
    static_cache,
    swish,
    visible_mask,
)


@dataclass(frozen=True)
class Plan:
    """What surgery runs for some options."""

    portable: tuple[Phase, ...]
    lowering: tuple[Phase, ...]
    ort_contrib: tuple[Phase, ...] = ()

    @property
    def passes(self) -> list[Pass]:
        return [each for part in (*self.portable, *self.lowering, *self.ort_contrib) for each in part.passes]


PORTABLE: tuple[Phase, ...] = (
    phase(
        "contrib operators to standard ones",
        constants,
        embed_layer_norm,
        skip_norm,
        contrib_gelu,
        fused_matmul,
        nbits_matmul,
        block_gather,
        unsigned_weights,
        rotary,
        grouped_query_attention,
        multi_head_attention,
        packed_attention,
    ),
    phase("constants and shapes", constants, shapes, constant_branch, repeated=True),
    phase(
        "fusions",
        duplicates,
        layer_norm,
        group_norm,
        rms_norm,
        swish,
        gelu,
        rotary_embedding,
        rotary_products,
        shapes,
        attention,
        attention_sinks,
        own_cache,
        repeated_heads,
        scattered_cache,
        linear,
        flat_tokens,
        packed_heads,
        query_scale,
        visible_mask,
    ),
    phase(
        "caches and logits",
        of_module(
            static_cache,
            when=lambda options: options.cache == "static",
            settings=lambda options: {"capacity": options.capacity},
        ),
        of_module(last_token_logits, when=lambda options: options.logits == "last"),
        duplicates,
    ),
    phase(
        "weights",
        of_module(merged_weights, when=lambda options: bool(options.merge), settings=lambda options: {"kinds": options.merge}),
        of_module(packed_heads, when=lambda options: bool(options.merge)),
        # whose small weights TensorRT else writes out in bfloat16, at every step, to join them
        of_module(
            neighbouring_weights,
            when=lambda options: options.quantize == "int8",
            settings=lambda options: {"only": TensorProto.BFLOAT16},
        ),
    ),
    phase("names", interface, node_names),
)
OWN = "fusions"  # the phase after which a user's pass runs by default: the interface is the source's until then

LOWERING: tuple[Phase, ...] = (
    phase(
        "forms that TensorRT reads right and fast",
        explicit_attributes,
        unmasked,
        single_key,
        loop_counter,
        constant_types,
        zero_points,
        hash_level,
        unsigned_integers,
        bitwise,
        deformable_convolution,
        affine_grid,
        sampled_levels,
        group_normalization,
        transposed_convolution,
        neighbouring_weights,
        split_products,
        joint_rotary,
        quantised_cache,
        attention_heads,
        own_cache,
        attention_products,
        of_module(attention_mask, settings=lambda options: {"lengths": options.attention == "lengths"}),
        query_scale,
        decomposable_attention,
        pointwise_last,
    ),
)

ORT_CONTRIB: tuple[Phase, ...] = (
    phase(
        "onnxruntime's contrib operators",
        group_query_attention,
        fuse_skip_norm,
        quick_gelu,
        bias_apart,
        interface,
    ),
)


def make_plan(options: SurgeryOptions) -> Plan:
    """The plan for these options. Raises UserError for a pass that does not exist, or a file that is none."""
    tables = [PORTABLE, LOWERING, ORT_CONTRIB if options.onnxruntime else ()]
    names = {each.name for phases in tables for part in phases for each in part.passes}
    for name in options.skip:
        if name not in names:
            raise UserError(f"--skip {name}", "no such pass", f"choose from {', '.join(sorted(names))}")
    chosen = [tuple(_chosen(part, options) for part in phases) for phases in tables]
    for argument in options.own:
        path, _, after = argument.partition("@")
        place = _place(chosen, after)
        if place is None:
            raise UserError(f"--pass {argument}", f"no pass {after} runs", f"choose from {', '.join(sorted(names))}")
        table, index = place
        chosen[table] = _with(chosen[table], index, after, load_pass(Path(path)))
    return Plan(*(tuple(_without(part, options.skip) for part in phases) for phases in chosen))


def _chosen(part: Phase, options: SurgeryOptions) -> Phase:
    """With the passes that the options ask for, as they ask for them."""
    asked = (each for each in part.passes if each.when(options))
    return replace(part, passes=tuple(replace(each, run=partial(each.run, **each.settings(options))) for each in asked))


def _without(part: Phase, skip: Sequence[str]) -> Phase:
    return replace(part, passes=tuple(each for each in part.passes if each.name not in skip))


def _place(tables: list[tuple[Phase, ...]], after: str) -> tuple[int, int] | None:
    """Table and phase in which `after` runs last, in the first table that has it; "" is the end of the phase OWN."""
    for number, phases in enumerate(tables):
        for index, part in reversed(list(enumerate(phases))):
            if part.name == OWN if not after else after in [each.name for each in part.passes]:
                return number, index
    return None


def _with(phases: tuple[Phase, ...], index: int, after: str, own: Pass) -> tuple[Phase, ...]:
    """With `own` after the last `after` of a phase; of one that is repeated, once it has ended."""
    part = phases[index]
    if part.repeated:
        return (*phases[: index + 1], Phase(own.name, (own,)), *phases[index + 1 :])
    names = [each.name for each in part.passes]
    place = len(names) - names[::-1].index(after) if after else len(names)
    return (*phases[:index], replace(part, passes=(*part.passes[:place], own, *part.passes[place:])), *phases[index + 1 :])
