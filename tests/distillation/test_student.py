"""Where a student's first weights come from."""

from __future__ import annotations

from dataclasses import replace
from typing import Any

import pytest
import torch
from pydantic import ValidationError

from hfcompress.distillation.student import PRESETS, Student
from hfcompress.distillation.student_weights import build_student
from hfcompress.distillation.width_importance import Importance, rank_dimensions, select_best
from hfcompress.models.architectures import ARCHITECTURES, layers_of, spec_of
from hfcompress.models.forward import observe
from hfcompress.models.shape import Shape, shape_of
from hfcompress.models.surgery import Keep, cut
from hfcompress.utils.errors import Problem
from tests import factories

FAMILIES = ("bert", "distilbert", "roberta")
EVERY_FAMILY = sorted(ARCHITECTURES)
PROJECTIONS = ("query", "key", "value")


def shape(model: Any, head: str = "sequence") -> Shape:
    return shape_of(model.config.to_dict(), head=head)


def logits(model: Any) -> torch.Tensor:
    with torch.no_grad():
        return observe(model.eval(), factories.batch()).logits


def layer(model: Any, index: int) -> dict[str, torch.Tensor]:
    return layers_of(model)[index].state_dict()


def outside_layers(model: Any) -> dict[str, torch.Tensor]:
    return {name: tensor for name, tensor in model.state_dict().items() if ".layer." not in name}


def equal(one: dict[str, torch.Tensor], other: dict[str, torch.Tensor]) -> bool:
    return one.keys() == other.keys() and all(torch.equal(one[name], other[name]) for name in one)


@pytest.mark.parametrize("family", FAMILIES)
def test_all_layers_copied_are_the_same_model(family: str) -> None:
    teacher = factories.model(family, layers=3, seed=1)
    student, report = build_student(teacher, shape(teacher), [0, 1, 2])
    assert student.training
    assert torch.equal(logits(student), logits(teacher))
    assert report == {
        "embeddings": "copied",
        "head": "copied",
        **{f"layer {i}": f"copied from layer {i}" for i in (1, 2, 3)},
    }


@pytest.mark.parametrize("family", FAMILIES)
def test_a_shallower_student_copies_exactly_the_mapped_layers(family: str) -> None:
    teacher = factories.model(family, layers=6, seed=1)
    before = {name: tensor.clone() for name, tensor in teacher.state_dict().items()}
    student, report = build_student(teacher, replace(shape(teacher), layers=shape(teacher).layers[:3]), [1, 3, 5])
    assert [equal(layer(student, m), layer(teacher, g)) for m, g in enumerate((1, 3, 5))] == [True] * 3
    assert equal(outside_layers(student), outside_layers(teacher))
    assert [report[f"layer {i}"] for i in (1, 2, 3)] == [f"copied from layer {i}" for i in (2, 4, 6)]
    assert equal(teacher.state_dict(), before)


def test_a_student_owns_its_weights() -> None:
    teacher = factories.model()
    student, _ = build_student(teacher, shape(teacher), [0, 1])
    expected = logits(teacher)
    with torch.no_grad():
        for parameter in student.parameters():
            parameter.zero_()
    assert torch.equal(logits(teacher), expected)


