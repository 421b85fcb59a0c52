"""The Hub's lists, and the script that refreshes them, on sources that are stored here."""

from __future__ import annotations

import re
import runpy
import subprocess
import sys
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest

from hfcompress.data.tasks import AnyTask
from hfcompress.report.hub_metadata import _PIPELINES
from hfcompress.utils import card_metadata

ROOT = Path(__file__).parents[2]
SCRIPT = ROOT / "scripts" / "refresh_hub_lists.py"
SOURCES = {
    "repositories-licenses.md": """# Licenses

| Fullname | License identifier (to use in repo card) |
| -------- | ---------------------------------------- |
| A free one | `free-1.0` |
| A free++ one    | `free++`   | <!-- license: https://example.org/LICENSE -->

For `license: other` see `LICENSE`.
""",
    "languages_iso_639_1.ts": 'export const A = {\n\tde: {\n\t\tcode: "de",\n\t\tname: "German",\n\t},\n};\n',
    "languages_iso_639_3.ts": 'export const B = {\n\tdeu: {\n\t\tcode: "deu",\n\t\tname: "German",\n\t},\n};\n',
    "pipelines.ts": """export const MODALITY_LABELS = {
	nlp: "Natural Language Processing",
};

export const PIPELINE_DATA = {
	"text-classification": {
		name: "Text Classification",
		subtasks: [
			{
				type: "topic-classification",
			},
		],
	},
	other: {
		name: "Other",
	},
} satisfies Record<string, PipelineData>;

export const LATER_DATA = {
	no: {
	},
};
""",
    "model-libraries.ts": """export const MODEL_LIBRARIES_UI_ELEMENTS = {
	transformers: {
		prettyLabel: "Transformers",
		snippets: snippets.transformers,
	},
	"sentence-transformers": {
		prettyLabel: "sentence-transformers",
	},
	big_vision: {
		filter: false,
	},
} satisfies Record<string, LibraryUiElement>;
""",
}


@pytest.fixture(scope="module")
def script() -> Any:
    return SimpleNamespace(**runpy.run_path(str(SCRIPT)))


def _read(url: str) -> str:
    return SOURCES[url.rpartition("/")[2]]


def _words(folder: Path) -> dict[str, set[str]]:
    return {path.stem: set(card_metadata.read_words(path)) for path in folder.iterdir()}


def test_the_lists_are_read_from_the_sources(script: Any, tmp_path: Path) -> None:
    script.refresh(_read, tmp_path, "2030-01-02")
    assert _words(tmp_path) == {
        "licenses": {"free-1.0", "free++"},
        "languages": {"de", "deu"},
        "pipelines": {"text-classification", "other"},
        "libraries": {"transformers", "sentence-transformers", "big_vision"},
    }
    first, second, *_ = (tmp_path / "licenses.txt").read_text().splitlines()
    assert "2030-01-02" in first
    assert second.startswith("# https://raw.githubusercontent.com/huggingface/hub-docs/")


def test_a_refresh_tells_what_is_new_and_keeps_languages(script: Any, tmp_path: Path) -> None:
    (tmp_path / "licenses.txt").write_text("# old\nfree-1.0 old-1.0\n")
    (tmp_path / "languages.txt").write_text("ber de\n")
    told = "\n".join(script.refresh(_read, tmp_path, "2030-01-02"))
    assert "licenses.txt: 2 words; new: free++; gone: old-1.0" in told
    assert _words(tmp_path)["languages"] == {"ber", "de", "deu"}


@pytest.mark.parametrize("name", SOURCES)
def test_a_source_of_another_form_changes_no_list(script: Any, tmp_path: Path, name: str) -> None:
    script.refresh(_read, tmp_path, "2030-01-02")
    (tmp_path / "languages.txt").write_text("aa ab de deu\n")
    before = {path: path.read_bytes() for path in tmp_path.iterdir()}

    def read(url: str) -> str:
        changed = name.startswith("languages") and "languages" in url
        return "<html></html>" if changed or url.endswith(name) else _read(url)

    with pytest.raises(ValueError, match="did the source change"):
        script.refresh(read, tmp_path, "2030-01-03")
    assert {path: path.read_bytes() for path in tmp_path.iterdir()} == before


def test_a_copy_that_is_missing_ends_in_one_line(tmp_path: Path) -> None:
    done = subprocess.run([sys.executable, SCRIPT, "--from", tmp_path], capture_output=True, text=True, check=False,
                          env={"PYTHONPATH": str(ROOT)})  # fmt: skip
    assert done.returncode == 1
    assert done.stderr.startswith("nothing was written: ")
    assert "Traceback" not in done.stderr


@pytest.mark.parametrize("name", ["licenses", "languages", "pipelines", "libraries"])
def test_a_list_says_where_and_when_it_was_read(name: str) -> None:
    first, second, *_ = (ROOT / "hfcompress" / "utils" / f"{name}.txt").read_text(encoding="utf-8").splitlines()
    assert re.match(r"# .* on \d{4}-\d\d-\d\d, by scripts/refresh_hub_lists.py from:$", first)
    assert second.startswith("# https://")
    words = getattr(card_metadata, name)()
    assert len(words) > 50
    assert not [word for word in words if "#" in word or ":" in word]


def test_what_cards_name_is_on_the_lists() -> None:
    card_metadata.require_library("transformers")
    card_metadata.require_library("sentence-transformers")
    with pytest.raises(ValueError, match="'onnx' is no library of the Hub"):
        card_metadata.require_library("onnx")
    with pytest.raises(ValueError, match="'regression' is no pipeline tag of the Hub"):
        card_metadata.require_pipeline("regression")
    for task in AnyTask.__origin__.__args__:  # type: ignore[attr-defined]
        type_ = task.model_fields["type"].annotation.__args__[0]
        card_metadata.require_pipeline(_PIPELINES.get(type_, type_))
