"""Adapters on a quantized model: what is trained, what stays, where they start, and how all of it loads again.

And what bitsandbytes stores for every head, option and layer that it is told to leave.
"""

from __future__ import annotations

import json
import shutil
from collections.abc import Callable
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from safetensors.torch import load_file
from transformers import TrainerCallback

from hfcompress.context import StageContext, StageResult
from hfcompress.measure.verify import verify
from hfcompress.models.architectures import ARCHITECTURES, TASK_HEADS
from hfcompress.models.artifact import load_model, open_artifact, save_model, weights_hash
from hfcompress.models.dummy_inputs import logits_of, make_dummy_inputs
from hfcompress.models.forward import observe
from hfcompress.models.shape import shape_of
from hfcompress.models.surgery import Keep, cut
from hfcompress.quantization import qlora
from hfcompress.quantization.backends.base import BACKENDS, QuantizationJob
from hfcompress.quantization.loftq import alternate, approximate, start_adapters
from hfcompress.recipe.loader import load
from hfcompress.recipe.validate import check
from hfcompress.run.push import list_uploads
from hfcompress.training.lora import Lora, add_lora
from hfcompress.utils.errors import HfcompressError
from tests import factories, masked
from tests.two_processes import END, RUN_STAGES, run_two_processes

CLASSIFIER = "AutoModelForSequenceClassification"
EVERY = ["query", "key", "value", "attention_output", "ffn_in", "ffn_out"]
WIDTHS = {"hidden": 64, "ffn": 128}
UNEVEN = [Keep((0, 1, 2, 3), tuple(range(128))), Keep((0, 1, 2, 3), tuple(range(0, 128, 2)))]
BACKENDS_HERE: list[Any] = [
    "bnb_4bit", {"use": "bnb_4bit", "quant_type": "fp4"}, {"use": "bnb_4bit", "double_quant": True},
    {"use": "bnb_4bit", "compute_dtype": "bfloat16"}, {"use": "bnb_4bit", "compute_dtype": "float16"}, "bnb_8bit",
]  # fmt: skip
ROUNDINGS = [b for b in BACKENDS_HERE if isinstance(b, str) or "compute_dtype" not in b]


@pytest.fixture(scope="module")
def teacher(tmp_path_factory: pytest.TempPathFactory, data: Path) -> Path:
    """One that is not so sure that rounding could not move its answers."""
    return factories.fine_tuned(tmp_path_factory.mktemp("teacher"), data, steps=40, **WIDTHS, **masked.CALM)


@dataclass
class Done:
    context: StageContext
    result: StageResult

    @property
    def path(self) -> Path:
        return self.context.model_directory

    @property
    def base(self) -> dict[str, torch.Tensor]:
        """What was quantized before any training."""
        return load_file(self.context.directory / "base" / "model.safetensors")

    @property
    def saved(self) -> dict[str, torch.Tensor]:
        return load_file(self.path / "model.safetensors")

    @property
    def adapter(self) -> dict[str, torch.Tensor]:
        return load_file(self.path / "adapter" / "adapter_model.safetensors")


Run = Callable[..., Done]


@pytest.fixture(scope="module")
def run(teacher: Path, data: Path, tmp_path_factory: pytest.TempPathFactory) -> Run:
    """Runs one quantize stage with training in a folder; the same folder goes on with what is there."""

    def stage(
        backend: Any = "bnb_4bit", folder: Path | None = None, source: Path = teacher, callbacks: Any = (), **train: Any
    ) -> Done:
        folder = folder or tmp_path_factory.mktemp("qlora")
        training = {"epochs": 1, "batch_size": 16, "learning_rate": 3e-3, "lora": {"r": 4}} | train
        stages = [{"kind": "quantize", "backend": backend, "train": training}]
        recipe = load(factories.recipe(folder / "recipe.yaml", teacher, data, stages=stages)).recipe
        context = StageContext(recipe.task, recipe.seed, open_artifact(teacher), {}, folder / "stage", callbacks)
        shutil.rmtree(context.model_directory, ignore_errors=True)
        return Done(context, recipe.stages[0].run(open_artifact(source), context))

    return stage


@pytest.fixture(scope="module")
def trained(run: Run) -> Done:
    return run(epochs=6, learning_rate=1e-3)


