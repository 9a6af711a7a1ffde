"""Build as a stage: a lowered graph in; model.engine, engine.json, kernels.json and trtexec.txt in a folder out."""

import json
import os
from dataclasses import asdict
from pathlib import Path

import onnx

from suture.build import flavour, process, trtexec
from suture.build.advice import advised
from suture.build.audit import audit_bound_weights, stop_on_errors
from suture.build.cost import add_cost, describe_graph, kernels_a_layer, over_floor
from suture.build.memory import Estimate, estimate, refuse_what_cannot_fit
from suture.build.options import MAX_PAST, BuildOptions
from suture.build.precisions import supported
from suture.build.profiles import Profile, make_profiles
from suture.build.weights import bindable, constant_bytes
from suture.build.worker import Job
from suture.core.errors import UserError
from suture.core.findings import Finding, together
from suture.core.network.graph_audit import audit_graph
from suture.core.shapes import check_shapes, parse_shapes
from suture.core.signature import Signature, find_signature
from suture.core.stage import Stage
from suture.core.weights import load_graph, weight_files, weights_root

ENGINE = "model.engine"
TIMINGS = "timings.cache"  # of kernels, where the flavour times them
HELD_TWICE = 100_000_000  # bytes; less may be kernels' code
TRTEXEC = "trtexec.txt"
WRITTEN = (ENGINE, "engine.json", "kernels.json", TRTEXEC)
COST = ("kernels", "kernels_by_layer", "kernels_outside_layers", "decode_bytes", "copied_bytes", "floor_bytes")


def build(model: Path, out: Path, options: BuildOptions, force: bool = False) -> None:
    """Builds the engine of the lowered graph in file `model` into `out`, unless it is there. Raises UserError where the graph
    cannot be built, or would compute something else, or this machine has too little."""
    proto = load_graph(model)
    root = weights_root(model)
    kind = flavour.choose(options.tensorrt)
    capabilities = flavour.capabilities(kind, options.compute_capability)
    capabilities = supported(proto, model, capabilities, asked=options.compute_capability is not None)
    signature = _signature(proto, model)
    bound = bindable(proto, model) if options.weights == "input" else []
    constant = constant_bytes(proto) - sum(weight.bytes for weight in bound)
    if options.max_past is not None and signature and signature.static:
        raise UserError("--max-past", f"{model} has a static cache, which holds {signature.capacity} tokens", "leave it out")
    shapes = parse_shapes(options.shape)
    check_shapes(model, proto.graph.input, shapes)
    two, limits = options.profiles == "two", {"batch": options.max_batch, "prompt": options.max_prompt}
    profiles = make_profiles(proto, signature, split=two, **limits, past=options.max_past or MAX_PAST, shapes=shapes)
    plugins = flavour.plugins(kind, options.plugin)
    made_of = {"tensorrt": kind, "compute_capability": capabilities, "weights": options.weights}
    made_of["profiles"] = [asdict(profile) for profile in profiles]
    stage = Stage("build", out, inputs=[model, *weight_files(proto, root), *plugins], options=made_of, writes=WRITTEN)
    if stage.up_to_date() and not force:
        print(f"build: {out} is up to date")
        return

    findings = audit_graph(proto, root, signature)
    if bound:
        findings += audit_bound_weights(proto, bound)
    findings = advised(findings, proto)
    stop_on_errors(model, findings)
    needed = estimate(proto, signature, profiles, constant, sum(weight.bytes for weight in bound))
    refuse_what_cannot_fit(model, out, needed, as_inputs=bool(bound))
    _say_memory(needed)
    usual = signature is None and not shapes
    if usual:
        _say_shapes(profiles)
    with stage.writing() as folder:
        names = frozenset(weight.name for weight in bound)
        job = Job(model, root, folder / ENGINE, kind, capabilities, signature, profiles, names, out / TIMINGS, plugins, usual)
        result = process.build(job)
        if result["profiles"] != profiles:
            profiles = result["profiles"]
            _say_shapes(profiles, "the graph takes none of the usual ones: ")
        kernels, graph = result["kernels"], describe_graph(proto, signature, names)
        findings += result["findings"]
        findings += advised([finding for listed in kernels for finding in add_cost(listed, graph)], proto)
        findings += held_twice(job.engine.stat().st_size, constant, len(profiles) > 1)
        description = {
            "tensorrt": {"flavour": kind, "version": result["version"]},
            "compute_capabilities": capabilities,
            "signature": asdict(signature) if signature else None,
            "inputs": with_roles(result["inputs"], signature, names),
            "outputs": with_roles(result["outputs"], signature, names),
            "profiles": [
                {
                    **(asdict(profile) if profile else {"name": listed["profile"], "shapes": {}}),
                    **{key: listed[key] for key in COST},
                }
                for profile, listed in zip(profiles or [None], kernels)
            ],
            "memory": {"estimated": asdict(needed), "activations": result["activation_bytes"]},
            "layers": result["layers"],
            "weights": {
                "mode": options.weights,
                "constant_bytes": constant,
                "root": os.path.relpath(root, out),
                "inputs": [asdict(weight) for weight in bound],
            },
            "findings": [asdict(finding) for finding in findings],
            "log_warnings": result["log_warnings"],
            "engine_bytes": job.engine.stat().st_size,
            "seconds": result["seconds"],
            "peak_memory_bytes": result["peak_memory_bytes"],
            "peak_anonymous_bytes": result["peak_anonymous_bytes"],
        }
        _write_json(folder / "engine.json", description)
        _write_json(folder / "kernels.json", {"profiles": kernels})
        external = bool(weight_files(proto, root))
        commands = trtexec.commands(
            model, root, out, ENGINE, profiles, capabilities, external=external, plugins=plugins, bound=bool(bound)
        )
        (folder / TRTEXEC).write_text(commands, encoding="utf-8")
    _say_result(description, findings, kernels)