@pytest.mark.parametrize("family", FAMILIES)
@pytest.mark.parametrize(("hidden", "heads", "ffn"), [(16, 4, 32), (24, 3, 48), (16, 2, 48)])
def test_a_narrower_student_keeps_the_first_dimensions_of_each_head(
    family: str, hidden: int, heads: int, ffn: int
) -> None:
    teacher = factories.model(family, layers=2, hidden=32, heads=4, ffn=64, seed=1)
    small = replace(shape(teacher), hidden=hidden, head_dim=hidden // heads).with_layers(1, heads, ffn)
    student, report = build_student(teacher, small, [1])
    names, ours, theirs, width = spec_of(teacher).modules, layer(student, 0), layer(teacher, 1), hidden // heads
    for head in range(heads):
        for dim in range(width):
            new, old = head * width + dim, head * 8 + dim
            for part in PROJECTIONS:
                path = getattr(names, part)
                assert torch.equal(ours[f"{path}.weight"][new], theirs[f"{path}.weight"][old, :hidden])
                assert ours[f"{path}.bias"][new] == theirs[f"{path}.bias"][old]
            mixed = f"{names.attention_output}.weight"
            assert torch.equal(ours[mixed][:, new], theirs[mixed][:hidden, old])
    assert torch.equal(ours[f"{names.attention_output}.bias"], theirs[f"{names.attention_output}.bias"][:hidden])
    assert torch.equal(ours[f"{names.ffn_in}.weight"], theirs[f"{names.ffn_in}.weight"][:ffn, :hidden])
    assert torch.equal(ours[f"{names.ffn_out}.weight"], theirs[f"{names.ffn_out}.weight"][:hidden, :ffn])
    embedded = student.base_model.embeddings.word_embeddings.weight
    assert torch.equal(embedded, teacher.base_model.embeddings.word_embeddings.weight[:, :hidden])
    assert report["embeddings"] == "truncated"
    assert report["layer 1"] == "truncated from layer 2"
    assert bool(logits(student).isfinite().all())


def test_a_narrower_ffn_alone_leaves_the_rest_copied() -> None:
    teacher = factories.model(layers=1)
    student, report = build_student(teacher, shape(teacher).with_layers(1, 4, 16), [0])
    ours, theirs = layer(student, 0), layer(teacher, 0)
    whole = [name for name in ours if not name.startswith(("intermediate", "output.dense.weight"))]
    assert all(torch.equal(ours[name], theirs[name]) for name in whole)
    assert report == {
        "embeddings": "copied", "layer 1": "copied and truncated from layer 1", "head": "copied"
    }  # fmt: skip


@pytest.mark.parametrize("family", FAMILIES)
def test_a_narrower_position_table_keeps_its_first_rows(family: str) -> None:
    teacher = factories.model(family)
    student, report = build_student(teacher, replace(shape(teacher), positions=20), [0, 1])
    table = student.base_model.embeddings.position_embeddings.weight
    assert torch.equal(table, teacher.base_model.embeddings.position_embeddings.weight[:20])
    assert student.config.max_position_embeddings == 20
    assert torch.allclose(logits(student), logits(teacher), atol=1e-6)
    assert report["embeddings"] == "copied and truncated"


def test_a_student_of_other_heads_but_equal_width_says_so() -> None:
    teacher = factories.model(layers=1)
    student, report = build_student(teacher, replace(shape(teacher), head_dim=4).with_layers(1, 8, 64), [0])
    assert report == {
        "embeddings": "copied", "layer 1": "copied and regrouped into other heads from layer 1", "head": "copied"
    }  # fmt: skip
    assert equal(layer(student, 0), layer(teacher, 0))
    assert not torch.allclose(logits(student), logits(teacher), atol=1e-4)


def test_what_is_wider_than_its_origin_starts_at_random_and_says_so() -> None:
    teacher = factories.model(layers=1)
    student, report = build_student(teacher, shape(teacher).with_layers(1, 4, 128), [0])
    assert report["layer 1"] == "copied and random from layer 1"
    assert torch.equal(
        layer(student, 0)["attention.self.query.weight"], layer(teacher, 0)["attention.self.query.weight"]
    )
    wide = replace(shape(teacher), hidden=64, head_dim=16)
    assert build_student(teacher, wide, [0])[1]["embeddings"] == "random"


def test_a_random_student_shares_nothing_and_follows_the_seed() -> None:
    teacher = factories.model()

    def drawn(seed: int) -> Any:
        torch.manual_seed(seed)
        student, report = build_student(teacher, shape(teacher), [0, 1], init="random")
        assert report == {"all": "random"}
        return student

    assert equal(drawn(0).state_dict(), drawn(0).state_dict())
    words = [m.bert.embeddings.word_embeddings.weight for m in (drawn(0), drawn(1), teacher)]
    assert not torch.equal(words[0], words[1])
    assert not torch.equal(words[0], words[2])


@pytest.mark.parametrize("family", FAMILIES)
def test_a_student_can_come_from_an_uneven_model(family: str) -> None:
    origin = cut(
        factories.model(family, layers=2), [Keep((1,), tuple(range(32))), Keep((0, 1, 2, 3), tuple(range(48)))]
    )
    student, _ = build_student(origin, shape(origin).with_layers(1, 4, 48), [1])
    assert not type(student).__name__.startswith("Pruned")
    assert equal(layer(student, 0), layer(origin, 1))
    other = build_student(origin, shape(origin).with_layers(1, 4, 32), [0])[1]
    assert other["layer 1"] == "copied and random from layer 1"


@pytest.mark.parametrize(("family", "head"), factories.headed())
def test_a_student_comes_from_any_family_with_any_head(family: str, head: str) -> None:
    origin = factories.model(family, layers=3, head=head, seed=1)
    ranked = rank_dimensions(origin, [factories.batch()])
    whole, _ = build_student(origin, shape(origin, head), [0, 1, 2], importance=ranked)
    assert torch.equal(logits(whole), logits(origin))
    for importance in (None, ranked):
        small = replace(shape(origin, head), hidden=24).with_layers(2, 2, 40)
        if not small.spec.decoder:
            small = replace(small, head_dim=12)
        student, report = build_student(origin, small, [0, 2], importance=importance)
        assert not any("random" in how for how in report.values())
        assert type(student) is type(origin)
        assert bool(logits(student).isfinite().all())


def importance(model: Any) -> Importance:
    """Scores that put other dimensions first than the first ones, and other ones in each place."""
    draw = torch.Generator().manual_seed(5)
    sizes = shape(model)
    heads, width = sizes.layers[0].heads, sizes.head_dim

    def drawn(*size: int) -> list[torch.Tensor]:
        return [torch.rand(size, generator=draw) for _ in sizes.layers]

    return Importance(
        torch.rand(sizes.hidden, generator=draw), drawn(heads), drawn(heads, width), drawn(heads, width),
        drawn(sizes.layers[0].ffn),
    )  # fmt: skip


def top(scores: torch.Tensor, count: int) -> list[int]:
    return sorted(scores.argsort(descending=True)[:count].tolist())


@pytest.mark.parametrize("family", FAMILIES)
def test_the_same_dimensions_are_kept_all_through_the_model(family: str) -> None:
    # FFN and residual are equally wide, and so are heads taken together: widths alone tell nothing.
    teacher = factories.model(family, layers=2, hidden=32, heads=4, ffn=32, seed=1)
    known = importance(teacher)
    small = replace(shape(teacher), hidden=12, head_dim=6).with_layers(1, 2, 20)
    student, report = build_student(teacher, small, [1], importance=known)
    stream, neurons, names = top(known.residual, 12), top(known.neurons[1], 20), spec_of(teacher).modules
    heads = top(known.heads[1], 2)
    scores = [head * 8 + dim for head in heads for dim in top(known.scores[1][head], 6)]
    values = [head * 8 + dim for head in heads for dim in top(known.values[1][head], 6)]
    assert stream != list(range(12))
    assert scores != values
    ours, theirs = layer(student, 0), layer(teacher, 1)
    for path, rows, columns in (
        (names.query, scores, stream),
        (names.key, scores, stream),
        (names.value, values, stream),
        (names.attention_output, stream, values),
        (names.ffn_in, neurons, stream),
        (names.ffn_out, stream, neurons),
    ):
        assert torch.equal(ours[f"{path}.weight"], theirs[f"{path}.weight"][rows][:, columns])
        assert torch.equal(ours[f"{path}.bias"], theirs[f"{path}.bias"][rows])
    norms = [name for name in ours if "norm" in name.lower()]
    assert norms
    assert all(torch.equal(ours[name], theirs[name][stream]) for name in norms)
    mine, old = outside_layers(student), outside_layers(teacher)
    for name, tensor in mine.items():
        expected = old[name]
        for axis, size in enumerate(expected.shape):
            expected = expected.index_select(axis, torch.tensor(stream)) if size == 32 else expected
        assert torch.equal(tensor, expected), name
    assert report["layer 1"] == "selected by activation from layer 2"


def test_dimensions_that_do_nothing_are_left_out_and_the_answer_stays() -> None:
    teacher = factories.model(layers=2, hidden=32, heads=4, ffn=64, seed=1)
    dead, idle_head, idle_neurons = [0, 3, 9, 20, 21, 22, 30, 31], 1, list(range(0, 64, 2))
    # Without its norms the residual stream keeps a dead dimension at zero and the live ones as they are.
    for module in [*teacher.modules()]:
        for name, child in list(module.named_children()):
            if isinstance(child, torch.nn.LayerNorm):
                setattr(module, name, Scale(child.weight))
    with torch.no_grad():
        for name, parameter in teacher.named_parameters():
            if name.endswith((".output.dense.weight", ".output.dense.bias")) or "LayerNorm" in name:
                parameter[dead] = 0
            if "embeddings.weight" in name or "_embeddings." in name:
                parameter[:, dead] = 0
        for each in layers_of(teacher):
            each.attention.output.dense.weight[:, idle_head * 8 : idle_head * 8 + 8] = 0
            each.attention.self.value.weight[idle_head * 8 : idle_head * 8 + 8] = 0
            each.attention.self.value.bias[idle_head * 8 : idle_head * 8 + 8] = 0
            each.intermediate.dense.weight[idle_neurons] = 0
            each.intermediate.dense.bias[idle_neurons] = 0
    known = rank_dimensions(teacher, [factories.batch()])
    assert sorted(select_best(-known.residual, 8, 32).tolist()) == dead
    assert all(int(heads.argmin()) == idle_head for heads in known.heads)
    assert all(sorted(select_best(-neurons, 32, 64).tolist()) == idle_neurons for neurons in known.neurons)
    small = replace(shape(teacher), hidden=24).with_layers(2, 3, 32)
    student, _ = build_student(teacher, small, [0, 1], importance=known)
    for name, child in teacher.named_modules():
        if isinstance(child, Scale):
            owner, _, attribute = name.rpartition(".")
            kept = select_best(known.residual, 24, 32)
            setattr(student.get_submodule(owner), attribute, Scale(child.weight[kept].detach()))
    # The pooler's rows are no stream of dead dimensions: its output is cut with the classifier's columns.
    with torch.no_grad():
        hidden = [m.eval().bert(**factories.batch()).last_hidden_state for m in (student, teacher)]
    assert torch.allclose(hidden[0], hidden[1][..., select_best(known.residual, 24, 32)], atol=1e-5)


class Scale(torch.nn.Module):
    """What is left of a layer norm without the statistics over all dimensions."""

    def __init__(self, weight: torch.Tensor) -> None:
        super().__init__()
        self.weight = torch.nn.Parameter(weight.detach().clone())

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        return x * self.weight


def test_importance_is_the_mean_activation_of_real_tokens() -> None:
    teacher = factories.model(layers=2, seed=1).train()
    first, second = factories.batch(), factories.batch(rows=2, length=7, seed=3)
    known = rank_dimensions(teacher, [first, second])
    assert teacher.training
    states, given, activated, tokens = torch.zeros(32), torch.zeros(4), torch.zeros(64), 0
    per_dim, queries, keys = torch.zeros(4, 8), torch.zeros(4, 8), torch.zeros(4, 8)
    second_layer = teacher.eval().bert.encoder.layer[1]
    for batch in (first, second):
        for row, mask in zip(batch["input_ids"], batch["attention_mask"], strict=True):
            length = int(mask.sum())
            with torch.no_grad():
                seen = teacher.bert(input_ids=row[None, :length], output_hidden_states=True).hidden_states
                attention = second_layer.attention.self
                mixed = attention(seen[1])[0][0].unflatten(-1, (4, 8))
                inner = second_layer.intermediate(second_layer.attention(seen[1])[0])[0]
                queries += attention.query(seen[1])[0].unflatten(-1, (4, 8)).abs().sum(0)
                keys += attention.key(seen[1])[0].unflatten(-1, (4, 8)).abs().sum(0)
            tokens += length
            states += sum(state[0].abs().sum(0) for state in seen)
            given += mixed.pow(2).sum(-1).sqrt().sum(0)
            per_dim += mixed.abs().sum(0)
            activated += inner.abs().sum(0)
    for found, expected in (
        (known.residual, states / tokens),
        (known.heads[1], given / tokens),
        (known.values[1], per_dim / tokens),
        (known.neurons[1], activated / tokens),
        (known.scores[1], queries * keys / tokens**2),
    ):
        assert torch.allclose(found, expected, atol=1e-5)


@pytest.mark.parametrize("family", EVERY_FAMILY)
def test_importance_does_not_see_padding(family: str) -> None:
    teacher = factories.model(family, seed=1)
    batch = factories.batch()
    longer = {name: torch.nn.functional.pad(value, (0, 5)) for name, value in batch.items()}
    one, other = rank_dimensions(teacher, [batch]), rank_dimensions(teacher, [longer])
    assert torch.allclose(one.residual, other.residual, atol=1e-5)
    for name in ("heads", "scores", "values", "neurons"):
        for a, b in zip(getattr(one, name), getattr(other, name), strict=True):
            assert torch.allclose(a, b, atol=1e-5)


def test_layers_that_share_their_weights_count_together_and_any_of_them_is_taken() -> None:
    teacher = factories.model("albert", layers=3, seed=1)
    known = rank_dimensions(teacher, [factories.batch()])
    mask = factories.batch()["attention_mask"].bool()
    with torch.no_grad():
        seen = observe(teacher, factories.batch(), frozenset({"queries", "keys"}))
    sums = [sum(run.transpose(1, 2)[mask].abs().mean(0) for run in runs.values()) for runs in (seen.queries, seen.keys)]
    assert len(known.scores) == 1
    assert torch.allclose(known.scores[0], sums[0] * sums[1], rtol=1e-4)
    student, report = build_student(teacher, shape(teacher).with_layers(2, 4, 64), [1, 2])
    assert equal(student.state_dict(), teacher.state_dict())
    assert report["layer 1"] == "copied from layer 2"


def test_dimensions_that_are_rotated_together_stay_together() -> None:
    teacher = factories.model("modernbert", layers=1, hidden=32, heads=4)
    known = importance(teacher)
    small = replace(shape(teacher), hidden=16, head_dim=4).with_layers(1, 4, 64)
    student, _ = build_student(teacher, small, [0], importance=known)
    ours, theirs = layer(student, 0)["attn.Wqkv.weight"], layer(teacher, 0)["attn.Wqkv.weight"]
    stream = top(known.residual, 16)
    query, key, value = theirs[:, stream].split(32)
    for head in range(4):
        pairs = top(known.scores[0][head][:4] + known.scores[0][head][4:], 2)
        dims = [head * 8 + dim for dim in (*pairs, *(4 + pair for pair in pairs))]
        mine = slice(head * 4, head * 4 + 4)
        assert torch.equal(ours.split(16)[0][mine], query[dims])
        assert torch.equal(ours.split(16)[1][mine], key[dims])
        assert torch.equal(ours.split(16)[2][mine], value[[head * 8 + d for d in top(known.values[0][head], 4)]])


def test_heads_that_share_a_bias_over_all_layers_are_the_same_in_all() -> None:
    teacher = factories.model("mpnet", layers=2)
    known = importance(teacher)
    student, _ = build_student(
        teacher, replace(shape(teacher), hidden=16).with_layers(2, 2, 64), [0, 1], importance=known
    )
    heads = top(known.heads[0] + known.heads[1], 2)
    assert [top(h, 2) for h in known.heads] != [heads, heads]
    bias = "mpnet.encoder.relative_attention_bias.weight"
    assert torch.equal(student.state_dict()[bias], teacher.state_dict()[bias][:, heads])
    rows = [head * 8 + dim for head in heads for dim in range(8)]
    for index in (0, 1):
        mixed, old = (layer(m, index)["attention.attn.o.weight"] for m in (student, teacher))
        assert torch.equal(mixed, old[top(known.residual, 16)][:, rows])


def test_whole_heads_make_up_heads_that_are_wider() -> None:
    teacher = factories.model(layers=1, hidden=32, heads=4)
    known = importance(teacher)
    small = replace(shape(teacher), hidden=16, head_dim=16).with_layers(1, 1, 64)
    student, _ = build_student(teacher, small, [0], importance=known)
    rows = [head * 8 + dim for head in top(known.heads[0], 2) for dim in range(8)]
    names = spec_of(teacher).modules
    ours, theirs = layer(student, 0), layer(teacher, 0)
    assert torch.equal(ours[f"{names.query}.bias"], theirs[f"{names.query}.bias"][rows])
    assert torch.equal(ours[f"{names.value}.bias"], theirs[f"{names.value}.bias"][rows])


@pytest.mark.parametrize("family", EVERY_FAMILY)
def test_a_head_of_another_size_is_new_and_the_rest_is_copied(family: str) -> None:
    origin = factories.model(family, labels=3)
    student, report = build_student(origin, replace(shape(origin), labels=2), [0, 1])
    assert student.config.num_labels == 2
    assert logits(student).shape == (4, 2)
    assert "random" in report["head"]
    assert report["embeddings"] == "copied"
    assert report["layer 1"] == "copied from layer 1"
    assert origin.config.num_labels == 3


def test_a_head_that_was_never_trained_is_not_called_copied() -> None:
    origin = factories.model()
    student, report = build_student(origin, shape(origin), [0, 1], fresh_head=True)
    assert report["head"] == "random"
    assert not torch.equal(student.classifier.weight, origin.classifier.weight)
    assert not torch.equal(student.bert.pooler.dense.weight, origin.bert.pooler.dense.weight)
    assert torch.equal(layer(student, 0)["output.dense.weight"], layer(origin, 0)["output.dense.weight"])


def test_another_vocabulary_is_not_taken_for_a_part_of_the_old_one() -> None:
    origin = factories.model()
    report = build_student(origin, replace(shape(origin), vocab=10), [0, 1])[1]
    assert report["embeddings"] == "copied and random"


BERT_BASE = Shape("bert", (), 768, 64, 30522, 512, 2, 2).with_layers(12, 12, 3072)


class Task:
    max_length = 128


def problems(origin: Shape = BERT_BASE, **student: Any) -> list[Problem]:
    return Student(**student).problems(origin, Task())


@pytest.mark.parametrize("name", PRESETS)
def test_a_preset_is_a_shape_that_can_be_built(name: str) -> None:
    student = Student(preset=name)
    made = student.shape(BERT_BASE)
    layers, hidden, heads, ffn, source = PRESETS[name]
    assert (len(made.layers), made.hidden, made.hidden // made.head_dim) == (layers, hidden, heads)
    assert made.layers[0].ffn == ffn
    assert made.stock
    assert "arXiv" in source
    assert problems(preset=name) == []
    assert f"-{layers}-" in name or name.startswith("bert-")


def test_presets_have_the_published_sizes() -> None:
    # Parameters in millions, from table 1 of TinyBERT, the model cards of MiniLM and table 1 of Turc et al.
    published = {"tinybert-4-312": 14.5, "tinybert-6-768": 67.0, "minilm-6-384": 22.7, "minilm-12-384": 33,
                 "bert-tiny": 4.4, "bert-mini": 11.3, "bert-small": 29.1, "bert-medium": 41.7}  # fmt: skip
    for name, millions in published.items():
        assert Student(preset=name).shape(BERT_BASE).parameters / 1e6 == pytest.approx(millions, rel=0.015)


def test_keys_override_a_preset_and_what_is_not_said_stays() -> None:
    made = Student(preset="bert-mini", layers=3, positions=128).shape(BERT_BASE)
    assert (len(made.layers), made.hidden, made.layers[0].ffn, made.positions) == (3, 256, 1024, 128)
    assert Student().shape(BERT_BASE) == BERT_BASE
    assert (made.vocab, made.labels, made.architecture) == (30522, 2, "bert")


def test_the_origin_is_called_from() -> None:
    assert Student(**{"from": "model"}).origin == "model"
    assert Student().origin == "parent"
    with pytest.raises(ValidationError, match="did you mean 'from'"):
        Student(**{"form": "model"})


def test_an_unknown_preset_names_the_nearest() -> None:
    with pytest.raises(ValidationError, match="there is no preset 'tinybert-4'; did you mean 'tinybert-4-312'"):
        Student(preset="tinybert-4")


@pytest.mark.parametrize(
    ("chosen", "expected"),
    [
        ("uniform", [2, 5, 8, 11]),
        ("top", [8, 9, 10, 11]),
        ("bottom", [0, 1, 2, 3]),
        ([1, 4, 4, 12], [0, 3, 3, 11]),
    ],
)
def test_layers_are_chosen_as_the_recipe_says(chosen: Any, expected: list[int]) -> None:
    student = Student(layers=4, layers_from=chosen)
    assert student.layers_of(BERT_BASE) == expected
    assert student.problems(BERT_BASE, Task()) == []


@pytest.mark.parametrize(
    ("student", "key", "words"),
    [
        ({"heads": 7}, ("heads",), ("7 heads do not divide the hidden width 768", "use 6 heads")),
        ({"hidden": 100}, ("hidden",), ("12 heads do not divide the hidden width 100", "use 10 heads")),
        ({"preset": "bert-tiny", "heads": 3}, ("heads",), ("3 heads do not divide", "128")),
        ({"positions": 64}, ("positions",), ("max_length is 128", "(64)")),
        ({"positions": 600}, ("positions",), ("has 512 positions", "cannot copy 600")),
        ({"layers": 2, "layers_from": [1]}, ("layers_from",), ("1 layers are named and the student has 2",)),
        ({"layers": 2, "layers_from": [1, 13]}, ("layers_from", 1), ("has 12 layers, so there is no layer 13",)),
        ({"layers": 14, "layers_from": "top"}, ("layers_from",), ("the student has 14 layers", "uniform")),
        ({"init": "random", "width": "activation"}, ("width",), ("no dimensions to choose",)),
        ({"init": "random", "layers_from": "top"}, ("layers_from",), ("no layers to choose",)),
        ({"init": "random", "lora": {"r": 4}}, ("lora",), ("would stay random",)),
    ],
)
def test_what_cannot_be_built_is_told_with_its_key(
    student: dict[str, Any], key: tuple[Any, ...], words: tuple[str, ...]
) -> None:
    (found,) = problems(**student)
    assert found.key == ("student", *key)
    assert all(word in f"{found.message} {found.fix}" for word in words)


def test_more_positions_and_layers_can_start_at_random() -> None:
    assert problems(init="random", positions=600, layers=14) == []
    assert problems(layers=14) == []


def test_heads_that_rotate_need_an_even_width() -> None:
    modern = shape(factories.model("modernbert"))
    task: Any = type("Short", (), {"max_length": 8})
    (found,) = Student(hidden=12, heads=4).problems(modern, task)
    assert "3 dimensions cannot be rotated" in found.message
    assert Student(hidden=16, heads=4).problems(modern, task) == []


def test_only_a_lora_student_needs_peft(monkeypatch: pytest.MonkeyPatch) -> None:
    assert Student(lora={"r": 4}).unavailable() == []
    monkeypatch.setattr("importlib.util.find_spec", lambda name: None)
    assert Student().unavailable() == []
    (found,) = Student(lora={"r": 4}).unavailable()
    assert (found.message, found.fix) == ("peft is not installed", "pip install 'hfcompress[peft]'")
