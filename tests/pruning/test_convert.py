"""Checkpoints as older tools wrote them, built by hand, and the models that they become."""

from __future__ import annotations

import json
import shutil
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import save_file

from hfcompress.measure.verify import ReloadError
from hfcompress.models.architectures import layers_of, spec_of
from hfcompress.models.artifact import load_model, load_tokenizer, open_artifact, read_config
from hfcompress.models.forward import observe
from hfcompress.pruning.convert.convert import Conversion, convert, rebuild_pruned, summarize
from hfcompress.pruning.convert.pickles import read_tensors
from hfcompress.pruning.gates import apply_gates
from hfcompress.pruning.hidden_dimensions import cut_hidden
from hfcompress.utils.errors import HfcompressError
from tests import factories
from tests.hidden_gates import apply_hidden_gates

AUTO = "AutoModelForSequenceClassification"
KEPT = [((0, 2), range(0, 64, 2)), ((1, 2, 3), range(40))]
"""Heads and neurons that stay, by layer."""


def logits(model: Any) -> torch.Tensor:
    with torch.no_grad():
        return observe(model, factories.batch()).logits


def masked(model: Any, kept: Any = KEPT) -> torch.Tensor:
    """Logits of the full model with what goes masked."""
    heads = [torch.zeros(4).index_fill(0, torch.tensor(list(h), dtype=torch.long), 1.0) for h, _ in kept]
    neurons = [torch.zeros(64).index_fill(0, torch.tensor(list(n), dtype=torch.long), 1.0) for _, n in kept]
    with apply_gates(model, heads, neurons):
        return logits(model)


def write(path: Path, model: Any, weights: dict[str, torch.Tensor], tokenizer: bool = True, **changes: Any) -> Path:
    """A checkpoint of any tensors, under the model's config with changes."""
    path.mkdir(parents=True)
    config = {**model.config.to_dict(), "architectures": [type(model).__name__], **changes}
    (path / "config.json").write_text(json.dumps(config), encoding="utf-8")
    save_file({name: tensor.contiguous().clone() for name, tensor in weights.items()}, path / "model.safetensors")
    if tokenizer:
        factories.tokenizer().save_pretrained(path)
    return path


def layer_name(model: Any, index: int) -> str:
    return f"{model.base_model_prefix}.{spec_of(model).modules.layers}.{index}."


def pruned(model: Any, kept: Any = KEPT) -> dict[str, torch.Tensor]:
    """The weights, with heads and neurons cut out as transformers 4's `prune_linear_layer` does."""
    weights, modules, width = dict(model.state_dict()), spec_of(model).modules, 8
    for index, (heads, neurons) in enumerate(kept):
        rows = [h * width + i for h in heads for i in range(width)]
        for path, index_, axis in [
            *((p, rows, 0) for p in (modules.query, modules.key, modules.value)),
            (modules.attention_output, rows, 1), (modules.ffn_in, list(neurons), 0),
            (modules.ffn_out, list(neurons), 1),
        ]:  # fmt: skip
            name = f"{layer_name(model, index)}{path}"
            weights[f"{name}.weight"] = weights[f"{name}.weight"].index_select(axis, torch.tensor(index_))
            if axis == 0:
                weights[f"{name}.bias"] = weights[f"{name}.bias"][index_]
    return weights


def read(path: Path) -> tuple[torch.Tensor, Conversion]:
    """The logits of the rebuilt model, and the result of the conversion."""
    model, result = rebuild_pruned(path, read_config(path), read_tensors(path)[0])
    assert result.shape.parameters == sum(p.numel() for p in model.parameters())
    return logits(model), result


@pytest.mark.parametrize("family", ["bert", "distilbert", "roberta", "electra"])
def test_pruned_heads_of_transformers_4(family: str, tmp_path: Path) -> None:
    model = factories.model(family)
    kept = [(heads, range(64)) for heads, _ in KEPT]
    old = write(tmp_path / "old", model, pruned(model, kept), pruned_heads={"0": [1, 3], "1": [0]})

    found, done = read(old)

    assert torch.allclose(found, masked(model, kept), atol=1e-5)
    assert [(x.heads, x.ffn) for x in done.shape.layers] == [(2, 64), (3, 64)]
    assert (done.bound, done.idle, done.left_out) == (0.0, (0, 0), ())


