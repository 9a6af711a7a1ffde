"""python run.py: runs this folder's engine on this machine's GPU, compares it with onnxruntime's logits, writes results.npz.

Needs numpy, torch with CUDA, and the TensorRT that engine.json names. Where that engine cannot run here but standard
TensorRT is installed, an engine for this GPU is built from weights/model.trt.onnx first. Bring results.npz back:

    python -m validate DIR --import results.npz
"""

import json
import sys
import time
from pathlib import Path

import numpy as np
import torch
from engine import Engine, EngineSession, read_description, to_numpy, why_not

HERE = Path(__file__).resolve().parent
SEED = 20  # of the noise that fills the caches: attention to a slot that nothing was written to shows in the output


def main() -> int:
    bundle, description = json.loads((HERE / "bundle.json").read_text(encoding="utf-8")), read_description(HERE / "engine.json")
    path = HERE / "model.engine"
    if reason := why_not(description):
        try:
            import tensorrt
        except ImportError:
            print(f"run.py: this engine cannot run here: {reason}; nor is standard TensorRT installed to build another")
            return 2
        if not torch.cuda.is_available():
            print(f"run.py: {reason}")
            return 2
        print(f"run.py: {reason}; building one for this GPU with standard TensorRT")
        path, description = build_here(description)
    engine = Engine(path, description, HERE / "weights")
    gpu, tensorrt = torch.cuda.get_device_name(), f"{engine.trt.__name__} {engine.trt.__version__}"
    with np.load(HERE / "steps.npz") as steps:
        results, worst, seconds = run(engine, bundle, dict(steps))
    engine.save_runtime_cache()
    about = {**bundle, "gpu": gpu, "tensorrt": tensorrt, "decode_seconds": seconds}
    np.savez(HERE / "results.npz", about=json.dumps(about), **results)
    passed = all(error <= bundle["tolerance"] for error in worst.values())
    print(f"run.py: {'passed' if passed else 'DIFFERENT'} on {gpu} with {tensorrt} → {HERE / 'results.npz'}")
    return 0 if passed else 1


def run(
    engine: Engine, bundle: dict, steps: dict[str, np.ndarray]
) -> tuple[dict[str, np.ndarray], dict[str, float], float | None]:
    """Returns what results.npz gets, each scenario's worst error of the largest logit, and seconds a decoding step."""
    results, worst, times = {}, {}, []
    for number, scenario in enumerate(bundle["scenarios"]):
        batch = len(steps[f"{number}/0/counts"])
        session, noise = EngineSession(engine, batch), np.random.default_rng(SEED)
        session.fill({name: noise.standard_normal(cache.shape, np.float32) for name, cache in session.caches.items()})
        for name, constant in session.crossed.items():
            constant.copy_(torch.from_numpy(steps[f"{number}/constant/{name}"]))
        lengths, errors = np.zeros(batch, np.int64), []
        for step in range(scenario["steps"]):
            place = f"{number}/{step}"
            feeds = {
                name.removeprefix(f"{place}/feed/"): value for name, value in steps.items() if name.startswith(f"{place}/feed/")
            }
            counts, expected = steps[f"{place}/counts"], steps[f"{place}/expected"].astype(np.float32)
            started = time.perf_counter()
            logits = session.run(feeds)
            if batch == 1 and steps[f"{place}/tokens"].shape[1] == 1:
                times.append(time.perf_counter() - started)
            errors.append(worst_error(valid(logits, counts), expected))
            results[f"{place}/logits"] = logits
            results |= {f"{place}/{name}": steps[f"{place}/{name}"] for name in ("tokens", "counts", "alpha")}
            lengths += counts
        results |= {f"{number}/{name}": to_numpy(cache[:, :, : lengths.max()]) for name, cache in session.caches.items()}
        worst[scenario["name"]] = max(errors)
        print(f"run.py: {scenario['name']}: worst error {max(errors):.1e} of the largest logit")
    return results, worst, float(np.median(times)) if times else None


def valid(logits: np.ndarray, counts: np.ndarray) -> np.ndarray:
    """The valid tokens' logits, row after row; of a graph that gives only the last ones, those."""
    rows = np.flatnonzero(counts)
    if logits.shape[1] < counts.max():
        return logits[rows, 0].astype(np.float32)
    return np.concatenate([logits[row, : counts[row]] for row in rows]).astype(np.float32)


def worst_error(found: np.ndarray, expected: np.ndarray) -> float:
    """Of the largest expected value; infinite where anything is not a number."""
    error = np.abs(found - expected).max() / max(np.abs(expected).max(), 1e-30)
    return float(error) if np.isfinite(error) else float("inf")


def build_here(description: dict) -> tuple[Path, dict]:
    """An engine for this GPU, with its weights inside, and its description."""
    import tensorrt as trt

    builder = trt.Builder(trt.Logger(trt.Logger.WARNING))
    network = builder.create_network(1 << int(trt.NetworkDefinitionCreationFlag.STRONGLY_TYPED))
    parser = trt.OnnxParser(network, trt.Logger(trt.Logger.WARNING))
    graph = HERE / "weights" / "model.trt.onnx"
    if not parser.parse(graph.read_bytes(), str(graph)):
        sys.exit(f"run.py: TensorRT's parser rejects the graph: {parser.get_error(0).desc()}")
    for index in range(network.num_layers):
        layer = network.get_layer(index)
        if layer.type == trt.LayerType.ATTENTION_INPUT and layer.get_input(0).dtype == trt.float32:
            layer.__class__ = trt.IAttentionInputLayer  # the bindings give every layer as an ILayer
            layer.attention.decomposable = True  # there is no fused float32 attention
    config = builder.create_builder_config()
    for profile in description["profiles"]:
        made = builder.create_optimization_profile()
        for name, shapes in profile["shapes"].items():
            made.set_shape(name, *shapes)
        config.add_optimization_profile(made)
    plan = builder.build_serialized_network(network, config)
    if plan is None:
        sys.exit("run.py: TensorRT cannot build the graph; its log above says why")
    path = HERE / "here.engine"
    path.write_bytes(plan)
    capability = ".".join(map(str, torch.cuda.get_device_capability()))
    return path, {
        **description,
        "tensorrt": {"flavour": "standard", "version": trt.__version__},
        "compute_capabilities": [capability],
        "inputs": [tensor for tensor in description["inputs"] if tensor["role"] != "weight"],
        "weights": {**description["weights"], "mode": "constant", "inputs": []},
    }


if __name__ == "__main__":
    sys.exit(main())
