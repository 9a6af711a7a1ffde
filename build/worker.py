"""The child process: parses the graph, audits what the parser made of it, builds the engine and streams it to disk."""

import os
import signal
import threading
import time
import traceback
from collections import Counter
from dataclasses import dataclass, replace
from multiprocessing.connection import Connection
from pathlib import Path

import onnx

from suture.build import flavour, kernels
from suture.build.advice import parser_advice
from suture.build.audit import stop_on_errors
from suture.build.memory_used import Memory
from suture.build.profiles import Profile, name_apart
from suture.build.progress import Fraction
from suture.build.ranges import smaller
from suture.build.weights import as_inputs
from suture.core.command import end_with_parent
from suture.core.dtypes import BY_TENSORRT
from suture.core.errors import UserError
from suture.core.network.audit import audit
from suture.core.network.walk import read_network
from suture.core.reader import read_bytes
from suture.core.signature import Signature
from suture.core.weights import MODEL_LIMIT

LAST_PHASE = "Building engine from subgraph"  # weights are written after it, which can take half of the time, unreported
SHAPES = "violate shape constraints"
ACTIVATIONS = "Total Activation Memory: "  # then bytes, once a profile


class ShapesRefused(UserError):
    """A graph does not take the shapes of a profile."""


@dataclass(frozen=True)
class Job:
    model: Path
    weights_root: Path
    engine: Path  # the file to write
    flavour: str
    capabilities: tuple[str, ...]
    signature: Signature | None
    profiles: tuple[Profile, ...]
    weights_as_inputs: frozenset[str]
    timings: Path  # of earlier builds, where there were any
    plugins: tuple[Path, ...] = ()  # libraries
    usual: bool = False  # whether nobody gave the profiles' shapes, so that smaller ones may take their place


def work(job: Job, sender: Connection) -> None:
    """Runs `build`; sends ("doing", what, fraction or None), at last ("done", result) or ("error", exception)."""
    end_with_parent()
    signal.signal(signal.SIGINT, signal.SIG_IGN)  # the parent gets it too, and ends this process
    os.dup2(os.open(os.devnull, os.O_WRONLY), 2)  # TensorRT writes there what it also logs
    lock = threading.Lock()  # TensorRT reports from several threads

    def send(*message):
        try:
            with lock:
                sender.send(message)
        except BrokenPipeError:  # the parent is gone
            os._exit(1)

    try:
        result = build(job, lambda what, fraction=None: send("doing", what, fraction))
    except (UserError, OSError) as error:
        send("error", error)
    except Exception:
        send("error", RuntimeError("the build process failed\n" + traceback.format_exc()))
    else:
        send("done", result)


def build(job: Job, report) -> dict:
    """Writes job.engine. Returns what is known of it: tensors, layers, kernels, findings, seconds, memory."""
    report("loading TensorRT")
    memory = Memory()
    trt = flavour.load(job.flavour)
    log = _log(trt)
    flavour.load_plugins(job.flavour, job.plugins)
    builder = trt.Builder(log)
    network = builder.create_network(1 << int(trt.NetworkDefinitionCreationFlag.STRONGLY_TYPED))

    report("parsing")
    started = time.monotonic()
    data = read_bytes(job.model, MODEL_LIMIT)
    proto = onnx.ModelProto.FromString(data)
    if job.weights_as_inputs:
        proto = as_inputs(proto, job.weights_as_inputs)
    if name_apart(proto, job.profiles) or job.weights_as_inputs:
        data = proto.SerializeToString()
    parser = trt.OnnxParser(network, log)
    if not parser.parse(data, str(job.weights_root / job.model.name)):  # external data lie relative to that path
        raise _parse_error(job.model, parser, proto)
    parsed = time.monotonic()
    _make_float32_attention_decomposable(trt, network)
    errors, warnings = len(log.errors), len(log.warnings)
    findings = audit(read_network(trt, network, job.model, checked=False), proto, job.signature)
    del log.errors[errors:], log.warnings[warnings:]  # what the bindings say of attributes that are not set
    stop_on_errors(job.model, findings)

    profiles = _build(trt, builder, network, job, proto, log, report)
    return {
        "version": trt.__version__,
        "profiles": profiles,
        "inputs": [_tensor(network.get_input(i)) for i in range(network.num_inputs)],
        "outputs": [_tensor(network.get_output(i)) for i in range(network.num_outputs)],
        "layers": dict(Counter(network.get_layer(i).type.name for i in range(network.num_layers)).most_common()),
        "kernels": kernels.read_kernels(log.layer_lists, [profile.name for profile in profiles] or ["fixed"]),
        "activation_bytes": log.activations,
        "findings": findings,
        "log_warnings": list(dict.fromkeys(log.warnings)),
        "seconds": {"parse": round(parsed - started, 3), "build": round(time.monotonic() - parsed, 3)},
        **memory.peaks(),
    }


