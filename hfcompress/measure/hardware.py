"""What this machine's processor and GPUs can do, and what that means for each quantization backend.

Nothing here forbids anything. A sentence tells what was measured, and where, or that it was not.
"""

from __future__ import annotations

import ctypes
import importlib.metadata
import sys
from collections.abc import Callable
from dataclasses import dataclass
from functools import cache

from hfcompress.measure.environment import cpu_flags, cpu_name

TENSOR_CORES = {"float16": (7, 0), "int8": (7, 5), "bfloat16": (8, 0), "float8": (8, 9)}
"""The compute capability from which NVIDIA's tensor cores multiply a type (CUDA C++ Programming Guide)."""


@dataclass(frozen=True)
class Gpu:
    """One NVIDIA GPU.

    Attributes:
        name: As the driver says it.
        capability: Its compute capability, such as `(9, 0)`.
    """

    name: str
    capability: tuple[int, int]

    @property
    def multiplies(self) -> list[str]:
        """The types that its tensor cores multiply."""
        return [kind for kind, least in TENSOR_CORES.items() if self.capability >= least]


@dataclass(frozen=True)
class Abilities:
    """What the machine has.

    Attributes:
        cpu: The processor's name.
        flags: Its vector instructions for int8 and bfloat16, as the kernel calls them; empty where the system does
            not tell them.
        gpus: The GPUs that the driver shows this process; none where PyTorch is built for the CPU alone.
    """

    cpu: str
    flags: frozenset[str]
    gpus: tuple[Gpu, ...] = ()

    def has(self, *flags: str) -> bool:
        """Whether the processor has any of these."""
        return not self.flags.isdisjoint(flags)


@cache
def abilities() -> Abilities:
    """This machine's; PyTorch is not imported."""
    return Abilities(cpu_name(), frozenset(cpu_flags()), tuple(gpus()))


def gpus() -> list[Gpu]:
    """The GPUs that CUDA's driver shows, where the PyTorch that is installed can use them."""
    if importlib.metadata.version("torch").endswith("+cpu"):
        return []
    try:
        driver = ctypes.CDLL("nvcuda.dll" if sys.platform == "win32" else "libcuda.so.1")
    except OSError:
        return []
    count = ctypes.c_int()
    if driver.cuInit(0) or driver.cuDeviceGetCount(ctypes.byref(count)):
        return []
    return [_asked(driver, number) for number in range(count.value)]


def _asked(driver: ctypes.CDLL, number: int) -> Gpu:
    device, value, name = ctypes.c_int(), ctypes.c_int(), ctypes.create_string_buffer(256)
    driver.cuDeviceGet(ctypes.byref(device), number)
    driver.cuDeviceGetName(name, len(name), device)
    capability = []
    for attribute in (75, 76):  # CU_DEVICE_ATTRIBUTE_COMPUTE_CAPABILITY_MAJOR and _MINOR
        driver.cuDeviceGetAttribute(ctypes.byref(value), attribute, device)
        capability.append(value.value)
    return Gpu(name.value.decode(), (capability[0], capability[1]))


def described(found: Abilities) -> dict[str, str]:
    """The abilities, by name, for people."""
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


@dataclass(frozen=True)
class Rule:
    """A sentence about backends, and the machines that it is of.

    Attributes:
        backends: Their names.
        holds: Whether it is of a machine.
        said: The sentence; it tells what was measured, and on which kind of machine, or that nothing was.
    """

    backends: tuple[str, ...]
    holds: Callable[[Abilities], bool]
    said: str


_OLDER = "than PyTorch in float32 on a processor with AVX2 alone (BERT's width, 2 threads)"
_NEWER = "than PyTorch in float32 on a processor with AVX-512 and VNNI (MiniLM-L6, 2 threads, batch 1 and 32)"
_UNMEASURED = "its speed was not measured on "
_TORCHAO = ("torchao_int8", "torchao_int8_weight_only", "torchao_int4")


def _avx2(found: Abilities) -> bool:
    return found.has("avx2") and not found.has("avx512f")


def _avx512(found: Abilities) -> bool:
    return found.has("avx512f")


def _saturates(found: Abilities) -> bool:
    return found.has("avx2") and not found.has("avx512_vnni", "avx_vnni")


