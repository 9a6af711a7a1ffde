"""Where a step's time goes on the device, by kernel."""

import re
from collections.abc import Callable

import torch
from torch.profiler import DeviceType, ProfilerActivity

from benchmarks.gpu_limits import synchronize

STEPS = 10
KINDS = (  # first match wins; names of cuBLAS, onnxruntime, flash attention and torch's own kernels
    ("collectives", r"nccl"),
    ("matrix products", r"gemm|matmul|gemv|cutlass.*(gemm|gett)|nvjet|cublas|splitKreduce|sm90_xmma|ampere_.*s\d+"),
    ("attention", r"flash|fmha|attention|softmax"),
    ("normalisation", r"norm"),
    ("rotary embedding", r"rotary|rope"),
    ("cache writing", r"scatter"),
    ("copies", r"memcpy|memset|copy"),
    ("split, transpose, concat", r"split|transpose|concat"),
    ("elementwise", r"elementwise|binary|unary|gelu|triton|cast|gather|where"),
)


def profile(step: Callable[[], object], device: str) -> list[dict]:
    """The kernels of one step, longest first: name, kind, how often, microseconds in all."""
    activity = ProfilerActivity.CUDA if device == "cuda" else ProfilerActivity.CPU
    for _ in range(3):
        step()
    synchronize(device)
    with torch.profiler.profile(activities=[activity]) as profiler:
        for _ in range(STEPS):
            step()
        synchronize(device)
    kernels = []
    for event in profiler.key_averages():
        if device == "cuda" and event.device_type != DeviceType.CUDA:
            continue
        micros = (event.self_device_time_total if device == "cuda" else event.self_cpu_time_total) / STEPS
        kernels.append({"name": event.key, "kind": kind_of(event.key), "count": event.count / STEPS, "us": micros})
    return sorted(kernels, key=lambda kernel: -kernel["us"])


def kind_of(name: str) -> str:
    return next((kind for kind, pattern in KINDS if re.search(pattern, name, re.IGNORECASE)), "other")


def table(kernels: list[dict], longest: int = 40) -> str:
    """By kind, then the longest by name."""
    kinds: dict[str, list[float]] = {}
    for kernel in kernels:
        total = kinds.setdefault(kernel["kind"], [0.0, 0.0])
        total[0] += kernel["us"]
        total[1] += kernel["count"]
    lines = [
        f"{us:9.1f} us {count:6.1f} kernels  {kind}" for kind, (us, count) in sorted(kinds.items(), key=lambda k: -k[1][0])
    ]
    lines.append(f"{sum(kernel['us'] for kernel in kernels):9.1f} us a step")
    lines += [f"{kernel['us']:9.1f} us {kernel['count']:6.1f} × {kernel['name'][:110]}" for kernel in kernels[:longest]]
    return "\n".join(lines)
