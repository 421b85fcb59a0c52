"""Scores of criteria against literal references, and the choice that follows from them."""

from __future__ import annotations

import importlib
import re
import sys
from collections.abc import Callable, Sequence
from functools import partial
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor, nn

from hfcompress.models.architectures import ARCHITECTURES, layers_of, spec_of, unit_counts
from hfcompress.models.artifact import load_model
from hfcompress.models.forward import select_inputs
from hfcompress.models.linears import layer_linears
from hfcompress.models.shape import shape_of
from hfcompress.models.surgery import Keep, cut
from hfcompress.pruning.allocation import count_by_layer, count_kept, keep_share
from hfcompress.pruning.criteria.base import CRITERIA, GRANULARITIES, Calibration, Criterion
from hfcompress.pruning.gates import apply_gates
from hfcompress.pruning.hidden_dimensions import cut_hidden
from tests import factories

pytestmark = pytest.mark.filterwarnings("ignore:Initializing zero-element tensors")

FAMILIES = sorted(ARCHITECTURES)
SCORERS = [name for name in CRITERIA.names() if not CRITERIA.get(name).learned]
LOOKING = ["cosine", "fisher", "michel", "taylor", "wanda"]
UNEVEN = [Keep((3,), tuple(range(48))), Keep((0, 2), (5, 6, 7, 60))]
ROWS, LENGTH = 8, 12
Rows = list[dict[str, Tensor]]


