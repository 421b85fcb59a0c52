"""Compares each model with the source on the same rows, and says what compression broke.

The report keeps it under `against_source` of a row; every figure follows from the answers and the recipe alone.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import asdict
from typing import TYPE_CHECKING, Any

from hfcompress.measure.answers import Answer, Answers
from hfcompress.measure.measure import Measure
from hfcompress.report.statistics.classes import (
    ClassChange,
    compare_classes,
    compare_entities,
    compare_tags,
    read_class,
)
from hfcompress.report.statistics.comparison import ALPHA, Evidence, compare_answers, non_inferiority, paired_difference
from hfcompress.report.statistics.confidence import measure_confidence
from hfcompress.report.statistics.flips import find_flips, logit_margins, mean_divergence, share_agreement
from hfcompress.report.statistics.power import find_power
from hfcompress.report.statistics.proportions import Pairs, mcnemar_exact
from hfcompress.report.statistics.several import holm
from hfcompress.report.statistics.slices import bin_lengths, compare_slices, group_column

if TYPE_CHECKING:
    from numpy.typing import NDArray

    from hfcompress.data.task import Task

EXAMPLES = 5
"""Flipped rows that are shown, of each kind."""
SHOWN = 300
"""Characters of a text that is shown."""
UNITS = {"question-answering": "question", "token-classification": "sentence", "fill-mask": "block"}
OTHER_UNITS = "it was asked other units than the source, because its tokenizer differs"


def add_comparisons(
    content: Mapping[str, Any], answers: Answers, task: Task, options: Measure, seed: int = 0
) -> dict[str, Any]:
    """Adds to the rows of a report how each model compares with the source.

    Args:
        content: The report.
        answers: What its models answered.
        task: What they were asked.
        options: The margin, and the columns that slices are made by.
        seed: Decides the draws of the bootstrap.
    """
    rows = [dict(row) for row in content["rows"]]
    texts, labels = _read_texts(task), content.get("labels", [])
    slices = _make_slices(answers.source, task, options.slices)
    if answers.source.logits is not None:
        rows[0]["confidence"] = asdict(measure_confidence(answers.source.logits, answers.source.references))
    for row, answer in zip(rows[1:], answers.others, strict=True):
        if answer is None:
            row["against_source"] = {"not_compared": OTHER_UNITS}
            continue
        row["against_source"] = _compare(answers.source, answer, task, options, seed, slices)
        row["against_source"] |= _describe_answers(answers.source, answer, task, labels, texts)
        if answer.logits is not None:
            row["confidence"] = asdict(measure_confidence(answer.logits, answer.references))
    _adjust(rows[1:])
    return {**content, "rows": rows}


def _compare(
    source: Answer, result: Answer, task: Task, options: Measure, seed: int, slices: Mapping[str, Mapping[str, Any]]
) -> dict[str, Any]:
    """The difference with its interval, the verdict at the margin, its power, and the same by slices."""
    settings: dict[str, Any] = {
        "lower_is_better": not task.greater_is_better,
        "samples": options.bootstrap,
        "seed": seed,
    }
    evidence = compare_answers(
        task.metric_function, source.predictions, result.predictions, source.references, **settings
    )
    difference = paired_difference(evidence)
    found: dict[str, Any] = {
        **asdict(difference),
        "lower_is_better": evidence.lower_is_better,
        "margin": str(options.margin),
    }
    found |= _judge_margin(evidence, task, options)
    found["drop_bounds"] = {kind: _bound_drop(evidence, kind == "relative") for kind in ("absolute", "relative")}
    if isinstance(evidence, Pairs):
        found |= {"broken": evidence.broken, "repaired": evidence.repaired}
        found["p_value"] = mcnemar_exact(evidence.broken, evidence.repaired)
    parts = {
        name: compare_slices(
            task.metric_function, source.predictions, result.predictions, source.references, masks, **settings
        )
        for name, masks in slices.items()
    }
    return {**found, "slices": {name: [asdict(part) for part in found] for name, found in parts.items()}}


def _bound_drop(evidence: Evidence, relative: bool) -> list[float] | None:
    """The least and the largest loss that the units leave possible, each at a one-sided level of 5%."""
    if relative and not evidence.source:
        return None
    low, high = evidence.interval(1 - 2 * ALPHA, relative)
    return [low, high] if evidence.lower_is_better else [-high, -low]


def _judge_margin(evidence: Evidence, task: Task, options: Measure) -> dict[str, Any]:
    if options.margin.relative and not evidence.source:
        return {"verdict": "not shown", "why": "the source scores 0, so no loss relative to it is defined"}
    verdict, power = (
        non_inferiority(evidence, options.margin),
        find_power(evidence, options.margin, UNITS.get(task.type, "row")),
    )
    return {
        "verdict": verdict.verdict,
        "drop": verdict.drop,
        "largest_drop": verdict.largest,
        "p_margin": verdict.p_value,
        "margin_test": verdict.test,
        "units_needed": power.needed,
        "smallest_margin": power.smallest,
        "power": power.sentence,
    }


def _describe_answers(
    source: Answer, result: Answer, task: Task, labels: Sequence[str], texts: Sequence[str] | None
) -> dict[str, Any]:
    """Describes the changes in the answers: agreement, divergence, classes, and flipped rows with examples."""
    found: dict[str, Any] = {}
    before, after, references = (list(v) for v in (source.predictions, result.predictions, source.references))
    if task.head != "mask" and task.type != "regression":
        found["agreement"] = share_agreement(source.predictions, result.predictions)
    if task.type == "token-classification":
        compare = compare_tags if task.metric_name == "accuracy" else compare_entities
        found["classes"] = _spell(compare(before, after, references))
    if task.type == "text-classification":
        found["classes"] = _spell(compare_classes(before, after, references, labels or None))
        found["flips"] = _show_flips(source, result, labels, texts)
        if source.logits is not None and result.logits is not None:
            found["divergence"] = mean_divergence(source.logits, result.logits)
    return found


def _spell(changes: Sequence[ClassChange]) -> list[dict[str, Any]]:
    return [{**asdict(each), "change": each.change} for each in changes]


def _show_flips(
    source: Answer, result: Answer, labels: Sequence[str], texts: Sequence[str] | None
) -> dict[str, list[dict[str, Any]]]:
    ours, theirs = (answer.predictions == source.references for answer in (source, result))
    fall = None
    if source.logits is not None and result.logits is not None:
        fall = logit_margins(source.logits, source.references) - logit_margins(result.logits, source.references)
    flips = find_flips(ours, theirs, fall, EXAMPLES)

    def show(row: int) -> dict[str, Any]:
        classes = (source.references, source.predictions, result.predictions)
        reference, before, after = (labels[int(values[row])] for values in classes)
        text = {} if texts is None else {"text": texts[row][:SHOWN]}
        return {"row": row, **text, "reference": reference, "source": before, "result": after}

    return {"broken": [show(row) for row in flips.broken], "repaired": [show(row) for row in flips.repaired]}


def _adjust(rows: Sequence[dict[str, Any]]) -> None:
    """Adds Holm's adjusted p-values: of the models if there are several, and of all their classes together."""
    for key in ("p_value", "p_margin"):
        tested = [row["against_source"] for row in rows if key in row["against_source"]]
        if len(tested) > 1:
            for entry, value in zip(tested, holm([entry[key] for entry in tested]), strict=True):
                entry[f"{key}_holm"] = value
    classes = [each for row in rows for each in row["against_source"].get("classes", ())]
    for entry, value in zip(classes, holm([each["p_value"] for each in classes]), strict=True):
        entry["p_value_holm"] = value
        entry["reading"] = read_class(entry["broken"], entry["repaired"], value)


def _read_texts(task: Task) -> list[str] | None:
    """The text of each judged row of a classification task."""
    if task.type != "text-classification":
        return None
    rows = task.read(task.judged_split())
    return [" | ".join(values) for values in zip(*(rows[column][:] for column in task.text), strict=True)]


def _make_slices(source: Answer, task: Task, columns: Sequence[str]) -> dict[str, dict[str, NDArray[Any]]]:
    """The parts of the units: by length, and by each column that the recipe names."""
    found = {}
    if source.lengths is not None and task.type != "fill-mask":
        found["tokens"] = bin_lengths(source.lengths)
    return found | {name: group_column(values) for name, values in task.read_slices(columns).items()}
