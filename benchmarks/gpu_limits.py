"""What the device can do at most, measured: bytes copied and read a second, matrix arithmetic; and clocks for the rest."""

import gc
import statistics
import time
from collections.abc import Callable
from dataclasses import asdict, dataclass

import torch

WARMUP, REPEATS = 5, 30


@dataclass(frozen=True)
class GpuLimits:
    device: str
    copy_bytes_per_s: float  # read plus written
    read_bytes_per_s: float
    matmul_flop_per_s: float

    def __str__(self) -> str:
        return (
            f"{self.device}: copy {self.copy_bytes_per_s / 1e9:,.0f} GB/s, read {self.read_bytes_per_s / 1e9:,.0f} GB/s, "
            f"matrix products {self.matmul_flop_per_s / 1e12:,.1f} TFLOP/s"
        )

    as_json = asdict


def measure(device: str, dtype: torch.dtype, size: int, width: int) -> GpuLimits:
    """Copies and sums `size` bytes, multiplies random matrices [width, width]."""
    source = torch.randn(size // 4, device=device)
    target = torch.empty_like(source)
    copy = median_seconds(lambda: target.copy_(source), device)
    read = median_seconds(lambda: source.sum(), device)
    left, right = (torch.randn(width, width, device=device, dtype=dtype) for _ in range(2))
    product = median_seconds(lambda: left @ right, device)
    name = torch.cuda.get_device_name() if device == "cuda" else "CPU"
    return GpuLimits(name, 2 * size / copy, size / read, 2 * width**3 / product)


def median_seconds(step: Callable[[], object], device: str, warmup: int = WARMUP, repeats: int = REPEATS) -> float:
    """The median of `repeats` runs, the device idle before and after each."""
    seconds = []
    for i in range(warmup + repeats):
        synchronize(device)
        started = time.perf_counter()
        step()
        synchronize(device)
        if i >= warmup:
            seconds.append(time.perf_counter() - started)
    return statistics.median(seconds)


def synchronize(device: str) -> None:
    if device == "cuda":
        torch.cuda.synchronize()


def free_memory(device: str) -> None:
    """What nothing refers to any more goes back to the device."""
    gc.collect()
    if device == "cuda":
        torch.cuda.empty_cache()


def relative_norm(found: torch.Tensor, exact: torch.Tensor) -> float:
    """‖found − exact‖ / ‖exact‖, both in float32; NaN, which nothing allows, where one of them is."""
    return ((found.float() - exact).norm() / exact.norm()).item()


class Clock:
    """Says what is done, with the seconds since it was made."""

    def __init__(self) -> None:
        self.started = time.monotonic()

    @property
    def seconds(self) -> float:
        return time.monotonic() - self.started

    def say(self, what: str) -> None:
        print(f"{self.seconds:6.1f} s  {what}", flush=True)