@pytest.fixture(scope="module")
def uneven(run: Run, teacher: Path, tmp_path_factory: pytest.TempPathFactory) -> Done:
    path = tmp_path_factory.mktemp("uneven")
    save_model(cut(load_model(teacher, CLASSIFIER), UNEVEN), factories.tokenizer(), path)
    return run(source=path, lora={"r": 4, "targets": ["key", "attention_output", "ffn_in", "ffn_out"]})


def reloaded(path: Path, auto_class: str = CLASSIFIER, adapter: bool = True) -> Any:
    """The directory as its card says that it is loaded."""
    import transformers

    model = getattr(transformers, auto_class).from_pretrained(path, dtype="auto", device_map="cpu")
    if adapter:
        model.load_adapter(str(path / "adapter"))
    return model


def answers(model: Any) -> torch.Tensor:
    with torch.no_grad():
        return observe(model.eval(), factories.batch(8)).logits


# Training


@pytest.mark.parametrize("kind", ["trained", "uneven", "bnb_8bit", "double_quant"])
def test_the_quantized_weights_stay_bit_for_bit_and_the_head_is_trained(
    kind: str, run: Run, request: pytest.FixtureRequest
) -> None:
    backend = {"use": "bnb_4bit", "double_quant": True} if kind == "double_quant" else kind
    done = request.getfixturevalue(kind) if kind in ("trained", "uneven") else run(backend)
    assert done.saved.keys() == done.base.keys()
    moved = {name for name, tensor in done.saved.items() if not torch.equal(tensor, done.base[name])}
    assert moved == {name for name in done.base if name.startswith(("classifier.", "bert.pooler."))}
    assert all(bool(t.any()) for name, t in done.adapter.items() if "lora_B" in name)
    assert np.array_equal(logits_of(reloaded(done.path), make_dummy_inputs(done.path)), done.result.logits)


@pytest.mark.parametrize("backend", ["bnb_4bit", {"use": "bnb_4bit", "quant_type": "fp4", "double_quant": True}])
def test_gradients_through_quantized_layers_are_those_of_the_rounded_weights(backend: Any, tmp_path: Path) -> None:
    """On a CPU, and also after the model was judged: what is packed for inference lets no gradient through."""
    plain, made = factories.model(**WIDTHS, **masked.CALM), BACKENDS.parse(backend)
    save_model(plain, factories.tokenizer(), tmp_path / "float")
    made.quantize(
        QuantizationJob(tmp_path / "float", tmp_path / "low", CLASSIFIER, make_dummy_inputs(tmp_path / "float"))
    )
    for layer in plain.bert.encoder.modules():
        if isinstance(layer, torch.nn.Linear):
            layer.weight.data = made.fake_quantize(layer.weight.data)
    low = qlora.load_quantized_model(QuantizationJob(tmp_path, tmp_path / "low", CLASSIFIER, {}))
    qlora.disable_packing(low)
    found = []
    for model in (low, plain):
        torch.manual_seed(0)
        add_lora(model, Lora(r=2, targets=["query", "ffn_in"]))
        before = answers(model)
        logits = observe(model.train(), factories.batch(8)).logits
        assert torch.allclose(logits, before, atol=1e-5)
        logits.pow(2).sum().backward()
        found.append({name: p.grad for name, p in model.named_parameters() if p.requires_grad})
    assert found[0].keys() == found[1].keys()
    for name, gradient in found[0].items():
        assert torch.allclose(gradient, found[1][name], rtol=1e-3, atol=1e-4 * float(found[1][name].abs().max())), name
    assert bool(found[0]["bert.encoder.layer.0.attention.self.query.lora_B.default.weight"].any())


def test_training_brings_the_quantized_model_nearer_to_the_float_one(trained: Done, teacher: Path, data: Path) -> None:
    lines = (data / "dev.tsv").read_text(encoding="utf-8").splitlines()[1:]
    batch = factories.tokenizer()([line.partition("\t")[0] for line in lines], padding=True, return_tensors="pt")

    def said(model: Any) -> torch.Tensor:
        with torch.no_grad():
            return observe(model.eval(), batch).logits.log_softmax(-1)

    base = reloaded(trained.context.directory / "base", adapter=False)
    wanted, before, after = (said(m) for m in (load_model(teacher, CLASSIFIER), base, reloaded(trained.path)))
    before, after = ((wanted.exp() * (wanted - x)).sum() for x in (before, after))
    assert 0 <= after < 0.5 * before


