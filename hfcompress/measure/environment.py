"""Describes the machine and the package versions that figures come from."""

from __future__ import annotations

import importlib.metadata
import os
import platform
from pathlib import Path
from typing import Any

from hfcompress.utils.processors import default_threads

PACKAGES = ("hfcompress", "torch", "transformers", "datasets", "accelerate", "onnxruntime", "bitsandbytes", "optimum",
            "openvino", "nncf")  # fmt: skip
FLAGS = ("avx2", "avx512f", "avx512_vnni", "avx_vnni", "avx512_bf16", "amx_int8", "amx_bf16", "asimddp", "i8mm", "bf16")


def environment() -> dict[str, Any]:
    """Returns the device, the operating system, and the versions of Python and of the packages."""
    return {
        **device_facts(),
        "platform": f"{platform.system()} {platform.machine()}",
        "python": platform.python_version(),
        "versions": versions(),
    }


def device_facts() -> dict[str, Any]:
    """Returns the processor, its vector instructions, the cores that this process may use, and the accelerator."""
    return {"cpu": cpu_name(), "cpu_flags": cpu_flags(), "cores": default_threads(), "accelerator": accelerator()}


def versions() -> dict[str, str]:
    """Returns the installed versions of the packages that figures depend on."""
    found = {}
    for name in PACKAGES:
        try:
            found[name] = importlib.metadata.version(name)
        except importlib.metadata.PackageNotFoundError:
            continue
    return found


def cpu_name() -> str:
    """Returns the processor's name."""
    return _cpuinfo("model name") or platform.processor() or platform.machine()


def cpu_flags() -> list[str]:
    """Lists the vector instructions that matter to int8 and bfloat16; empty if the system does not show them."""
    present = set((_cpuinfo("flags") or _cpuinfo("Features")).split())  # of x86, of ARM
    return [flag for flag in FLAGS if flag in present]


def _cpuinfo(key: str) -> str:
    path = Path("/proc/cpuinfo")
    if not path.is_file():
        return ""
    lines = (line.partition(":") for line in path.read_text().splitlines())
    return next((value.strip() for name, _, value in lines if name.strip() == key), "")


def accelerator() -> str | None:
    """Returns the GPU's name, or None without a GPU."""
    if os.environ.get("CUDA_VISIBLE_DEVICES") == "":
        return None
    import torch

    return torch.cuda.get_device_name(0) if torch.cuda.is_available() else None