def calibration(size: int = ROWS, seed: int = 0, only: Sequence[int] | None = None, **changes: Any) -> Calibration:
    """The same eight rows in batches of `size`, each cut to its longest row; of those batches, `only` some."""
    batch = factories.batch(ROWS, LENGTH) | {"labels": torch.tensor([0, 1] * (ROWS // 2))}

    def batches(count: int) -> Any:
        for number, start in enumerate(range(0, min(count, ROWS), size)):
            part = {name: tensor[start : start + size] for name, tensor in batch.items()}
            longest = int(part["attention_mask"].sum(1).max())
            if only is None or number in only:
                yield {name: tensor[:, :longest] if tensor.dim() == 2 else tensor for name, tensor in part.items()}

    return Calibration(**{"batches": batches, "loss": cross_entropy, "seed": seed, **changes})


def cross_entropy(logits: Tensor, labels: Tensor, mask: Tensor) -> Tensor:
    return nn.functional.cross_entropy(logits, labels)


def scored(name: str, granularity: str, model: Any, looked_at: Calibration, **options: Any) -> list[Tensor]:
    """All that a criterion says of a granularity."""
    criterion = CRITERIA.parse({"use": name, **options})
    if granularity == "units":
        scores = criterion.scores(model, looked_at)
        return [*scores.heads, *scores.neurons]
    if granularity == "weights":
        return list(criterion.weight_scores(model, looked_at).values())
    if granularity == "hidden":
        return [criterion.hidden_scores(model, looked_at)]
    return [torch.tensor(criterion.layer_scores(model, looked_at))]


def pairs(names: Sequence[str]) -> list[tuple[str, str]]:
    return [(name, granularity) for name in names for granularity in sorted(CRITERIA.get(name).scored)]


def assert_close(found: Sequence[Tensor], expected: Sequence[Tensor], rtol: float = 1e-4) -> None:
    """Equal up to float32's rounding, seen from the largest score of all."""
    largest = max(float(e.abs().max()) for e in expected if e.numel())
    assert largest > 0
    for one, other in zip(found, expected, strict=True):
        torch.testing.assert_close(one, other.to(one.dtype), rtol=rtol, atol=1e-5 * largest)


def row_losses(model: Any, rows: Rows) -> Any:
    """The loss of each row, which is alone in its batch and not padded."""
    for row in rows:
        logits = model(**select_inputs(model, {k: v for k, v in row.items() if k != "labels"})).logits
        yield nn.functional.cross_entropy(logits, row["labels"])


ALONE: Rows = list(calibration(1).batches(ROWS))


# Gates on units


def literal_units(model: Any, of: Callable[[Tensor], Tensor]) -> list[Tensor]:
    """The mean over rows of the gradient by gates that are really there, row by row."""
    counts = unit_counts(model)
    gates = [[torch.ones(n, requires_grad=True) for n in units] for units in counts]
    flat = [gate for units in gates for gate in units]
    sums = [torch.zeros(len(gate)) for gate in flat]
    with apply_gates(model, *gates):
        for loss in row_losses(model, ALONE):
            gradients = torch.autograd.grad(loss, flat, allow_unused=True)
            for total, gradient in zip(sums, gradients, strict=True):
                total += of(gradient) if gradient is not None else 0
    return [total / ROWS for total in sums]


@pytest.mark.parametrize(
    ("family", "layout"),
    [*((f, "stock") for f in FAMILIES), *((f, "uneven") for f in ("bert", "distilbert", "modernbert"))],
)
def test_taylor_and_fisher_are_the_mean_of_each_row_s_gate_gradients(family: str, layout: str) -> None:
    model = factories.model(family) if layout == "stock" else cut(factories.model(family), UNEVEN)
    assert_close(scored("taylor", "units", model, calibration(3)), literal_units(model, torch.abs))
    assert_close(scored("fisher", "units", model, calibration(3)), literal_units(model, torch.square))


def test_taylor_is_the_activation_times_its_gradient() -> None:
    """Molchanov eq. 8: `|Σ_positions a ∂L/∂a|` of each unit, row by row, then the mean over rows."""
    model = factories.model()
    caught: list[Tensor] = []

    def catch(_module: Any, inputs: tuple[Tensor, ...]) -> None:
        inputs[0].retain_grad()
        caught.append(inputs[0])

    layers = model.bert.encoder.layer
    for module in [m for layer in layers for m in (layer.attention.output.dense, layer.output.dense)]:
        module.register_forward_pre_hook(catch)
    sums = [torch.zeros(n) for n in (4, 64, 4, 64)]
    for loss in row_losses(model, ALONE):
        loss.backward()
        for total, a in zip(sums, caught, strict=True):
            assert a.grad is not None
            total += (a * a.grad).detach().unflatten(-1, (len(total), -1)).sum((0, 1, 3)).abs() / ROWS
        caught.clear()
    scores = CRITERIA.parse("taylor").scores(factories.model(), calibration())
    assert_close([*scores.heads, *scores.neurons], [sums[0], sums[2], sums[1], sums[3]])


def test_michel_is_normalised_by_layer() -> None:
    model = factories.model()
    with torch.no_grad():
        model.bert.encoder.layer[1].output.dense.weight.zero_()
    raw, found = (scored(name, "units", model, calibration()) for name in ("taylor", "michel"))
    assert_close(found, [score / max(float(score.pow(2).sum()) ** 0.5, 1e-20) for score in raw])
    assert [round(float(score.norm()), 5) for score in found] == [1, 1, 1, 0]


def test_a_unit_that_feeds_nothing_scores_zero() -> None:
    model = factories.model()
    with torch.no_grad():
        model.bert.encoder.layer[0].output.dense.weight[:, 7] = 0
        model.bert.encoder.layer[1].attention.output.dense.weight[:, 8:16] = 0
    for name in ("taylor", "fisher", "michel", "wanda"):
        scores = CRITERIA.parse(name).scores(model, calibration())
        assert float(scores.neurons[0][7]) == 0
        assert float(scores.heads[1][1]) == 0
        assert float(scores.heads[1][0]) > 0


def test_cutting_what_taylor_ranks_low_hurts_less_than_what_it_ranks_high(teacher: Path, data: Path) -> None:
    model, words = load_model(teacher, "AutoModelForSequenceClassification"), factories.tokenizer()
    lines = [line.split("\t") for line in (data / "train.tsv").read_text(encoding="utf-8").splitlines()[1:]]
    batch = dict(words([text for text, _ in lines], padding=True, return_tensors="pt"))
    labels = torch.tensor([int(label) for _, label in lines])
    rows = Calibration(lambda count: [{**batch, "labels": labels}], cross_entropy, 0)
    scores = CRITERIA.parse("taylor").scores(model, rows)

    def hurt(heads: list[Tensor], neurons: list[Tensor]) -> float:
        keep = [
            Keep(h, n) for h, n in zip(keep_share(heads, 0.5, 1, True), keep_share(neurons, 0.5, 8, True), strict=True)
        ]
        with torch.no_grad():
            return nn.functional.cross_entropy(cut(model, keep)(**batch).logits, labels).item()

    low_cut = hurt(scores.heads, scores.neurons)
    high_cut = hurt([-s for s in scores.heads], [-s for s in scores.neurons])
    random = CRITERIA.parse("random").scores(model, rows)
    assert low_cut < hurt(random.heads, random.neurons) < high_cut


def test_the_documented_criterion_works(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    text = (Path(__file__).parents[2] / "docs" / "components.md").read_text(encoding="utf-8")
    source = next(block for block in re.findall(r"```python\n(.*?)```", text, re.DOTALL) if "criteria" in block)
    (tmp_path / "documented_sensitivity.py").write_text(source, encoding="utf-8")
    monkeypatch.syspath_prepend(str(tmp_path))
    found = importlib.import_module("documented_sensitivity").Sensitivity().scores(factories.model(), calibration())
    assert_close([*found.heads, *found.neurons], scored("taylor", "units", factories.model(), calibration()))
    sys.modules.pop("documented_sensitivity")


# Gates on the stream


def literal_stream(model: Any, of: Callable[[Tensor], Tensor]) -> Tensor:
    """One gate a dimension that is really there, at everything that reads the stream, row by row."""
    modules, shape = spec_of(model).modules, shape_of(model.config.to_dict())
    gate = torch.ones(shape.hidden, requires_grad=True)
    runs, length = 0, 0

    def read(_module: Any, args: tuple[Tensor, ...]) -> tuple[Tensor, ...]:
        # DeBERTa's relative positions, which go through the same modules, are not the stream.
        return (args[0] * gate, *args[1:]) if args[0].shape[1] == length else args

    def last(_layer: Any, _args: Any, output: Any) -> Any:
        nonlocal runs
        runs += 1
        if runs % len(shape.layers):
            return output
        return (output[0] * gate, *output[1:]) if isinstance(output, tuple) else output * gate

    for layer in layers_of(model):
        layer.register_forward_hook(last)
        for path in (*modules.head_rows, *modules.neuron_rows):
            layer.get_submodule(path).register_forward_pre_hook(read)
    total = torch.zeros(shape.hidden)
    for row in ALONE:
        length = row["input_ids"].shape[1]
        total += of(torch.autograd.grad(next(row_losses(model, [row])), gate)[0]) / ROWS
    return total


@pytest.mark.parametrize("family", FAMILIES)
def test_hidden_scores_are_the_gradients_of_a_gate_on_every_read_of_the_stream(family: str) -> None:
    expected = [literal_stream(factories.model(family), of) for of in (torch.abs, torch.square)]
    model = factories.model(family)
    assert_close([*scored("taylor", "hidden", model, calibration(3))], expected[:1])
    assert_close([*scored("fisher", "hidden", model, calibration(3))], expected[1:])


# Gradients of weights


@pytest.mark.parametrize("family", ["bert", "albert", "modernbert"])
def test_weight_scores_are_those_of_each_batch_s_gradient(family: str) -> None:
    """Batches of 3, 3 and 2 rows, which count by their rows."""
    model = factories.model(family)
    weights = {f"{name}.weight": module.weight for name, module in layer_linears(model).items()}
    first, second = ({name: torch.zeros_like(w) for name, w in weights.items()} for _ in range(2))
    for batch in calibration(3).batches(ROWS):
        model.zero_grad()
        loss = next(row_losses(model, [batch]))
        loss.backward()
        for name, w in weights.items():
            first[name] += (w * w.grad).detach().abs() * len(batch["labels"]) / ROWS
            second[name] += (w * w.grad).detach().square() * len(batch["labels"]) / ROWS
    model.zero_grad()
    for criterion, expected in (("taylor", first), ("fisher", second)):
        found = CRITERIA.parse(criterion).weight_scores(model, calibration(3))
        assert list(found) == list(expected)
        assert_close(list(found.values()), list(expected.values()))


# Activations


def real_inputs(model: Any, modules: dict[str, nn.Linear]) -> dict[str, Tensor]:
    """What each module gets of all rows' tokens, `(tokens, inputs)`, none of them padding."""
    caught: dict[str, list[Tensor]] = {name: [] for name in modules}
    length = 0

    def catch(into: list[Tensor], _module: Any, args: tuple[Tensor, ...]) -> None:
        # DeBERTa's relative positions, which go through the same modules, are not tokens.
        if args[0].shape[1] == length:
            into.append(args[0].detach().squeeze(0))

    for name, module in modules.items():
        module.register_forward_pre_hook(partial(catch, caught[name]))
    for row in ALONE:
        length = row["input_ids"].shape[1]
        list(row_losses(model, [row]))
    return {name: torch.cat(seen) for name, seen in caught.items()}


@pytest.mark.parametrize("family", FAMILIES)
def test_wanda_is_the_weight_times_the_norm_of_its_input_over_real_tokens(family: str) -> None:
    """Sun et al. eq. 1, `|W_ij| ‖X_j‖₂`; of a unit the sum over its columns."""
    seen, model = factories.model(family), factories.model(family)
    inputs = real_inputs(seen, layer_linears(seen))
    expected = {name: m.weight.detach().abs() * inputs[name].norm(dim=0) for name, m in layer_linears(model).items()}
    found = CRITERIA.parse("wanda").weight_scores(model, calibration(3))
    assert list(found) == [f"{name}.weight" for name in expected]
    assert_close(list(found.values()), list(expected.values()))

    parts, names = spec_of(model).modules, {id(module): name for name, module in model.named_modules()}
    units = CRITERIA.parse("wanda").scores(model, calibration(3))
    for path, counts, scores in zip(
        (parts.attention_output, parts.ffn_out), unit_counts(model), (units.heads, units.neurons), strict=True
    ):
        for layer, count, of_units in zip(layers_of(model), counts, scores, strict=True):
            matrix = expected[names[id(layer.get_submodule(path))]]
            width = matrix.shape[1] // count
            literal = [matrix[:, u * width : (u + 1) * width].sum() for u in range(count)]
            assert_close([of_units], [torch.stack(literal)])


@pytest.mark.parametrize("family", FAMILIES)
def test_cosine_is_the_angle_between_a_layer_s_input_and_output(family: str) -> None:
    """ShortGPT eq. 1, from the hidden states that the model itself gives."""
    model = factories.model(family, layers=3)
    sums, tokens = torch.zeros(3), 0
    for row in ALONE:
        inputs = select_inputs(model, {k: v for k, v in row.items() if k != "labels"})
        with torch.no_grad():
            states = model(**inputs, output_hidden_states=True).hidden_states
        for layer in range(3):
            before, after = states[layer][0], states[layer + 1][0]
            sums[layer] += float(nn.functional.cosine_similarity(before, after, dim=-1).sum())
        tokens += len(before)
    found = scored("cosine", "layers", model, calibration(3))[0]
    # Where a norm follows the last layer, the model gives what comes after it.
    sure = 2 if ARCHITECTURES[family].modern or ARCHITECTURES[family].decoder else 3
    assert found.shape == (3,)
    assert_close([found[:sure]], [(1 - sums / tokens)[:sure]])


def test_a_layer_that_does_nothing_scores_zero_by_cosine() -> None:
    model = factories.model("modernbert", layers=3)
    with torch.no_grad():
        for path in ("attn.Wo", "mlp.Wo"):
            model.model.layers[1].get_submodule(path).weight.zero_()
    first, idle, last = scored("cosine", "layers", model, calibration())[0].tolist()
    assert idle == pytest.approx(0, abs=1e-6)
    assert min(first, last) > 1e-3


# Magnitude and random


def mass(model: Any, power: int, within_layers: bool) -> float:
    """The sum of `|w|^power` over all matrices, or those of the layers."""
    matrices = [m.weight for m in layer_linears(model).values()] if within_layers else model.parameters()
    return sum(float(w.detach().double().abs().pow(power).sum()) for w in matrices if w.dim() > 1)


@pytest.mark.parametrize("norm", ["l1", "l2"])
@pytest.mark.parametrize("family", FAMILIES)
def test_magnitude_is_the_norm_of_the_weights_that_go_with_a_unit(family: str, norm: str) -> None:
    model, power = factories.model(family), int(norm[1])
    scores = CRITERIA.parse({"use": "magnitude", "norm": norm}).scores(model, calibration())
    counts = list(zip(*unit_counts(model), strict=True))
    for head, neuron in ((1, None), (None, 5)):
        keep = [Keep(_without(heads, head), _without(neurons, neuron)) for heads, neurons in counts]
        gone = mass(model, power, True) - mass(cut(model, keep), power, True)
        found = [s[head] for s in scores.heads] if head is not None else [s[neuron] for s in scores.neurons]
        assert sum(float(f) ** power for f in found) == pytest.approx(gone, rel=1e-4)


def _without(count: int, index: int | None) -> tuple[int, ...]:
    return tuple(i for i in range(count) if i != index)


@pytest.mark.parametrize("norm", ["l1", "l2"])
@pytest.mark.parametrize(
    ("family", "head"), [("bert", "mask"), ("modernbert", "mask"), ("mpnet", "token"), ("llama", "sequence")]
)
def test_magnitude_is_the_norm_of_the_weights_that_go_with_a_dimension(family: str, head: str, norm: str) -> None:
    model, power = factories.model(family, head=head), int(norm[1])
    found = CRITERIA.parse({"use": "magnitude", "norm": norm}).hidden_scores(model, calibration())
    gone = mass(model, power, False) - mass(cut_hidden(model, _without(32, 7)), power, False)
    assert float(found[7]) ** power == pytest.approx(gone, rel=1e-4)


def test_what_a_pooler_gives_is_no_part_of_a_dimension() -> None:
    model = factories.model()
    with torch.no_grad():
        model.bert.pooler.dense.weight[3] = 0
        model.classifier.weight[:, 3] = 0
    found = CRITERIA.parse("magnitude").hidden_scores(model, calibration())
    gone = mass(model, 2, False) - mass(cut_hidden(model, _without(32, 7)), 2, False)
    assert float(found[7]) ** 2 == pytest.approx(gone, rel=1e-4)


def test_magnitude_of_single_weights() -> None:
    model = factories.model()
    names = {f"{name}.weight": module.weight for name, module in layer_linears(model).items()}
    assert len(names) == 12
    for norm in ("l1", "l2"):
        found = CRITERIA.parse({"use": "magnitude", "norm": norm}).weight_scores(model, calibration())
        assert list(found) == list(names)
        assert all(torch.equal(found[name], weight.abs()) for name, weight in names.items())


@pytest.mark.parametrize(
    ("options", "said"),
    [
        ({"use": "magnitude", "norm": "l3"}, "norm\n  Input should be 'l1' or 'l2'"),
        ({"use": "magnitude", "rows": 8}, "unknown key 'rows'"),
        ({"use": "fisher", "rows": 0}, "greater than or equal to 1"),
        ({"use": "fischer"}, "did you mean 'fisher'"),
    ],
)
def test_an_option_that_a_criterion_does_not_have_is_refused(options: dict[str, Any], said: str) -> None:
    with pytest.raises(ValueError, match=re.escape(said)):
        CRITERIA.parse(options)


@pytest.mark.parametrize("granularity", GRANULARITIES)
def test_random_is_decided_by_the_seed(granularity: str) -> None:
    model = factories.model()
    first, again, other = (scored("random", granularity, model, calibration(seed=seed)) for seed in (1, 1, 2))
    assert all(torch.equal(a, b) for a, b in zip(first, again, strict=True))
    assert not any(torch.equal(a, b) for a, b in zip(first, other, strict=True))
    assert len(first) == 1 or not torch.equal(first[0], first[-1])


# What holds of all


@pytest.mark.parametrize(("name", "granularity"), pairs(SCORERS))
def test_a_criterion_scores_all_that_it_says_of_an_uneven_model(name: str, granularity: str) -> None:
    model = cut(factories.model(), [Keep((), (1, 2, 3)), Keep((0, 2), ())])
    found = [tuple(score.shape) for score in scored(name, granularity, model, calibration())]
    heads, neurons = unit_counts(model)
    assert (
        found
        == {
            "units": [(n,) for n in (*heads, *neurons)],
            "weights": [tuple(module.weight.shape) for module in layer_linears(model).values()],
            "hidden": [(32,)],
            "layers": [(2,)],
        }[granularity]
    )
    assert all(bool(score.isfinite().all()) for score in scored(name, granularity, model, calibration()))


@pytest.mark.parametrize("name", SCORERS)
def test_a_criterion_names_what_it_scores_and_where_it_is_from(name: str) -> None:
    criterion = CRITERIA.get(name)
    assert criterion.source
    assert criterion.scored <= set(GRANULARITIES)
    methods = {"units": "scores", "layers": "layer_scores", "hidden": "hidden_scores", "weights": "weight_scores"}
    for granularity, method in methods.items():
        overridden = getattr(criterion, method) is not getattr(Criterion, method)
        assert overridden == (granularity in criterion.scored), f"{name} and {granularity}"


# A gradient of weights is one of a batch.
@pytest.mark.parametrize(("name", "granularity"), [p for p in pairs(LOOKING) if p[1] != "weights" or p[0] == "wanda"])
@pytest.mark.parametrize("family", ["bert", "modernbert"])
def test_neither_padding_nor_the_batch_size_changes_a_score(family: str, name: str, granularity: str) -> None:
    model = factories.model(family)
    alone, together = (scored(name, granularity, model, calibration(size)) for size in (1, ROWS))
    assert_close(together, alone)


@pytest.mark.parametrize("share", [(0, 2), ()], ids=["half", "none"])
@pytest.mark.parametrize(("name", "granularity"), pairs(LOOKING))
def test_two_processes_come_to_the_scores_of_one(name: str, granularity: str, share: tuple[int, ...]) -> None:
    model = factories.model()
    one = scored(name, granularity, model, calibration(2))
    sums: list[Tensor] = []
    others = [number for number in range(ROWS // 2) if number not in share]
    theirs = calibration(2, only=others, all_reduce_sum=lambda tensors: sums.extend(t.clone() for t in tensors))
    scored(name, granularity, model, theirs)

    def add(tensors: Sequence[Tensor]) -> None:
        for tensor, other in zip(tensors, sums, strict=True):
            assert tensor.dtype == torch.float64
            tensor += other

    two = scored(name, granularity, model, calibration(2, only=share, all_reduce_sum=add))
    for first, second in zip(one, two, strict=True):
        torch.testing.assert_close(second, first, rtol=3e-7, atol=0)


@pytest.mark.parametrize(("name", "granularity"), pairs(LOOKING))
def test_a_criterion_leaves_the_model_as_it_was(name: str, granularity: str) -> None:
    model = factories.model()
    expected = scored(name, granularity, model, calibration())
    model.train()
    model.classifier.eval()
    model.classifier.weight.requires_grad_(False)
    before = {key: (p.requires_grad, p.clone()) for key, p in model.named_parameters()}
    modes = [module.training for module in model.modules()]

    def broken(count: int) -> Any:
        yield next(iter(calibration(2).batches(count)))
        raise RuntimeError("no more rows")

    # Dropout, which training mode would switch on, draws.
    assert_close(scored(name, granularity, model, calibration()), expected, rtol=1e-6)
    with pytest.raises(RuntimeError, match="no more rows"):
        scored(name, granularity, model, calibration(batches=broken))
    assert [module.training for module in model.modules()] == modes
    for key, parameter in model.named_parameters():
        assert parameter.requires_grad == before[key][0]
        assert parameter.grad is None
        assert torch.equal(parameter, before[key][1])
    assert not any(module._forward_pre_hooks or module._forward_hooks for module in model.modules())


@pytest.mark.parametrize(("name", "granularity"), pairs(LOOKING))
def test_a_criterion_looks_at_as_many_rows_as_it_was_told(name: str, granularity: str) -> None:
    asked: list[int] = []

    def batches(count: int) -> Any:
        asked.append(count)
        return calibration(2).batches(count)

    model = factories.model()
    few, all_of_them = (scored(name, granularity, model, calibration(batches=batches), rows=n) for n in (2, ROWS))
    assert asked == [2, ROWS]
    assert not torch.allclose(few[-1], all_of_them[-1], rtol=1e-3)


# The choice


@pytest.mark.parametrize(
    ("units", "share", "multiple", "stay"),
    [
        (12, 0.25, 1, 9),
        (12, 0.0, 1, 12),
        (12, 0.99, 1, 1),
        (3072, 0.4, 8, 1840),
        (64, 0.99, 8, 8),
        (1536, 0.5, 64, 768),
    ],
)
def test_what_stays_is_the_nearest_multiple_and_at_least_one(
    units: int, share: float, multiple: int, stay: int
) -> None:
    assert count_kept(units, share, multiple) == stay
    assert stay % multiple == 0
    assert abs(stay - units * (1 - share)) <= multiple / 2 or stay == multiple


def test_even_keeps_the_best_of_each_layer() -> None:
    scores = [torch.tensor([0.1, 0.9, 0.5, 0.7]), torch.tensor([40.0, 10.0, 20.0, 30.0])]
    assert keep_share(scores, 0.5, 1, even=True) == [(1, 3), (0, 3)]
    assert keep_share(scores, 0.0, 1, even=True) == [(0, 1, 2, 3)] * 2
    assert keep_share(scores, 0.9, 1, even=True) == [(1,), (0,)]


@pytest.mark.parametrize("multiple", [1, 8])
@pytest.mark.parametrize("share", [0.1, 0.5, 0.75, 0.99])
def test_uneven_keeps_as_much_in_all_and_the_best_of_each_layer(share: float, multiple: int) -> None:
    generator = torch.Generator().manual_seed(0)
    scores = [torch.rand(width, generator=generator) ** power for width, power in ((64, 1), (32, 9), (16, 4))]
    chosen = keep_share(scores, share, multiple, even=False)
    planned = count_by_layer([len(s) for s in scores], share, multiple, even=False)
    assert sum(map(len, chosen)) == sum(planned) == max(count_kept(64 + 32 + 16, share, multiple), 3 * multiple)
    for values, stay in zip(scores, chosen, strict=True):
        assert multiple <= len(stay) <= len(values)
        assert len(stay) % multiple == 0
        assert stay == tuple(sorted(stay))
        gone = sorted(set(range(len(values))) - set(stay))
        assert not gone or float(values[list(stay)].min()) >= float(values[gone].max())


def test_uneven_ranks_the_layers_together_by_normalised_scores() -> None:
    spread, peaked = torch.tensor([5.0, 5.0, 5.0, 5.0]), torch.tensor([1e3, 1.0, 1.0, 1.0])
    # Normalised, each of the first is 0.5; of the second only the first is above that, the rest next to nothing.
    assert keep_share([spread, peaked], 0.375, 1, even=False) == [(0, 1, 2, 3), (0,)]
    assert keep_share([1e6 * spread, 1e-6 * peaked], 0.375, 1, even=False) == [(0, 1, 2, 3), (0,)]


@pytest.mark.parametrize("even", [True, False])
def test_ties_are_decided_by_position(even: bool) -> None:
    scores = [torch.ones(8), torch.ones(8)]
    assert keep_share(scores, 0.5, 1, even) == ([(0, 1, 2, 3)] * 2 if even else [tuple(range(7)), (0,)])
    assert keep_share([torch.zeros(8)] * 2, 0.5, 4, even) == [(0, 1, 2, 3)] * 2