def test_a_fresh_process_gives_the_same_answers(trained: Done) -> None:
    found = verify(open_artifact(trained.path), trained.result.logits, CLASSIFIER)
    assert found == pytest.approx({"transformers": 0}, abs=1e-5)


@pytest.mark.slow
def test_a_fresh_process_gives_the_same_answers_of_uneven_layers(uneven: Done) -> None:
    found = verify(open_artifact(uneven.path), uneven.result.logits, CLASSIFIER)
    assert found == {"transformers": 0, "hfcompress": 0}


def test_padding_changes_no_answer(trained: Done) -> None:
    model, batch = reloaded(trained.path), factories.batch(4)
    together = observe(model, batch).logits
    for row, length in enumerate(batch["attention_mask"].sum(1)):
        alone = observe(model, {name: t[row : row + 1, :length] for name, t in batch.items()}).logits
        assert torch.allclose(alone[0], together[row], atol=2e-2 * float(together.abs().max()))


class Kept(TrainerCallback):  # type: ignore[misc]
    """Looks at what a checkpoint holds."""

    names: set[str] = set()

    def on_save(self, args: Any, state: Any, control: Any, **_: Any) -> None:
        (folder,) = Path(args.output_dir).glob(f"checkpoint-{state.global_step}")
        self.names = set(load_file(folder / "model.safetensors"))


@pytest.mark.parametrize("backend", ["bnb_4bit", pytest.param("bnb_8bit", marks=pytest.mark.slow)])
def test_an_interrupted_training_ends_where_an_uninterrupted_one_does(backend: str, run: Run, tmp_path: Path) -> None:
    options = {"checkpoint_steps": 2, "keep_best": True}  # judged before each checkpoint
    kept = Kept()
    whole = run(backend, callbacks=[kept], **options)
    assert {name for name in kept.names if "lora_" not in name} == {
        f"student.{name}" for name in whole.saved if name.startswith(("classifier.", "bert.pooler."))
    }
    with pytest.raises(KeyboardInterrupt):
        run(backend, tmp_path, callbacks=[masked.Interrupt(4)], **options)
    again = run(backend, tmp_path, **options)
    for one, other in ((whole.adapter, again.adapter), (whole.saved, again.saved)):
        assert one.keys() == other.keys()
        assert all(torch.equal(tensor, other[name]) for name, tensor in one.items())


def test_a_quantized_head_is_not_trained_as_if_it_were_not(run: Run) -> None:
    with pytest.raises(
        HfcompressError, match=r"head's bert\.pooler\.dense is quantized, and a task head is trained whole"
    ):
        run({"use": "bnb_4bit", "skip": ["classifier"]})


# What is kept of it


def test_the_adapter_counts_as_weights_and_is_pushed(trained: Done, tmp_path: Path) -> None:
    shutil.copytree(trained.path, tmp_path / "final")
    artifact, file = open_artifact(tmp_path / "final"), tmp_path / "final" / "adapter" / "adapter_model.safetensors"
    assert artifact.dtype == "nf4"
    sizes = {p.name: p.stat().st_size for p in artifact.weight_files}
    assert set(sizes) == {"model.safetensors", file.name}
    assert artifact.disk_bytes == sum(sizes.values())
    assert trained.result.facts["adapter"] == {"bytes": sizes[file.name]}
    (tmp_path / "final" / "README.md").write_text("---\nlicense: mit\n---\n")
    names = {upload.name for upload in list_uploads(tmp_path)}
    assert {"model.safetensors", "adapter/adapter_config.json", "adapter/adapter_model.safetensors"} <= names
    before = weights_hash(tmp_path / "final")
    file.write_bytes(file.read_bytes()[:-1] + b"\1")
    assert weights_hash(tmp_path / "final") != before