def _build(trt, builder, network, job: Job, proto: onnx.ModelProto, log, report) -> tuple[Profile, ...]:
    """Writes the engine; returns its profiles, smaller ones than the usual where the graph does not take those."""
    profiles = job.profiles
    while True:
        report("building", 0.0)
        config = builder.create_builder_config()
        config.profiling_verbosity = trt.ProfilingVerbosity.DETAILED
        flavour.set_capabilities(job.flavour, config, job.capabilities)
        for profile in profiles:
            _add_profile(builder, config, profile)
        monitor = _monitor(trt, report)
        config.progress_monitor = monitor
        flavour.read_timings(job.flavour, config, job.timings)
        before = len(log.errors)
        try:
            _stream(trt, builder, network, config, job, log)
        except ShapesRefused as refused:
            halved = [smaller(proto, profile.shapes) for profile in profiles] if job.usual else []
            if not halved or None in halved:
                raise UserError(*refused.parts) from None
            profiles = tuple(replace(profile, shapes=shapes) for profile, shapes in zip(profiles, halved))
            del log.errors[before:]
            continue
        flavour.write_timings(job.flavour, config, job.engine.with_name(job.timings.name))
        return profiles


def _parse_error(model: Path, parser, proto: onnx.ModelProto) -> UserError:
    error = parser.get_error(0)
    where = f" {error.node_operator()} {error.node_name()}".rstrip()
    more = f" (and {parser.num_errors - 1} more)" if parser.num_errors > 1 else ""
    return UserError(
        model,
        f"TensorRT's parser rejects{where or ' it'}: {error.desc().strip()}{more}",
        parser_advice(proto, error.node_operator(), error.node_name(), error.desc()),
    )


def _make_float32_attention_decomposable(trt, network) -> None:
    """TensorRT has no fused float32 attention, and refuses to take it apart unless it may."""
    for i in range(network.num_layers):
        layer = network.get_layer(i)
        if layer.type == trt.LayerType.ATTENTION_INPUT and layer.get_input(0).dtype == trt.float32:
            layer.__class__ = trt.IAttentionInputLayer  # the bindings give every layer as an ILayer
            layer.attention.decomposable = True


def _add_profile(builder, config, profile: Profile) -> None:
    made = builder.create_optimization_profile()
    for name, shapes in profile.shapes.items():
        made.set_shape(name, *shapes)
    if config.add_optimization_profile(made) < 0:
        raise UserError(
            f"profile {profile.name}", "TensorRT does not accept its shapes", "change --shape, --max-batch or --max-prompt"
        )


def _stream(trt, builder, network, config, job: Job, log) -> None:
    with open(job.engine, "wb") as file:
        if hasattr(builder, "build_serialized_network_to_stream"):
            writer = _writer(trt, file)
            built = builder.build_serialized_network_to_stream(network, config, writer)
            if writer.error:
                raise writer.error
        else:
            plan = builder.build_serialized_network(network, config)
            built = plan is not None
            if built:
                file.write(plan)
    if not built:
        first = log.errors[0] if log.errors else "it does not say why"
        more = f" (and {len(log.errors) - 1} more)" if len(log.errors) > 1 else ""
        raise (ShapesRefused if SHAPES in first else UserError)(
            job.model,
            f"TensorRT cannot build it: {first.strip()}{more}",
            "change what it names, or --compute-capability",
        )


def _log(trt):
    """A logger that keeps errors, warnings that say something, the builder's layer lists, and each profile's activations."""

    class Log(trt.ILogger):
        def __init__(self):
            super().__init__()
            self.errors, self.warnings, self.layer_lists, self.activations = [], [], [], []

        def log(self, severity, message):
            if kernels.is_layer_list(message):
                self.layer_lists.append(message)
            elif message.startswith(ACTIVATIONS):
                self.activations.append(int(message.removeprefix(ACTIVATIONS).split()[0]))
            elif severity in (trt.ILogger.INTERNAL_ERROR, trt.ILogger.ERROR):
                self.errors.append(message)
            elif severity == trt.ILogger.WARNING and "Int64 binding" not in message:
                self.warnings.append(message)

    return Log()


def _monitor(trt, report):
    class Monitor(trt.IProgressMonitor):
        def __init__(self):
            super().__init__()
            self.fraction, self.writing = Fraction(), False

        def phase_start(self, name, parent, steps):
            self.fraction.start(name, parent, steps)

        def step_complete(self, name, step):
            fraction = self.fraction.step(name, step)
            if not self.writing:
                report("building", fraction)
            return True

        def phase_finish(self, name):
            self.fraction.finish(name)
            if name == LAST_PHASE:
                self.writing = True
                report("writing weights")

    return Monitor()


def _writer(trt, file):
    class Writer(trt.IStreamWriter):
        def __init__(self):
            super().__init__()
            self.error = None

        def write(self, data):
            try:
                return file.write(data)
            except OSError as error:  # must not cross TensorRT's frames
                error.filename = file.name
                self.error = error
                return 0

    return Writer()


def _tensor(tensor) -> dict:
    return {
        "name": tensor.name,
        "dtype": BY_TENSORRT[tensor.dtype.name].numpy,
        "shape": list(tensor.shape),
    }
