"""Two processes that prune go the same way, whatever only one of them knows."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest

from hfcompress.models.artifact import open_artifact
from tests import factories
from tests.two_processes import END, RUN_STAGES, run_two_processes

TRAIN = {"epochs": 1, "batch_size": 8, "losses": ["hard_labels"]}
SCHEDULES = [
    {"schedule": {"use": "iterative", "rounds": 2}, "recover": TRAIN},
    {"schedule": {"use": "lottery", "rounds": 2}, "train": TRAIN},
]
REMEMBER = """
import json, os, sys
from pathlib import Path
from hfcompress.context import StageContext
from hfcompress.utils.distributed import process_state

rank, target = os.environ["RANK"], Path(sys.argv[1])
context = StageContext(None, 7, None, {}, target / rank)  # the first process alone sees the file of the first
found = [context.remember("known", lambda: "found again"), context.remember("new", lambda: f"by {rank}")]
(target / f"{rank}.json").write_text(json.dumps(found))
process_state().destroy_process_group()
"""


def test_what_the_first_process_alone_knows_is_what_all_of_them_get(tmp_path: Path) -> None:
    for rank in ("0", "1"):
        (tmp_path / rank).mkdir()
    (tmp_path / "0" / "facts").mkdir()
    (tmp_path / "0" / "facts" / "known.json").write_text('"found before"')
    (tmp_path / "script.py").write_text(REMEMBER)

    run_two_processes(tmp_path / "script.py", tmp_path / "home", tmp_path)

    assert [json.loads((tmp_path / f"{rank}.json").read_text()) for rank in "01"] == [["found before", "by 0"]] * 2


@pytest.mark.slow
@pytest.mark.parametrize("schedule", SCHEDULES, ids=["iterative", "lottery"])
@pytest.mark.parametrize("known", [False, True], ids=["new", "resumed"])
def test_the_sensitivity_is_found_once_and_known_to_both(
    tmp_path: Path, data: Path, teacher: Path, schedule: dict[str, Any], known: bool
) -> None:
    stage = {"kind": "prune", "heads": 0.5, "criterion": {"use": "taylor", "rows": 32},
             "sensitivity": {"shares": [0.5], "rows": 8}, **schedule}  # fmt: skip
    recipe, target = factories.recipe(tmp_path / "r.yaml", teacher, data, stages=[stage]), tmp_path / "two"
    (target / "01-prune" / "facts").mkdir(parents=True)
    if known:
        (target / "01-prune" / "facts" / "sensitivity.json").write_text('{"whole": 0.25}')
    (tmp_path / "script.py").write_text(RUN_STAGES + END)

    run_two_processes(tmp_path / "script.py", tmp_path / "home", recipe, target)

    first, second = (json.loads((target / "01-prune" / f"facts-{rank}.json").read_text()) for rank in "01")
    assert first["sensitivity"] == second["sensitivity"]
    assert first["sensitivity"]["whole"] == 0.25 if known else len(first["sensitivity"]["heads"]) == 2
    shape = open_artifact(target / "01-prune" / "model").shape
    assert shape is not None
    assert [layer.heads for layer in shape.layers] == [2, 2]
