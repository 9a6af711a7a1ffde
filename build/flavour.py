"""Standard TensorRT and TensorRT-RTX: one Python API, and here everything in which they differ.

standard    builds for the GPU at hand, so it needs one
rtx         builds ahead of time, without a GPU, for the compute capabilities given
"""

import ctypes
import importlib
import re
from collections.abc import Sequence
from pathlib import Path
from types import ModuleType

from suture.core.errors import UserError
from suture.core.reader import status

MODULES = {"standard": "tensorrt", "rtx": "tensorrt_rtx"}
PACKAGES = {"standard": "tensorrt", "rtx": "tensorrt-rtx"}
RTX_DEFAULT = ("8.6", "8.9", "12.0")  # GeForce RTX 30, 40 and 50; further ones cost next to nothing


def choose(wanted: str) -> str:
    """ "standard" or "rtx" for what --tensorrt says. `auto`: standard where it is installed beside a GPU, else rtx."""
    if wanted == "auto":
        wanted = "standard" if gpu_capability() and _importable("standard") else "rtx"
    if not _importable(wanted):
        raise UserError("--tensorrt", f"{MODULES[wanted]} cannot be imported", f"pip install {PACKAGES[wanted]}")
    if wanted == "standard" and not gpu_capability():
        raise UserError("--tensorrt standard", "no GPU here, and it builds only for one at hand", "take rtx")
    return wanted


def load(name: str) -> ModuleType:
    """The Python module of a flavour; both offer the same names."""
    return importlib.import_module(MODULES[name])


def capabilities(name: str, wanted: Sequence[str] | None) -> tuple[str, ...]:
    """The compute capabilities ("8.9") that an engine is built for. Raises UserError if the flavour cannot."""
    if name == "standard":
        if wanted and list(wanted) != [gpu_capability()]:
            raise UserError(
                "--compute-capability",
                f"standard TensorRT builds for the GPU at hand, {gpu_capability()}",
                "leave it out, or take --tensorrt rtx",
            )
        return (gpu_capability(),)
    members = [re.fullmatch(r"SM(\d+)(\d)", member) for member in load(name).ComputeCapability.__members__]
    allowed = [f"{match[1]}.{match[2]}" for match in members if match]
    for capability in wanted or []:
        if capability not in allowed:
            raise UserError(
                f"--compute-capability {capability}",
                "TensorRT-RTX does not build for it",
                f"choose among {', '.join(allowed)}",
            )
    return tuple(dict.fromkeys(wanted or RTX_DEFAULT))


def set_capabilities(name: str, config, wanted: tuple[str, ...]) -> None:
    """Tells a builder config what to build for; standard TensorRT takes the GPU at hand by itself."""
    if name == "standard":
        return
    config.num_compute_capabilities = len(wanted)
    for index, capability in enumerate(wanted):
        config.set_compute_capability(getattr(load(name).ComputeCapability, "SM" + capability.replace(".", "")), index)


def read_timings(name: str, config, file: Path) -> None:
    """Gives a builder config the kernel timings of earlier builds on this GPU. TensorRT-RTX times nothing."""
    if name == "standard":
        timings = config.create_timing_cache(file.read_bytes() if file.is_file() else b"")
        config.set_timing_cache(timings, False)  # False: not those of another GPU


def write_timings(name: str, config, file: Path) -> None:
    """Keeps a finished build's kernel timings for the next one."""
    if name == "standard":
        file.write_bytes(bytes(config.get_timing_cache().serialize()))


def plugins(name: str, libraries: list[Path]) -> tuple[Path, ...]:
    """The plugin libraries, absolute. Raises UserError for one that is not a regular file."""
    for library in libraries:
        status(library, f"name a library of plugins for {PACKAGES[name]}")
    return tuple(library.resolve() for library in libraries)


def load_plugins(name: str, libraries: tuple[Path, ...]) -> None:
    """Loads plugin libraries, which the parser then knows, into this process. Raises UserError for one that is none."""
    registry = load(name).get_plugin_registry()
    for library in libraries:
        try:
            ctypes.CDLL(str(library))  # says why it cannot be loaded; the registry does not
        except OSError as error:
            raise UserError(library, f"cannot be loaded ({error})", f"build it for {PACKAGES[name]}") from None
        before = len(registry.all_creators)
        if registry.load_library(str(library)) is None or len(registry.all_creators) == before:
            raise UserError(library, "offers no plugin (no getCreators or getPluginCreators)", f"build it for {PACKAGES[name]}")


def gpu_capability() -> str | None:
    """The first GPU's compute capability ("9.0") as its driver says, or None where there is no GPU."""
    try:
        cuda = ctypes.CDLL("libcuda.so.1")
    except OSError:
        return None
    device, major, minor = ctypes.c_int(), ctypes.c_int(), ctypes.c_int()
    if cuda.cuInit(0) or cuda.cuDeviceGet(ctypes.byref(device), 0):
        return None
    for value, attribute in ((major, 75), (minor, 76)):  # CU_DEVICE_ATTRIBUTE_COMPUTE_CAPABILITY_MAJOR, _MINOR
        cuda.cuDeviceGetAttribute(ctypes.byref(value), attribute, device)
    return f"{major.value}.{minor.value}"


def _importable(name: str) -> bool:
    try:
        load(name)
    except (ImportError, OSError):  # OSError: the package is there, the libraries it loads are not
        return False
    return True
