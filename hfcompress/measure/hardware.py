"""Finds the vector instructions of this machine's processor and the types that its GPUs multiply."""

from __future__ import annotations

import ctypes
import importlib.metadata
import sys
from dataclasses import dataclass
from functools import cache

from hfcompress.measure.environment import cpu_flags, cpu_name

TENSOR_CORES = {"float16": (7, 0), "int8": (7, 5), "bfloat16": (8, 0), "float8": (8, 9)}
"""The compute capability from which NVIDIA's tensor cores multiply a type (CUDA C++ Programming Guide)."""


@dataclass(frozen=True)
class Gpu:
    """An NVIDIA GPU.

    Attributes:
        name: The driver's name for it.
        capability: Its compute capability, such as `(9, 0)`.
    """

    name: str
    capability: tuple[int, int]

    @property
    def multiplies(self) -> list[str]:
        """Lists the types that its tensor cores multiply."""
        return [kind for kind, least in TENSOR_CORES.items() if self.capability >= least]


@dataclass(frozen=True)
class Abilities:
    """The processor and the GPUs of a machine.

    Attributes:
        cpu: The processor's name.
        flags: Its vector instructions for int8 and bfloat16, under the kernel's names; empty if the system does not
            show them.
        gpus: The GPUs that the driver shows to this process; empty if PyTorch is built for the CPU alone.
    """

    cpu: str
    flags: frozenset[str]
    gpus: tuple[Gpu, ...] = ()

    def has(self, *flags: str) -> bool:
        """True if the processor has at least one of these flags."""
        return not self.flags.isdisjoint(flags)


@cache
def abilities() -> Abilities:
    """Returns the abilities of this machine; does not import PyTorch."""
    return Abilities(cpu_name(), frozenset(cpu_flags()), tuple(gpus()))


def gpus() -> list[Gpu]:
    """Lists the GPUs that the CUDA driver shows, if the installed PyTorch can use them.

    `torch.cuda` would tell the same, but importing torch takes 1.5 s of processor time, and all of `doctor` takes 0.8 s
    without it; `check` and `list backends` do not import it either. nvidia-ml-py is no dependency, and it does not
    follow `CUDA_VISIBLE_DEVICES`. A test compares this list with the GPUs of `torch.cuda`.
    """
    if importlib.metadata.version("torch").endswith("+cpu"):
        return []
    try:
        driver = ctypes.CDLL("nvcuda.dll" if sys.platform == "win32" else "libcuda.so.1")
    except OSError:
        return []
    count = ctypes.c_int()
    if driver.cuInit(0) or driver.cuDeviceGetCount(ctypes.byref(count)):
        return []
    return [_read_gpu(driver, number) for number in range(count.value)]


def _read_gpu(driver: ctypes.CDLL, number: int) -> Gpu:
    device, value, name = ctypes.c_int(), ctypes.c_int(), ctypes.create_string_buffer(256)
    driver.cuDeviceGet(ctypes.byref(device), number)
    driver.cuDeviceGetName(name, len(name), device)
    capability = []
    for attribute in (75, 76):  # CU_DEVICE_ATTRIBUTE_COMPUTE_CAPABILITY_MAJOR and _MINOR
        driver.cuDeviceGetAttribute(ctypes.byref(value), attribute, device)
        capability.append(value.value)
    return Gpu(name.value.decode(), (capability[0], capability[1]))


def describe_abilities(found: Abilities) -> dict[str, str]:
    """Describes the abilities in words; the keys name the processor and each GPU."""
    said = {
        "AVX2": found.has("avx2"),
        "AVX-512": found.has("avx512f"),
        "VNNI": found.has("avx512_vnni", "avx_vnni"),
        "AMX int8": found.has("amx_int8"),
        "AMX bfloat16": found.has("amx_bf16"),
        "AVX-512 bfloat16": found.has("avx512_bf16"),
        "ARM dot product": found.has("asimddp"),
        "ARM int8 matrices": found.has("i8mm"),
        "ARM bfloat16": found.has("bf16"),
    }
    able = ", ".join(name for name, is_there in said.items() if is_there)
    facts = {"processor": f"{found.cpu}: {able or 'this system does not tell its abilities'}"}
    for number, gpu in enumerate(found.gpus):
        major, minor = gpu.capability
        cores = f"tensor cores for {', '.join(gpu.multiplies)}" if gpu.multiplies else "no tensor cores"
        facts[f"GPU {number}"] = f"{gpu.name}: compute capability {major}.{minor}, {cores}"
    return facts if found.gpus else facts | {"GPU": "none that PyTorch can use"}