def test_what_is_written_loads_again_with_the_tokenizer_of_the_base(tmp_path: Path) -> None:
    model = factories.model()
    changes = {"pruned_heads": {"0": [1, 3], "1": [0]}}
    old = write(tmp_path / "old", model, pruned(model), tokenizer=False, **changes)
    factories.tokenizer().save_pretrained(tmp_path / "base")
    done = convert(str(old), tmp_path / "new", str(tmp_path / "base"))
    assert torch.allclose(logits(load_model(tmp_path / "new", AUTO)), masked(model), atol=1e-5)
    assert "pruned_heads" not in json.loads((tmp_path / "new" / "config.json").read_text())
    assert load_tokenizer(tmp_path / "new")("the film")["input_ids"][0] == 2
    assert done is not None
    assert done.tokenizer
    with pytest.raises(HfcompressError, match="is already a model of hfcompress"):
        convert(str(tmp_path / "new"), tmp_path / "newer")
    assert sorted(path.name for path in tmp_path.iterdir()) == ["base", "new", "old"]


def test_heads_of_mpnet_keep_their_own_position_biases(tmp_path: Path) -> None:
    model = factories.model("mpnet")
    kept = [(heads, range(64)) for heads, _ in KEPT]
    weights = pruned(model, kept)
    old = write(tmp_path / "old", model, weights, pruned_heads={"0": [1, 3], "1": [0]})
    assert torch.allclose(read(old)[0], masked(model, kept), atol=1e-5)
    untold = write(tmp_path / "untold", model, weights)
    with pytest.raises(HfcompressError, match="do not tell which heads of layer 1 are left"):
        read(untold)


def test_the_shared_layer_of_albert(tmp_path: Path) -> None:
    model, kept = factories.model("albert", layers=3), [((0, 2), range(40))]
    old = write(tmp_path / "old", model, pruned(model, kept), pruned_heads={"0": [1, 3]})
    found, done = read(old)
    assert torch.allclose(found, masked(model, kept), atol=1e-5)
    assert [(x.heads, x.ffn) for x in done.shape.layers] == [(2, 40)] * 3


def test_heads_that_the_tensors_contradict_are_told(tmp_path: Path) -> None:
    model = factories.model()
    old = write(tmp_path / "old", model, pruned(model), pruned_heads={"0": [1]})
    with pytest.raises(HfcompressError, match=r"cuts 1 of the 4 heads of layer 1, and its tensors have 2 left"):
        convert(str(old), tmp_path / "new")
    assert not list(tmp_path.glob("new*"))


@pytest.mark.parametrize("head", ["sequence", "token", "span", "mask"])
@pytest.mark.parametrize("family", ["bert", "distilbert"])
def test_tensors_smaller_than_their_config_says(family: str, head: str, tmp_path: Path) -> None:
    model = factories.model(family, head=head)
    weights = pruned(model) | {"layer_transformation.weight": torch.eye(32)}
    # Tied weights are stored once.
    weights = {
        n: t for n, t in weights.items() if n not in ("cls.predictions.decoder.weight", "vocab_projector.weight")
    }
    old = write(tmp_path / "old", model, weights, architectures=["CoFi" + type(model).__name__])
    found, done = read(old)
    assert torch.allclose(found, masked(model), atol=1e-5)
    assert done.left_out == ("layer_transformation.weight",)


BLOCKS = {"attention": ("attention.self", "attention.output.dense"), "ffn": ("intermediate", "output.dense")}


class _Skips(torch.nn.Module):
    """A block that CoFi left out: what comes in goes on, without the norm."""

    def forward(self, _given: torch.Tensor, stream: torch.Tensor) -> torch.Tensor:
        return stream


@pytest.mark.parametrize("family", ["bert", "roberta"])
def test_cofi_blocks_that_are_missing_are_skipped_with_their_norms(family: str, tmp_path: Path) -> None:
    model = factories.model(family, layers=4, layer_norm_eps=1e-12)
    gone = {0: ("attention",), 1: ("ffn",), 2: ("attention", "ffn"), 3: ("attention",)}
    weights = dict(model.state_dict())
    for index, blocks in gone.items():
        layer = model.base_model.encoder.layer[index]
        for block in blocks:
            for part in BLOCKS[block]:
                start = f"{layer_name(model, index)}{part}."
                weights = {name: tensor for name, tensor in weights.items() if not name.startswith(start)}
            owner = layer.attention if block == "attention" else layer
            owner.output = _Skips()
    old = write(tmp_path / "old", factories.model(family, layers=4, layer_norm_eps=1e-12), weights)

    found, done = read(old)

    assert torch.allclose(found, logits(model), atol=1e-5)
    assert [(x.heads, x.ffn) for x in done.shape.layers] == [(0, 64), (4, 0), (0, 64)]