def test_the_adapter_is_peft_s_and_names_no_place_on_this_machine(trained: Done) -> None:
    from peft import PeftModel

    config = json.loads((trained.path / "adapter" / "adapter_config.json").read_text(encoding="utf-8"))
    assert (config["r"], config["peft_type"], config["base_model_name_or_path"]) == (4, "LORA", None)
    assert str(trained.context.directory) not in json.dumps(config)
    model = PeftModel.from_pretrained(reloaded(trained.path, adapter=False), trained.path, subfolder="adapter")
    assert np.array_equal(logits_of(model.get_base_model(), make_dummy_inputs(trained.path)), trained.result.logits)


# LoftQ


def weight(rows: int = 64, columns: int = 128) -> torch.Tensor:
    return torch.randn(rows, columns, generator=torch.Generator().manual_seed(5))


@pytest.mark.parametrize("backend", ROUNDINGS)
@pytest.mark.parametrize("iterations", [1, 5])
def test_loftq_is_the_paper_s_algorithm_1(backend: Any, iterations: int) -> None:
    w, r, rounded = weight(), 8, BACKENDS.parse(backend).fake_quantize
    product, errors = torch.zeros_like(w), list[float]()
    for _ in range(iterations):
        to_store = w - product
        q = rounded(to_store)
        u, s, vt = torch.linalg.svd(w - q)
        product = (u[:, :r] * s[:r]) @ vt[:r]
        errors.append(float(torch.linalg.norm(w - q - product)))
    left = alternate(w, rounded, r, iterations)
    assert torch.allclose(left, to_store, atol=1e-5)
    b, a = approximate(w - rounded(left), r)
    assert torch.allclose(b @ a, product, atol=1e-4)
    assert torch.allclose(b.norm(dim=0), a.norm(dim=1), atol=1e-4)  # √Σ on either side
    assert errors[0] < float(torch.linalg.norm(w - rounded(w)))
    assert errors[-1] <= errors[0]
    if iterations > 1 and "8bit" not in str(backend):
        assert errors[-1] < 0.99 * errors[0]


def test_a_rank_above_a_weight_s_own_leaves_nothing() -> None:
    w = weight(4, 16)
    b, a = approximate(w, 6)
    assert (b.shape, a.shape) == ((4, 6), (6, 16))
    assert torch.allclose(b @ a, w, atol=1e-5)
    assert not b[:, 4:].any()


@pytest.mark.parametrize("backend", ["bnb_4bit", "bnb_8bit"])
def test_adapters_start_from_what_quantizing_took(backend: str, tmp_path: Path) -> None:
    plain, options = factories.model(**WIDTHS), Lora(r=4, alpha=6.0, init="loftq", targets=["key"])
    save_model(plain, factories.tokenizer(), tmp_path / "float")
    name = "bert.encoder.layer.1.attention.self.key"
    job = QuantizationJob(
        tmp_path / "float", tmp_path / "low", CLASSIFIER, {}, keep=frozenset({name.replace("1", "0")})
    )
    BACKENDS.parse(backend).quantize(replace(job, dummy_inputs=make_dummy_inputs(job.source)))
    low = add_lora(qlora.load_quantized_model(job), options)
    float_weights = {x: plain.get_submodule(x).weight.detach() for x in (name, name.replace("1", "0"))}
    error = start_adapters(low, float_weights, options)
    without, left = error.error_without_adapters, error.error
    w, layer = float_weights[name], low.get_submodule(name)
    product = 6.0 / 4 * (layer.lora_B["default"].weight @ layer.lora_A["default"].weight).detach()
    residual = w - BACKENDS.parse(backend).fake_quantize(w)
    assert without == pytest.approx(float(residual.norm() / w.norm()), rel=1e-4)
    assert left == pytest.approx(float((residual - product).norm() / w.norm()), rel=1e-4)
    assert left < 0.95 * without
    kept = low.get_submodule(name.replace("1", "0"))
    assert not kept.lora_B["default"].weight.any()  # a layer in float32 lost nothing
    assert kept.lora_A["default"].weight.any()  # and can still learn


def test_adapters_of_full_rank_give_back_all_that_quantizing_took(run: Run, teacher: Path) -> None:
    wanted = answers(load_model(teacher, CLASSIFIER))
    done = run(epochs=0, lora={"r": 64, "alpha": 32, "targets": EVERY, "init": "loftq", "iterations": 2})
    assert done.result.facts["loftq"]["error"] < 1e-5 < done.result.facts["loftq"]["error_without_adapters"]
    exact = reloaded(done.path)
    qlora.disable_packing(exact)
    assert torch.allclose(answers(exact), wanted, atol=1e-3)
    exact.disable_adapters()
    assert not torch.allclose(answers(exact), wanted, atol=1e-2)


