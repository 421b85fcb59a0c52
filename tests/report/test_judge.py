"""Each model is compared with the source on the same rows, and a gate judges what was found."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from hfcompress.data.fill_mask import FillMask
from hfcompress.data.metrics import object_array
from hfcompress.data.sequence import Regression, TextClassification
from hfcompress.data.tokens import TokenClassification
from hfcompress.measure.answers import Answer, Answers
from hfcompress.measure.measure import Measure
from hfcompress.report.changes import describe_changes
from hfcompress.report.gate import Check, Limits, check_limits
from hfcompress.report.judge import OTHER_UNITS, add_comparisons
from hfcompress.report.verdicts import describe_verdict
from hfcompress.utils.errors import HfcompressError
from hfcompress.utils.margin import Margin
from tests import factories

ROWS = 200


@pytest.fixture
def task(tmp_path: Path) -> TextClassification:
    rows = [f"{'even' if n % 2 else 'odd'} row {n},{n % 2},{'ab'[n % 3 == 0]}" for n in range(ROWS)]
    for split in ("train", "dev", "test"):
        (tmp_path / f"{split}.csv").write_text("\n".join(["sentence,label,source", *rows]) + "\n")
    return TextClassification(dataset=str(tmp_path), text=["sentence"])


def _answer(wrong: set[int], sure: float = 2.0) -> Answer:
    """A classifier of the rows that is wrong on some of them."""
    references = np.arange(ROWS) % 2
    predictions = np.array([1 - r if n in wrong else r for n, r in enumerate(references)])
    logits = np.zeros((ROWS, 2), dtype="float32")
    logits[np.arange(ROWS), predictions] = sure
    return Answer(predictions, references, logits, np.full(ROWS, 5))


def _report(task: Any, source: Answer, *others: Answer | None, **measure: Any) -> dict[str, Any]:
    def row(stage: str, answer: Answer | None) -> dict[str, Any]:
        score = 0.0 if answer is None else task.score(answer.predictions, answer.references)
        latency = [{"batch_size": 1, "speedup": 3.0, "speedup_interval": [2.9, 3.1]}]
        return {"stage": stage, "quality": {task.metric_name: score, "n": ROWS}, "latency": latency, "disk_bytes": 30e6}

    rows = [row("source", source), *(row(f"0{n}-quantize", other) for n, other in enumerate(others, 1))]
    content = {"name": "mine", "rows": rows, "labels": ["no", "yes"]}
    return add_comparisons(content, Answers(source, others), task, Measure.model_validate(measure))


def test_the_report_says_which_rows_broke_and_whether_that_is_noise(task: TextClassification) -> None:
    content = _report(task, _answer({0, 1, 2}), _answer({1, 2, 3, 5}), margin="5%")

    found = content["rows"][1]["against_source"]
    assert (found["broken"], found["repaired"], found["units"]) == (2, 1, ROWS)
    assert found["change"] == pytest.approx(-1 / ROWS)
    assert found["reading"] == "within noise"
    assert found["p_value"] == 1.0
    assert found["verdict"] == "shown"
    assert found["agreement"] == 1 - 3 / ROWS
    assert [flip["row"] for flip in found["flips"]["broken"]] == [3, 5]
    assert found["flips"]["repaired"] == [
        {"row": 0, "text": "odd row 0", "reference": "no", "source": "yes", "result": "no"}
    ]
    assert {each["name"]: each["broken"] for each in found["classes"]} == {"no": 0, "yes": 2}


def test_a_model_that_answers_alike_has_no_difference(task: TextClassification) -> None:
    answer = _answer({0, 1})
    found = _report(task, answer, answer)["rows"][1]["against_source"]
    assert (found["change"], found["agreement"], found["divergence"]) == (0, 1, 0)
    assert found["low"] < 0 < found["high"]  # rows that do not flip leave room for some that would


def test_a_large_loss_is_worse_and_beyond_the_margin(task: TextClassification) -> None:
    found = _report(task, _answer(set()), _answer(set(range(60))), margin=0.1)["rows"][1]["against_source"]
    assert (found["reading"], found["verdict"]) == ("worse", "worse")


def test_a_model_with_other_units_is_not_compared(task: TextClassification) -> None:
    content = _report(task, _answer(set()), None, _answer({1}))
    assert content["rows"][1]["against_source"] == {"not_compared": OTHER_UNITS}
    assert "p_value_holm" not in content["rows"][2]["against_source"]  # one model was tested


def test_p_values_of_several_models_are_adjusted(task: TextClassification) -> None:
    content = _report(task, _answer(set()), _answer(set(range(9))), _answer({1}))
    first, second = (row["against_source"] for row in content["rows"][1:])
    assert first["p_value_holm"] == pytest.approx(2 * first["p_value"])
    assert second["p_value_holm"] == 1.0


def test_slices_are_made_by_a_column_of_the_data(task: TextClassification) -> None:
    wrong = {n for n in range(ROWS) if n % 3 == 0}
    found = _report(task, _answer(set()), _answer(wrong), slices=["source"])["rows"][1]["against_source"]["slices"]
    assert [(part["name"], part["result"]) for part in found["source"]] == [("a", 1.0), ("b", 0.0)]
    assert [part["name"] for part in found["tokens"]] == ["5"]


def test_a_slice_by_a_column_that_is_not_there_is_an_error(task: TextClassification) -> None:
    with pytest.raises(HfcompressError, match="no column 'sauce'"):
        _report(task, _answer(set()), _answer(set()), slices=["sauce"])


def test_scores_are_compared_by_a_bootstrap(tmp_path: Path) -> None:
    references = np.linspace(0, 5, ROWS)
    noise = np.random.default_rng(0).normal(size=(2, ROWS))
    source, worse = (Answer(references + scale * one, references) for scale, one in zip((0.1, 1.0), noise, strict=True))
    task = Regression(dataset=str(tmp_path), text=["sentence"], metric="mse")
    found = _report(task, source, worse)["rows"][1]["against_source"]
    assert found["lower_is_better"]
    assert (found["reading"], found["verdict"]) == ("worse", "worse")
    assert "flips" not in found


def test_entities_are_compared_by_kind(tmp_path: Path) -> None:
    references = object_array([["B-PER", "O", "B-LOC"]] * 40)
    result = object_array([["B-PER", "O", "O"]] * 40)
    task = TokenClassification(dataset=str(tmp_path))
    found = _report(task, Answer(references, references), Answer(result, references))["rows"][1]["against_source"]
    assert [(each["name"], each["result_f1"], each["rare"]) for each in found["classes"]] == [
        ("LOC", 0.0, False), ("PER", 1.0, False),
    ]  # fmt: skip


def _judge(content: dict[str, Any], **limits: Any) -> Check:
    (check,) = check_limits(content, Limits(**limits))
    return check


def test_a_gate_passes_and_fails_at_the_margin(task: TextClassification) -> None:
    content = _report(task, _answer(set(range(20))), _answer(set(range(22))))
    bound = content["rows"][1]["against_source"]["drop_bounds"]["absolute"][1]
    assert _judge(content, max_drop=Margin(bound, relative=False)).verdict == "pass"
    assert _judge(content, max_drop=Margin(bound - 1e-9, relative=False)).verdict == "not shown"
    assert _judge(content, max_drop=Margin(0.0100001, relative=False), by_estimate=True).verdict == "pass"
    assert _judge(content, max_drop=Margin(0.0099, relative=False), by_estimate=True).verdict == "fail"
    relative = content["rows"][1]["against_source"]["drop_bounds"]["relative"][1]
    assert _judge(content, max_drop=Margin(relative, relative=True)).verdict == "pass"
    assert _judge(content, max_drop=Margin(relative - 1e-9, relative=True)).verdict == "not shown"


def test_a_gate_fails_a_loss_that_is_shown(task: TextClassification) -> None:
    content = _report(task, _answer(set()), _answer(set(range(60))))
    assert _judge(content, max_drop=Margin(0.01, relative=True)).verdict == "fail"


def test_a_gate_looks_at_every_class_with_enough_items(task: TextClassification) -> None:
    content = _report(task, _answer(set()), _answer({1, 3, 5, 7, 9, 11, 13, 15}))  # all of class yes
    check = _judge(content, per_class=Margin(0.03, relative=True))
    assert check.verdict == "fail"
    assert "of class yes" in check.sentence
    assert _judge(content, per_class=Margin(0.06, relative=True)).verdict == "pass"


def test_a_gate_tells_a_loss_of_a_class_from_noise(task: TextClassification) -> None:
    content = _report(task, _answer(set()), _answer({1, 3, 5}))  # p = 0.25 for class yes
    check = _judge(content, per_class=Margin(0.01, relative=True))
    assert check.verdict == "not shown"
    assert "of class yes, within noise" in check.sentence
    assert _judge(content, per_class=Margin(0.01, relative=True), by_estimate=True).verdict == "fail"


def test_the_classes_of_all_models_are_tested_together(task: TextClassification) -> None:
    broken, few = _answer({1, 3, 5, 7, 9, 11, 13}), _answer({1})
    alone, among = _report(task, _answer(set()), broken), _report(task, _answer(set()), broken, few)

    def yes(content: dict[str, Any]) -> dict[str, Any]:
        return next(each for each in content["rows"][1]["against_source"]["classes"] if each["name"] == "yes")

    assert (yes(alone)["p_value_holm"], yes(among)["p_value_holm"]) == (2 * 2 / 2**7, 4 * 2 / 2**7)
    assert (yes(alone)["reading"], yes(among)["reading"]) == ("worse", "within noise")
    assert describe_verdict(alone, alone["rows"][1]).endswith(
        "Class yes is worse beyond noise (Holm's correction over classes)."
    )
    assert "beyond noise" not in describe_verdict(among, among["rows"][1])
    told = "\n".join(describe_changes(alone, alone["rows"][1]))
    assert "yes (worse)" in told
    assert "Of a class marked *worse*, fewer items are found" in told
    assert "In none of them" in "\n".join(describe_changes(among, among["rows"][1]))


@pytest.mark.parametrize(("limit", "verdict"), [(2.9, "pass"), (3.0, "not shown"), (3.2, "fail")])
def test_a_gate_judges_the_interval_of_a_speed_up(task: TextClassification, limit: float, verdict: str) -> None:
    content = _report(task, _answer(set()), _answer(set()))
    assert _judge(content, min_speedup=limit).verdict == verdict
    assert _judge({**content, "machine": {"busy": True}}, min_speedup=limit).verdict == "not shown"


@pytest.mark.parametrize(("limit", "verdict"), [(30.0, "pass"), (29.9, "fail")])
def test_a_gate_weighs_the_model(task: TextClassification, limit: float, verdict: str) -> None:
    assert _judge(_report(task, _answer(set()), _answer(set())), max_mb=limit).verdict == verdict


def test_a_gate_names_what_the_report_lacks(task: TextClassification) -> None:
    content = _report(task, _answer(set()), _answer(set()))
    with pytest.raises(HfcompressError, match="no model '07-prune'"):
        check_limits(content, Limits(max_mb=1.0), "07-prune")
    old = {**content, "rows": [{k: v for k, v in row.items() if k != "against_source"} for row in content["rows"]]}
    with pytest.raises(HfcompressError, match="of an earlier version"):
        check_limits(old, Limits(max_drop=Margin(0.01, relative=True)))
    with pytest.raises(HfcompressError, match="no model beside the source"):
        check_limits({**content, "rows": content["rows"][:1]}, Limits(max_mb=1.0))


@pytest.mark.parametrize(("limits", "status"), [(["--max-mb", "30"], 0), (["--max-mb", "29", "--max-drop", "1%"], 3)])
def test_the_gate_command_ends_with_its_verdict(
    limits: list[str], status: int, task: TextClassification, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    path = tmp_path / "report.json"
    path.write_text(json.dumps(_report(task, _answer(set()), _answer(set(range(60))))))
    for place in (path, tmp_path):
        assert factories.run_cli("gate", place, *limits) == status
        said = capsys.readouterr()
        verdict = json.loads(said.out)
        assert verdict["passed"] == (status == 0)
        assert [check["verdict"] for check in verdict["checks"]] == (["fail", "fail"] if status else ["pass"])
        assert all(check["sentence"] in said.err.replace("\n", " ") for check in verdict["checks"])


@pytest.mark.parametrize(
    ("limits", "message"),
    [([], "no limit is given"), (["--max-drop", "1"], "--max-drop: a margin of 1 is ambiguous"),
     (["--max-mb", "1", "--model", "09-x"], "no model '09-x'")],
)  # fmt: skip
def test_a_gate_that_cannot_judge_is_a_mistake(
    limits: list[str], message: str, task: TextClassification, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    (tmp_path / "report.json").write_text(json.dumps(_report(task, _answer(set()), _answer(set()))))
    assert factories.run_cli("gate", tmp_path, *limits) == 2
    assert message in capsys.readouterr().err


def test_a_file_that_is_no_report_is_a_mistake(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    (tmp_path / "other.json").write_text("[]")
    assert factories.run_cli("gate", tmp_path / "other.json", "--max-mb", "1") == 2
    assert "is no report" in capsys.readouterr().err


def test_what_changed_is_told_in_tables(task: TextClassification) -> None:
    from markdown_it import MarkdownIt

    content = _report(task, _answer(set()), _answer({1, 3, 5}), slices=["source"])
    parts = describe_changes(content, content["rows"][1])
    page = MarkdownIt("commonmark").enable("table").render("\n\n".join(parts))
    assert page.count("<table>") == 3  # classes, slices by `source`, confidence; all texts are of one length
    assert "<td>yes</td>" in page
    assert "3 of 200 became wrong, 0 became right." in page


def test_check_finds_a_slice_by_a_column_that_is_not_there(
    teacher: Path, task: TextClassification, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    measure = {"slices": ["source", "sauce"]}
    recipe = factories.recipe(tmp_path / "r.yaml", teacher, Path(task.dataset), measure=measure)
    assert factories.run_cli("check", recipe) == 2
    assert "no column 'sauce'" in (said := capsys.readouterr().err)
    assert "measure.slices" in said


def test_blocks_of_text_are_not_divided_by_a_column(tmp_path: Path) -> None:
    task = FillMask(dataset=str(factories.write_corpus(tmp_path)))
    with pytest.raises(HfcompressError, match="judged on blocks of several rows"):
        task.read_slices(["source"])
    assert task.read_slices([]) == {}