def _arm(found: Abilities) -> bool:
    return found.has("asimddp", "i8mm")


def _untold(found: Abilities) -> bool:
    return not found.flags


def _no_bfloat16(found: Abilities) -> bool:
    return bool(found.flags) and not found.has("avx512_bf16", "amx_bf16", "bf16")


def _gpu(found: Abilities) -> bool:
    return bool(found.gpus)


def _gpu_without(kind: str) -> Callable[[Abilities], bool]:
    return lambda found: any(kind not in gpu.multiplies for gpu in found.gpus)


RULES = (
    Rule(("bnb_8bit",), _avx2, f"measured 1.7 to 2.0 times slower {_OLDER}: it saves memory, not time"),
    Rule(("bnb_8bit",), _avx512, f"measured 1.3 to 1.5 times slower {_NEWER}: it saves memory, not time"),
    Rule(
        ("bnb_4bit",),
        _avx2,
        f"measured 1.1 to 1.2 times slower {_OLDER}, and 4 to 5 times with `compute_dtype: bfloat16`: it saves memory, "
        "not time",
    ),
    Rule(("float16",), _avx2, f"measured 3.1 to 4.1 times slower {_OLDER}"),
    Rule(("float16",), _avx512, f"measured 1.5 to 4.1 times slower {_NEWER}"),
    Rule(("bfloat16",), _no_bfloat16, f"measured 3.6 to 4.8 times slower {_OLDER}: this one has no bfloat16 either"),
    Rule(("torchao_int8",), _avx2, f"measured 22 times slower {_OLDER}"),
    Rule(("torchao_int8",), _avx512, f"measured as fast to 1.4 times slower {_NEWER}"),
    Rule(("torchao_int8_weight_only",), _avx2, f"measured 1.1 times slower {_OLDER}"),
    Rule(("torchao_int8_weight_only",), _avx512, f"measured 1.2 to 1.7 times slower {_NEWER}"),
    Rule(("torchao_int4",), _avx2, f"measured 1.6 times slower {_OLDER}"),
    Rule(("torchao_int4",), _avx512, f"measured 1.1 to 2.0 times slower {_NEWER}"),
    Rule(("onnx_int4",), _avx2, f"measured 1.2 times faster to 1.1 times slower {_OLDER}: faster at batch 1 alone"),
    Rule(("onnx_fp16",), _avx2, _UNMEASURED + "a processor with AVX2 alone"),
    Rule(
        ("onnx_int8",),
        _saturates,
        "without VNNI the int8 products saturate, which can cost accuracy: see the report, or say `reduce_range: true`",
    ),
    Rule(
        ("openvino_int8",),
        _saturates,
        "without VNNI, int8 was measured 1.2 to 1.4 times slower than OpenVINO's own float32 on a processor with AVX2 "
        "alone (MiniLM-L6, 1 thread)",
    ),
    Rule(("bnb_8bit", "bnb_4bit", "float16", *_TORCHAO), _arm, _UNMEASURED + "ARM"),
    Rule(
        ("bnb_8bit", "bnb_4bit", "float16", "bfloat16", *_TORCHAO),
        _untold,
        _UNMEASURED + "this processor: slower than float32 on some, without a gain on others",
    ),
    Rule(("float16",), _gpu_without("float16"), "this GPU has no tensor cores for float16; not measured"),
    Rule(("bfloat16",), _gpu_without("bfloat16"), "this GPU has no tensor cores for bfloat16; not measured"),
    Rule(("bnb_8bit", *_TORCHAO), _gpu_without("int8"), "this GPU has no tensor cores for int8; not measured"),
    Rule(("bnb_8bit", "bnb_4bit", "gptq", "float16", "bfloat16", *_TORCHAO), _gpu, _UNMEASURED + "a GPU"),
)
"""What bears on speed where a backend may be slower than float32, and on accuracy where a processor adds int8 products
in too few bits. Figures are ratios of medians of interleaved runs."""


def advice(found: Abilities, backend: str) -> list[str]:
    """What to mind about a backend on such a machine; empty where it was measured to be faster than float32 there."""
    return [rule.said for rule in RULES if backend in rule.backends and rule.holds(found)]
