"""What a machine can do, and the sentences that follow from it: of measured machines only what was measured."""

from __future__ import annotations

import ctypes
import importlib.metadata
import re
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest

from hfcompress.measure import environment, hardware
from hfcompress.measure.hardware import Abilities, Gpu, abilities, describe_abilities
from hfcompress.quantization.backends.base import BACKENDS
from tests import factories

AVX2 = Abilities("A processor", frozenset({"avx2"}))
VNNI = Abilities("A processor", frozenset({"avx2", "avx_vnni"}))
ZEN4 = Abilities("A processor", frozenset({"avx2", "avx512f", "avx512_vnni", "avx512_bf16"}))
ARM = Abilities("A processor", frozenset({"asimddp", "bf16"}))
UNTOLD = Abilities("A processor", frozenset())
H100, T4, P100 = Gpu("H100", (9, 0)), Gpu("T4", (7, 5)), Gpu("P100", (6, 0))


def said(found: Abilities, backend: str) -> str:
    return "; ".join(BACKENDS.get(backend)().advice(found))


@pytest.mark.parametrize(
    ("found", "backend", "sentence"),
    [
        (AVX2, "bnb_8bit", "measured 1.7 to 2.0 times slower than PyTorch in float32 on a processor with AVX2 alone"),
        (AVX2, "torchao_int8", "measured 22 times slower"),
        (AVX2, "bfloat16", "measured 3.6 to 4.8 times slower"),
        (AVX2, "onnx_int8", "`reduce_range: true`"),
        (AVX2, "openvino_int8", "without VNNI"),
        (ZEN4, "bnb_8bit", "measured 1.3 to 1.5 times slower than PyTorch in float32 on a processor with AVX-512"),
        (ARM, "float16", "not measured on ARM"),
        (UNTOLD, "bfloat16", "not measured on this processor"),
        (replace(ZEN4, gpus=(H100,)), "gptq", "not measured on a GPU"),
        (replace(ZEN4, gpus=(T4,)), "bfloat16", "no tensor cores for bfloat16"),
    ],
)
def test_what_is_slower_here_is_said_with_where_it_was_measured(found: Abilities, backend: str, sentence: str) -> None:
    assert sentence in said(found, backend)


@pytest.mark.parametrize(
    ("found", "backend", "word"),
    [
        (ZEN4, "bfloat16", ""),
        (ZEN4, "onnx_int8", ""),
        (ZEN4, "openvino_int8", ""),
        (VNNI, "onnx_int8", ""),
        (ARM, "onnx_int8", ""),
        (ARM, "bfloat16", "slower"),
        (ZEN4, "bnb_8bit", "GPU"),
        (replace(ZEN4, gpus=(H100,)), "bfloat16", "tensor cores"),
        (replace(ZEN4, gpus=(H100,)), "onnx_int8", ""),
        (ZEN4, "float16", "AVX2 alone"),
    ],
)
def test_nothing_is_said_of_another_machine(found: Abilities, backend: str, word: str) -> None:
    assert (word not in said(found, backend)) if word else said(found, backend) == ""


NOTES = [note for name in BACKENDS.names() for note in BACKENDS.get(name).notes]


def test_every_sentence_tells_what_was_measured_or_that_it_was_not() -> None:
    for note in NOTES:
        assert "measured" in note.sentence or "see the report" in note.sentence
        if re.search(r"\d times", note.sentence):
            assert "processor with" in note.sentence


def test_every_sentence_is_reached_by_some_machine() -> None:
    machines = [AVX2, VNNI, ZEN4, ARM, UNTOLD, *(replace(ZEN4, gpus=(gpu,)) for gpu in (H100, T4, P100))]
    for note in NOTES:
        assert any(note.holds(found) for found in machines), note.sentence
        assert not all(note.holds(found) for found in machines), note.sentence


def test_the_flags_are_the_kernel_s(monkeypatch: pytest.MonkeyPatch) -> None:
    lines = {"flags": "fpu avx2 avx512f avx512_vnni sse", "Features": ""}
    monkeypatch.setattr(environment, "_cpuinfo", lambda key: lines[key])
    assert environment.cpu_flags() == ["avx2", "avx512f", "avx512_vnni"]
    lines.update({"flags": "", "Features": "fp asimd asimddp i8mm"})
    assert environment.cpu_flags() == ["asimddp", "i8mm"]


@pytest.mark.parametrize(
    ("gpu", "multiplies"),
    [
        (H100, ["float16", "int8", "bfloat16", "float8"]),
        (Gpu("A100", (8, 0)), ["float16", "int8", "bfloat16"]),
        (T4, ["float16", "int8"]),
        (P100, []),
    ],
)
def test_the_types_of_tensor_cores(gpu: Gpu, multiplies: list[str]) -> None:
    assert gpu.multiplies == multiplies


