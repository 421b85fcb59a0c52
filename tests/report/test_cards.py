"""Cards: those in model_cards/ are what `make cards` renders, and what a card says of each kind of report."""

from __future__ import annotations

import importlib.util
from pathlib import Path

import pytest

_SPEC = importlib.util.spec_from_file_location("cards_script", Path(__file__).parents[2] / "scripts" / "cards.py")
assert _SPEC is not None
assert _SPEC.loader is not None
cards = importlib.util.module_from_spec(_SPEC)
_SPEC.loader.exec_module(cards)


@pytest.mark.parametrize("folder", cards.list_folders(), ids=lambda folder: folder.name)
def test_a_card_is_what_its_report_says(folder: Path) -> None:
    assert (folder / "README.md").read_text(encoding="utf-8") == cards.render(folder)