def test_cofi_dimensions_that_are_cut(tmp_path: Path) -> None:
    model, dims = factories.model(head="token"), [*range(0, 20), *range(22, 31)]
    weights = {}
    for name, tensor in model.state_dict().items():
        for axis, size in enumerate(tensor.shape):
            inside = any(part in name for part in ("self", "attention.output.dense.weight")) and axis == (
                1 if name.endswith("output.dense.weight") else 0
            )
            if size == 32 and not inside:
                tensor = tensor.index_select(axis, torch.tensor(dims))
        weights[name] = tensor
    old = write(tmp_path / "old", model, weights)
    found, done = read(old)
    with apply_hidden_gates(model, dims):
        expected = logits(model)
    assert done.shape.hidden == 29
    assert torch.allclose(found, expected, atol=1e-5)


@pytest.mark.parametrize("family", ["bert", "roberta"])
def test_a_pooler_wider_than_the_stream_keeps_its_strongest_outputs_and_the_bound_holds(
    family: str, tmp_path: Path
) -> None:
    model, dims = factories.model(family), list(range(30))
    dense = model.bert.pooler.dense if family == "bert" else model.classifier.dense
    reader = model.classifier if family == "bert" else model.classifier.out_proj
    with torch.no_grad():
        reader.weight[:, [3, 11]] *= 1e-3
    weights = dict(cut_hidden(model, dims).state_dict())
    names = {id(m): n for n, m in model.named_modules()}
    weights[f"{names[id(dense)]}.weight"] = dense.weight.detach()[:, dims]
    weights[f"{names[id(dense)]}.bias"] = dense.bias.detach()
    weights[f"{names[id(reader)]}.weight"] = reader.weight.detach()
    old = write(tmp_path / "old", model, weights)

    found, done = read(old)

    full = torch.nn.Linear(30, 32)
    full.weight.data, full.bias.data = dense.weight.detach()[:, dims], dense.bias.detach()
    with apply_hidden_gates(model, dims), torch.no_grad():
        stream = model.base_model(**factories.batch()).last_hidden_state[:, 0][:, dims]
    exact = (full(stream).tanh() @ reader.weight.T + reader.bias).detach()
    assert done.bound == pytest.approx(float(reader.weight.detach()[:, [3, 11]].abs().sum(1).max()))
    assert 0 < float((found - exact).abs().max()) <= done.bound
    assert any("not exact" in line for line in summarize(done))


def zeroed(model: Any) -> dict[str, torch.Tensor]:
    """Weights of full size in which some heads and neurons do nothing, each in another way."""
    modules = spec_of(model).modules
    with torch.no_grad():
        for layer in layers_of(model):
            value, out = layer.get_submodule(modules.value), layer.get_submodule(modules.attention_output)
            made, read = layer.get_submodule(modules.ffn_in), layer.get_submodule(modules.ffn_out)
            values = value.weight.chunk(3)[-1] if modules.value == modules.query else value.weight
            values[:8] = 0  # a head whose values are its biases
            out.weight[:, 16:24] = 0  # a head that nothing reads, or with grouped queries a part of one
            read.weight[:, :5] = 0  # neurons that nothing reads
            made.weight[8:20] = 0  # neurons that are their biases
            if value.bias is not None:
                made.bias[8:12] = 0  # neurons that are zero
    return dict(model.state_dict())


@pytest.mark.parametrize("family", ["bert", "distilbert", "deberta-v2", "mpnet", "albert", "modernbert", "llama"])
def test_zeros_of_nn_pruning_go_and_no_logit_moves(family: str, tmp_path: Path) -> None:
    model = factories.model(family)
    old = write(tmp_path / "old", model, zeroed(model))
    expected = logits(model)
    found, done = read(old)
    assert torch.allclose(found, expected, atol=1e-5)
    stored = len(layers_of(model))
    assert done.idle == ((1 if family == "llama" else 2) * stored, 17 * stored)
    assert [(x.heads, x.ffn) for x in done.shape.layers] == [(2, 47)] * len(done.shape.layers)


@pytest.mark.parametrize("bias", [0.0, 0.5])
def test_an_activation_that_is_not_zero_at_zero_is_not_taken_for_nothing(bias: float, tmp_path: Path) -> None:
    model = factories.model(hidden_act="sigmoid")
    made = model.bert.encoder.layer[0].intermediate.dense
    with torch.no_grad():
        made.weight[:16], made.bias[:16] = 0, bias
    expected = logits(model)
    old = write(tmp_path / "old", model, dict(model.state_dict()))
    found, done = read(old)
    assert done.idle == (0, 16)
    assert torch.allclose(found, expected, atol=1e-5)