class Driver:
    """CUDA's driver as far as it is asked."""

    def __init__(self, found: list[Gpu], broken: int = 0) -> None:
        self.found, self.broken = found, broken

    def cuInit(self, _: int) -> int:  # noqa: N802
        return self.broken

    def cuDeviceGetCount(self, count: Any) -> int:  # noqa: N802
        count._obj.value = len(self.found)
        return 0

    def cuDeviceGet(self, device: Any, number: int) -> int:  # noqa: N802
        device._obj.value = number
        return 0

    def cuDeviceGetName(self, name: Any, size: int, device: Any) -> int:  # noqa: N802
        name.value = self.found[device.value].name.encode()[:size]
        return 0

    def cuDeviceGetAttribute(self, value: Any, attribute: int, device: Any) -> int:  # noqa: N802
        value._obj.value = self.found[device.value].capability[attribute - 75]
        return 0


@pytest.mark.parametrize(
    ("torch", "driver", "expected"),
    [
        ("2.13.0", Driver([H100, T4]), [H100, T4]),
        ("2.13.0+cu130", Driver([P100]), [P100]),
        ("2.13.0+cpu", Driver([H100]), []),
        ("2.13.0", Driver([H100], broken=100), []),
        ("2.13.0", OSError("no such library"), []),
    ],
)
def test_gpus_are_those_that_the_driver_and_pytorch_have(
    torch: str, driver: Any, expected: list[Gpu], monkeypatch: pytest.MonkeyPatch
) -> None:
    def load(_: str) -> Any:
        if isinstance(driver, OSError):
            raise driver
        return driver

    monkeypatch.setattr(importlib.metadata, "version", lambda _: torch)
    monkeypatch.setattr(ctypes, "CDLL", load)
    assert hardware.gpus() == expected


def test_this_machine_s_gpus_are_pytorch_s() -> None:
    import torch

    assert len(abilities().gpus) == torch.cuda.device_count()
    for number, gpu in enumerate(abilities().gpus):
        assert (gpu.name, gpu.capability) == (
            torch.cuda.get_device_name(number),
            torch.cuda.get_device_capability(number),
        )


def test_abilities_are_described() -> None:
    assert describe_abilities(ZEN4) == {
        "processor": "A processor: AVX2, AVX-512, VNNI, AVX-512 bfloat16",
        "GPU": "none that PyTorch can use",
    }
    assert describe_abilities(UNTOLD)["processor"] == "A processor: this system does not tell its abilities"
    facts = describe_abilities(replace(ARM, gpus=(T4, P100)))
    assert facts["GPU 0"] == "T4: compute capability 7.5, tensor cores for float16, int8"
    assert facts["GPU 1"] == "P100: compute capability 6.0, no tensor cores"


# The commands


def test_doctor_without_a_model_tells_of_the_machine(capsys: pytest.CaptureFixture[str]) -> None:
    assert factories.run_cli("doctor") == 0
    shown = capsys.readouterr().out
    assert describe_abilities(abilities())["processor"] in shown
    for name in BACKENDS.names():
        assert f"\n {name} " in shown


def test_doctor_s_table_has_reason_repair_and_advice(
    monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.setattr(hardware, "abilities", lambda: AVX2)
    monkeypatch.setattr(BACKENDS.get("onnx_int8"), "unavailable", lambda _: ("onnx is gone", "bring it back"))
    assert factories.run_cli("doctor") == 0
    shown = " ".join(capsys.readouterr().out.split())
    assert "no: onnx is gone; bring it back" in shown
    assert "torchao_int8 " in shown
    assert "measured 22 times slower" in shown


@pytest.mark.parametrize(
    ("state", "said"),
    [
        (factories.QUIET, "just now quiet"),
        (factories.BUSY, "just now busy: other work took 50% of the processors' time, so"),
    ],
)
def test_doctor_says_whether_the_machine_is_busy(
    state: dict[str, Any], said: str, capsys: pytest.CaptureFixture[str]
) -> None:
    with factories.machine_state(state):
        assert factories.run_cli("doctor") == 0
    assert said in " ".join(capsys.readouterr().out.split())


def test_check_warns_of_what_is_slow_here_and_refuses_nothing(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    data, model = factories.write_data(tmp_path / "data"), factories.save(factories.model(), tmp_path / "model")
    stages = [{"kind": "quantize", "backend": "float16"}]
    recipe = factories.recipe(tmp_path / "recipe.yaml", model, data, stages=stages)
    monkeypatch.setattr("hfcompress.report.doctor.abilities", lambda: AVX2)
    capsys.readouterr()
    assert factories.run_cli("check", recipe) == 0
    captured = capsys.readouterr()
    assert "warning: stages.0.backend: float16: measured 3.1 to 4.1 times slower" in captured.err
    assert "is correct" in captured.out
    monkeypatch.setattr("hfcompress.report.doctor.abilities", lambda: replace(ZEN4, flags=frozenset({"avx_vnni"})))
    assert factories.run_cli("check", recipe) == 0
    assert "slower" not in capsys.readouterr().err


def test_list_backends_shows_device_extra_paper_and_whether_it_runs_here(
    monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.setattr(BACKENDS.get("bnb_8bit"), "missing_modules", lambda _: ["bitsandbytes"])
    assert factories.run_cli("list", "backends") == 0
    lines = capsys.readouterr().out
    for column in ("device", "needs", "source", "here"):
        assert column in lines
    shown = " ".join(lines.split())
    assert "no: bitsandbytes" in shown
    assert re.search(r"float16 +float16: half the bytes.* cpu, cuda +-", lines)
    assert re.search(r"onnx_int8 .* cpu +onnx ", lines)