def _signature(proto: onnx.ModelProto, model: Path) -> Signature | None:
    """None for a graph that is not a decoder with a KV cache."""
    try:
        return find_signature(proto, model)
    except UserError as error:
        if any("past" in value.name for value in proto.graph.input):
            print(f"build: note: {model} is not built as a decoder: {error.parts[1]}")
        return None


def with_roles(tensors: list[dict], signature: Signature | None, weights: frozenset[str]) -> list[dict]:
    """Adds what each tensor is for; a static cache's two ends are one buffer, named by `same_buffer_as`."""
    roles: dict[str | None, dict] = {name: {"role": "weight"} for name in weights}
    if signature:
        for role in ("tokens", "positions", "mask", "write_indices", "sequence_lengths", "ntk_alpha", "logits"):
            roles[getattr(signature, role)] = {"role": role}
        for cache in signature.caches:
            for name, other in ((cache.past, cache.present), (cache.present, cache.past)):
                roles[name] = {"role": "cache", **({"same_buffer_as": other} if signature.static else {})}
        roles |= {name: {"role": "layout"} for name in signature.layout}
        roles |= {cache.past: {"role": "encoder_cache"} for cache in signature.encoder_caches}
    return [{**tensor, **roles.get(tensor["name"], {"role": "other"})} for tensor in tensors]


def held_twice(engine: int, constant: int, two: bool) -> list[Finding]:
    """What two profiles fuse differently of constant weights, an engine holds twice. Sizes in bytes."""
    more = engine - constant
    if not two or more < max(0.2 * constant, HELD_TWICE):
        return []
    what = f"is {more / 1e6:,.1f} MB more than its weights: its two profiles hold some of them twice"
    return [Finding("warning", ENGINE, what, "take --weights input, which share them, or --profiles one")]


def _say_memory(needed: Estimate) -> None:
    gpu = [f"{part} {getattr(needed, part) / 1e9:,.2f}" for part in ("weights", "caches", "activations", "logits")]
    print(f"build: needs about {needed.builder_peak / 1e9:,.1f} GB of memory here; "
          f"on the GPU {needed.gpu / 1e9:,.2f} GB at the largest shapes ({', '.join(gpu)})")  # fmt: skip


def _say_shapes(profiles: tuple[Profile, ...], why: str = "") -> None:
    """The ranges that nobody gave, as --shape takes them."""
    for profile in profiles:
        ranges = [f"{name}={','.join('x'.join(map(str, each)) for each in shapes)}" for name, shapes in profile.shapes.items()]
        print(f"build: {why}for the shapes {' '.join(ranges)} (--shape gives others)")


def _say_result(description: dict, findings: list[Finding], kernels: list[dict]) -> None:
    for finding in together(findings):
        print(f"build: {finding.severity}: {finding}")
    counts = ", ".join(_cost(listed, description["signature"] is not None) for listed in kernels)
    if not any(listed["kernels"] for listed in kernels):
        counts = "the builder's log lists no kernels"
    size, gpus = description["engine_bytes"] / 1e6, ", ".join(description["compute_capabilities"])
    seconds, memory = sum(description["seconds"].values()), f"{description['peak_memory_bytes'] / 1e6:,.0f} MB"
    if anonymous := description["peak_anonymous_bytes"]:
        memory += f" ({anonymous / 1e6:,.0f} MB of it anonymous)"
    print(f"build: {ENGINE} {size:,.1f} MB for {gpus} in {seconds:.1f} s, peak memory {memory}; {counts}")


def _cost(listed: dict, decoder: bool) -> str:
    """What a decode step, or a run, costs in one profile."""
    details = [f"{kernels_a_layer(listed)} a layer"] if listed["kernels_by_layer"] else []
    if floor := over_floor(listed):
        details.append(f"a {'token' if decoder else 'run'} moves {floor:.2f} × the floor")
    if listed["jumps"]:
        details.append("of both branches of an If, or of a Loop's round")
    return f"{listed['profile']} {listed['kernels']} kernels" + f" ({', '.join(details)})" * bool(details)


def _write_json(path: Path, value: dict) -> None:
    path.write_text(json.dumps(value, indent=2) + "\n", encoding="utf-8")