def test_a_head_that_attends_to_nothing_in_particular_stays(tmp_path: Path) -> None:
    """Without queries it takes the mean of its values, which is not nothing."""
    model = factories.model()
    with torch.no_grad():
        for layer in model.bert.encoder.layer:
            layer.attention.self.query.weight[:8] = 0
    old = write(tmp_path / "old", model, dict(model.state_dict()))
    with pytest.raises(HfcompressError, match="was pruned: its tensors have the sizes"):
        convert(str(old), tmp_path / "new")


# What is refused


def test_pickles_are_refused(tmp_path: Path) -> None:
    old = write(tmp_path / "old", factories.model(), {})
    (old / "model.safetensors").rename(old / "pytorch_model.bin")
    with pytest.raises(HfcompressError, match="pickled weights only"):
        convert(str(old), tmp_path / "new")


def test_a_target_that_exists_is_left_as_it_is(tmp_path: Path) -> None:
    model = factories.model()
    old = write(tmp_path / "old", model, pruned(model))
    before = factories.snapshot(tmp_path)
    with pytest.raises(HfcompressError, match="exists already"):
        convert(str(old), old)
    assert factories.snapshot(tmp_path) == before


@pytest.mark.parametrize(
    ("change", "message"),
    [
        (lambda w: w.pop("classifier.weight"), r"lacks 1 of the weights of .*\(classifier.weight\)"),
        (lambda w: w.update({"bert.encoder.layer.0.attention.output.dense.weight": torch.zeros(32, 12)}),
         "heads of layer 1 have 12 dimensions in all, which is no multiple of the head width in the config, 8"),
        (lambda w: w.update({"bert.encoder.layer.1.attention.self.query.weight": torch.zeros(8, 32)}),
         r"query.weight is \(8, 32\), and by the other tensors it must be \(24, 32\)"),
        (lambda w: [w.pop(n) for n in list(w) if "encoder.layer" in n], "no tensor of a layer"),
    ],
)  # fmt: skip
def test_tensors_that_make_up_no_model(change: Any, message: str, tmp_path: Path) -> None:
    model = factories.model()
    weights = pruned(model)
    change(weights)
    old = write(tmp_path / "old", model, weights)
    with pytest.raises(HfcompressError, match=message):
        convert(str(old), tmp_path / "new")
    assert not list(tmp_path.glob("new*"))


def test_a_missing_block_of_another_architecture_is_not_guessed_at(tmp_path: Path) -> None:
    model = factories.model("distilbert")
    weights = {n: t for n, t in pruned(model).items() if "layer.0.ffn" not in n}
    old = write(tmp_path / "old", model, weights)
    with pytest.raises(
        HfcompressError, match=r"lacks .*layer.0.ffn.lin2.weight; distilbert without this block is not known"
    ):
        convert(str(old), tmp_path / "new")


def test_a_config_of_no_head_is_refused(tmp_path: Path) -> None:
    model = factories.model()
    old = write(tmp_path / "old", model, pruned(model), architectures=["BertModel"])
    with pytest.raises(HfcompressError, match="names no class with a task head: architectures is BertModel"):
        convert(str(old), tmp_path / "new")