def test_more_turns_leave_less(run: Run) -> None:
    starts = [{}, {"init": "loftq"}, {"init": "loftq", "iterations": 8}]
    done = [run(epochs=0, lora={"r": 16, "targets": EVERY, **start}) for start in starts]
    errors = [x.result.facts["loftq"]["error"] for x in done[1:]]
    assert errors[1] < errors[0] < done[1].result.facts["loftq"]["error_without_adapters"]
    assert "loftq" not in done[0].result.facts
    assert all(np.array_equal(logits_of(reloaded(x.path), make_dummy_inputs(x.path)), x.result.logits) for x in done)


@pytest.mark.parametrize(
    ("stage", "message"),
    [
        ({"kind": "distill", "losses": ["soft_labels"], "student": {"lora": {"init": "loftq"}}}, "stay in float32"),
        ({"kind": "prune", "heads": 0.25, "recover": {"lora": {"init": "loftq"}}}, "stay in float32"),
        ({"kind": "quantize", "backend": "bnb_4bit", "train": {"lora": {"iterations": 3}}}, "is for `init: loftq`"),
        ({"kind": "quantize", "backend": "bnb_4bit", "train": {"lora": {"init": "pissa"}}}, "'loftq'"),
    ],
)
def test_loftq_where_nothing_is_quantized_is_refused(
    stage: dict[str, Any], message: str, teacher: Path, data: Path, tmp_path: Path
) -> None:
    with pytest.raises(HfcompressError, match=message):
        check(load(factories.recipe(tmp_path / "recipe.yaml", teacher, data, stages=[stage])))


# What bitsandbytes stores


@pytest.mark.parametrize("head", ["sequence", "token", "span", "mask"])
@pytest.mark.parametrize("backend", BACKENDS_HERE)
def test_every_head_and_option_reloads_with_the_same_answers(backend: Any, head: str, tmp_path: Path) -> None:
    auto_class = f"AutoModel{TASK_HEADS[head]}"
    save_model(factories.model(head=head, **WIDTHS), factories.tokenizer(), tmp_path / "float")
    probe = make_dummy_inputs(tmp_path / "float")
    made = (
        BACKENDS.parse(backend)
        .quantize(QuantizationJob(tmp_path / "float", tmp_path / "low", auto_class, probe))
        .logits
    )
    assert np.array_equal(logits_of(reloaded(tmp_path / "low", auto_class, adapter=False), probe), made)
    kinds = {name: t.dtype for name, t in load_file(tmp_path / "low" / "model.safetensors").items()}
    parts = ARCHITECTURES["bert"].modules.task_heads[head]
    heads = {name for name in kinds if set(name.split(".")) & set(parts)}
    assert heads
    assert {kinds[name] for name in heads} == {torch.float32}
    assert {kinds[n] for n in kinds if n.endswith("dense.weight")} - {torch.float32} <= {torch.uint8, torch.int8}


@pytest.mark.parametrize("backend", ROUNDINGS)
def test_rounded_is_what_is_stored(backend: Any, tmp_path: Path) -> None:
    from peft.utils.integrations import dequantize_module_weight

    plain, made = factories.model(**WIDTHS), BACKENDS.parse(backend)
    save_model(plain, factories.tokenizer(), tmp_path / "float")
    made.quantize(
        QuantizationJob(tmp_path / "float", tmp_path / "low", CLASSIFIER, make_dummy_inputs(tmp_path / "float"))
    )
    low = reloaded(tmp_path / "low", adapter=False)
    for path in ("bert.encoder.layer.1.intermediate.dense", "bert.encoder.layer.0.attention.self.value"):
        w = plain.get_submodule(path).weight.detach()
        assert torch.equal(made.fake_quantize(w), dequantize_module_weight(low.get_submodule(path)).to(w))
        assert not torch.equal(made.fake_quantize(w), w)