def test_the_command_takes_the_config_from_the_base(
    tmp_path: Path, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("hfcompress.pruning.convert.convert.verify", lambda *_: {})
    model = factories.model()
    old = write(tmp_path / "old", model, pruned(model), tokenizer=False)
    (tmp_path / "base").mkdir()
    (old / "config.json").rename(tmp_path / "base" / "config.json")
    assert factories.run_cli("convert", old, tmp_path / "none") == 2
    assert "--base" in capsys.readouterr().err
    assert factories.run_cli("convert", old, tmp_path / "new", "--base", tmp_path / "base") == 0
    said = capsys.readouterr().out
    assert "heads by layer 2, 3; neurons 32, 40" in said
    assert "no tokenizer was found" in said
    assert torch.allclose(logits(load_model(tmp_path / "new", AUTO)), masked(model), atol=1e-5)


def test_what_does_not_reload_the_same_is_not_kept(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    seen = []

    def refuse(artifact: Any, expected: Any, auto_class: str) -> None:
        seen.append((artifact.path, expected, auto_class))
        raise ReloadError("differs")

    monkeypatch.setattr("hfcompress.pruning.convert.convert.verify", refuse)
    model = factories.model()
    old = write(tmp_path / "old", model, pruned(model))
    with pytest.raises(ReloadError, match="differs"):
        convert(str(old), tmp_path / "new")
    [(path, expected, auto_class)] = seen
    assert (path, auto_class) == (tmp_path / "new.partial", AUTO)
    assert expected.shape == (4, 2)
    assert [path.name for path in tmp_path.iterdir()] == ["old"]


# Pickles


class Ran:
    """Code in a pickle: it leaves a file behind."""

    def __init__(self, place: Path) -> None:
        self.place = place

    def __reduce__(self) -> Any:
        return Path.touch, (self.place,)


def pickled(path: Path, model: Any, weights: dict[str, torch.Tensor], **changes: Any) -> Path:
    """`write`, as older tools did: the tensors in a pickle, the norms by the names of TensorFlow."""
    write(path, model, {}, **changes)
    (path / "model.safetensors").unlink()
    names = {n: n.replace("LayerNorm.weight", "LayerNorm.gamma").replace("Norm.bias", "Norm.beta") for n in weights}
    torch.save({names[name]: tensor for name, tensor in weights.items()}, path / "pytorch_model.bin")
    torch.save({"lr": 1e-3}, path / "training_args.bin")
    return path


@pytest.mark.usefixtures("in_process")
def test_a_pruned_pickle_is_read_where_it_is_allowed(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    model = factories.model()
    old = pickled(tmp_path / "old", model, pruned(model), pruned_heads={"0": [1, 3], "1": [0]})
    assert factories.run_cli("convert", old, tmp_path / "new") == 2
    advice = f"`hfcompress convert {old} NEW --allow-pickle` reads its tensors and no code"
    assert advice in capsys.readouterr().err
    assert factories.run_cli("convert", old, tmp_path / "new", "--allow-pickle") == 0
    assert torch.allclose(logits(load_model(tmp_path / "new", AUTO)), masked(model), atol=1e-5)
    assert not list((tmp_path / "new").glob("*.bin"))


@pytest.mark.usefixtures("in_process")
def test_a_pickle_of_which_nothing_was_pruned_becomes_safetensors(tmp_path: Path) -> None:
    model = factories.model(head="mask")
    old = pickled(tmp_path / "old", model, dict(model.state_dict()))
    assert convert(str(old), tmp_path / "new", allow_pickle=True) is None
    assert summarize(None) == ["nothing was pruned: the tensors are unchanged, in safetensors"]
    assert torch.equal(logits(load_model(tmp_path / "new", "AutoModelForMaskedLM")), logits(model))
    assert len(load_tokenizer(tmp_path / "new")) == len(factories.WORDS)
    half = pickled(tmp_path / "half", model, {n: t.half() for n, t in model.state_dict().items()})
    convert(str(half), tmp_path / "newer", allow_pickle=True)
    assert open_artifact(tmp_path / "newer").dtype == "float16"


def test_no_code_of_a_pickle_runs(tmp_path: Path) -> None:
    model, ran = factories.model(), tmp_path / "ran"
    old = pickled(tmp_path / "old", model, dict(model.state_dict()))
    torch.save({"bert.x": torch.ones(1), "code": Ran(ran)}, old / "pytorch_model.bin")
    with pytest.raises(HfcompressError, match="holds more than tensors"):
        convert(str(old), tmp_path / "new", allow_pickle=True)
    for content in (b"", b"cos\nsystem\n(S'touch ran'\ntR."):
        (old / "pytorch_model.bin").write_bytes(content)
        with pytest.raises(HfcompressError, match="holds more than tensors, or is cut off"):
            convert(str(old), tmp_path / "new", allow_pickle=True)
    assert not ran.exists()
    assert not list(tmp_path.glob("new*"))


@pytest.mark.usefixtures("in_process")
def test_which_pickle_is_the_model_must_be_clear(tmp_path: Path) -> None:
    model = factories.model()
    old = pickled(tmp_path / "old", model, dict(model.state_dict()))
    (old / "pytorch_model.bin").rename(old / "a.pt")
    shutil.copyfile(old / "a.pt", old / "b.pt")
    with pytest.raises(HfcompressError, match=r"holds several pickles \(a.pt, b.pt\)"):
        convert(str(old), tmp_path / "new", allow_pickle=True)
    (old / "b.pt").unlink()
    assert convert(str(old), tmp_path / "new", allow_pickle=True) is None


@pytest.mark.parametrize("told", [{"0": 3}, {"a": [1]}, {"0": ["x"]}])
def test_pruned_heads_that_are_no_lists_are_told(tmp_path: Path, told: Any) -> None:
    model = factories.model()
    old = write(tmp_path / "old", model, pruned(model), pruned_heads=told)
    with pytest.raises(HfcompressError, match="the config says pruned_heads"):
        convert(str(old), tmp_path / "new")