@pytest.mark.parametrize("backend", ["bnb_4bit", "bnb_8bit"])
def test_a_kept_layer_is_that_layer_alone(backend: str, tmp_path: Path) -> None:
    save_model(factories.model(layers=12, **WIDTHS), factories.tokenizer(), tmp_path / "float")
    path, probe = "bert.encoder.layer.1.output.dense", make_dummy_inputs(tmp_path / "float")
    job = QuantizationJob(tmp_path / "float", tmp_path / "low", CLASSIFIER, probe, keep=frozenset({path}))
    made = BACKENDS.parse(backend).quantize(job).logits
    weights = load_file(tmp_path / "low" / "model.safetensors")
    floats = {
        n for n, t in weights.items() if ".layer." in n and n.endswith("dense.weight") and t.dtype == torch.float32
    }
    assert floats == {f"{path}.weight"}
    assert np.array_equal(logits_of(reloaded(tmp_path / "low", adapter=False), probe), made)


def test_widths_that_4_bit_blocks_do_not_divide_are_refused_before_anything_runs(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    shape = shape_of(factories.model(**WIDTHS).config.to_dict())
    monkeypatch.setattr(torch.cuda, "is_available", lambda: False)
    made = BACKENDS.parse("bnb_4bit")
    assert made.problems(shape) == []
    odd = shape.with_layers(2, 4, 96)
    (found,) = made.problems(odd)
    assert "encoder.layer.0.output.dense has 96 inputs and 64 outputs" in found
    (found,) = made.problems(shape.with_layers(2, 3, 128))
    assert "attention.self.query has 64 inputs and 48 outputs" in found
    assert BACKENDS.parse({"use": "bnb_4bit", "skip": ["output", "classifier"]}).problems(odd) == []
    assert BACKENDS.parse("bnb_8bit").problems(odd) == []
    assert made.problems(replace(odd, even=False)) == []  # a ranking over all layers decides
    assert made.problems(replace(shape, layers=shape.with_layers(2, 0, 0).layers)) == []
    monkeypatch.setattr(torch.cuda, "is_available", lambda: True)
    assert made.problems(odd) == []


# All of it


@pytest.mark.slow
def test_a_recipe_runs_to_its_card(teacher: Path, data: Path, tmp_path: Path) -> None:
    train = {"epochs": 1, "batch_size": 16, "lora": {"r": 4, "init": "loftq"}}
    stages = [{"kind": "quantize", "backend": "bnb_4bit", "train": train}]
    recipe = factories.recipe(tmp_path / "recipe.yaml", teacher, data, stages=stages)
    assert factories.run_cli("run", recipe, "--output", tmp_path / "run") == 0
    assert (tmp_path / "run" / "final" / "adapter" / "adapter_model.safetensors").is_file()
    stage = json.loads((tmp_path / "run" / "01-quantize" / "stage.json").read_text(encoding="utf-8"))
    assert stage["reload"]["transformers"] == 0
    report = json.loads((tmp_path / "run" / "report.json").read_text(encoding="utf-8"))
    assert report["rows"][-1]["disk_bytes"] == open_artifact(tmp_path / "run" / "final").disk_bytes


@pytest.mark.slow
@pytest.mark.parametrize("backend", ["bnb_4bit", "bnb_8bit"])
def test_two_processes_train_the_same_adapters(
    backend: str, teacher: Path, data: Path, run: Run, tmp_path: Path
) -> None:
    lora = {"r": 4, "init": "loftq", "iterations": 2}
    one = run(backend, lora=lora)
    train = {"epochs": 1, "batch_size": 8, "learning_rate": 3e-3, "lora": lora}
    stages = [{"kind": "quantize", "backend": backend, "train": train}]
    (tmp_path / "script.py").write_text(RUN_STAGES + END)
    recipe = factories.recipe(tmp_path / "recipe.yaml", teacher, data, stages=stages)
    run_two_processes(tmp_path / "script.py", tmp_path / "home", recipe, tmp_path / "two")
    two = tmp_path / "two" / "01-quantize" / "model"
    for name, tensor in load_file(two / "adapter" / "adapter_model.safetensors").items():
        torch.testing.assert_close(tensor, one.adapter[name], atol=1e-4, rtol=1e-3, msg=lambda m, n=name: f"{n}: {m}")
    assert (tmp_path / "two" / "second.txt").read_text() == "None"
