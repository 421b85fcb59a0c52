"""Components of other packages: named by entry points, or given as objects."""

from __future__ import annotations

import re
import sys
from pathlib import Path
from typing import ClassVar

import pytest

import hfcompress as hfc
from hfcompress.distillation.losses.base import LOSSES
from hfcompress.recipe.loader import load
from hfcompress.utils.errors import HfcompressError
from hfcompress.utils.registry import ComponentError
from tests import factories

SOURCE = '''
from hfcompress.training.loss import Loss

class {name}(Loss):
    """Half of another."""

    scale: float = 0.5

    def compute(self, step, learned):
        return self.scale * step.student.logits.sum()
'''
BARE = """
from hfcompress.training.loss import Loss

class BareLoss(Loss):
    pass
"""


@pytest.fixture
def install(tmp_path: Path, monkeypatch: pytest.MonkeyPatch):  # type: ignore[no-untyped-def]
    """Puts a distribution with one component on the path."""

    def put(
        entry: str,
        module: str,
        source: str = SOURCE.format(name="HalvedLoss"),
        dist: str = "others",
        group: str = "losses",
    ) -> None:
        site = tmp_path / dist
        info = site / f"{dist}-1.2.dist-info"
        info.mkdir(parents=True)
        (info / "METADATA").write_text(f"Metadata-Version: 2.1\nName: {dist}\nVersion: 1.2\n")
        (info / "entry_points.txt").write_text(f"[hfcompress.{group}]\n{entry}\n")
        (site / f"{module}.py").write_text(source)
        monkeypatch.syspath_prepend(str(site))
        monkeypatch.delitem(sys.modules, module, raising=False)

    return put


def test_a_recipe_names_the_loss_of_another_package(install, recipe: Path) -> None:  # type: ignore[no-untyped-def]
    install("halved_loss = other_losses:HalvedLoss", "other_losses")
    assert "halved_loss" in LOSSES.names()
    stage = load(recipe, ["stages.0.losses=[{use: halved_loss, scale: 0.25}]"]).recipe.stages[0]
    assert [loss.spell_out() for loss in stage.losses] == [{"use": "halved_loss", "weight": 1.0, "scale": 0.25}]
    with pytest.raises(
        HfcompressError, match=r"stages\.0\.losses\.0\.scael: unknown key 'scael'; did you mean 'scale'"
    ):
        load(recipe, ["stages.0.losses=[{use: halved_loss, scael: 1}]"])


@pytest.mark.parametrize(
    ("entry", "source", "why"),
    [
        (
            "cosine = m:HalvedLoss",
            SOURCE.format(name="HalvedLoss"),
            r"'cosine' is offered by hfcompress and by others 1\.2",
        ),
        (
            "halved_loss = m:HalvedLoss",
            "import gone_away",
            r"'halved_loss' of others 1\.2 cannot be loaded: m:HalvedLoss: Mod",
        ),
        ("halved_loss = m:HalvedLoss", "HalvedLoss = 3", r"'halved_loss' of others 1\.2 is no subclass of Loss"),
        (
            "half = m:HalvedLoss",
            SOURCE.format(name="HalvedLoss"),
            r"calls itself 'halved_loss'.*\n.*set `name = \"half\"`",
        ),
    ],
    ids=["ours", "broken", "no loss", "two names"],
)
def test_a_package_that_offers_no_usable_loss_is_named(
    install,
    recipe: Path,
    entry: str,
    source: str,
    why: str,  # type: ignore[no-untyped-def]
) -> None:
    install(entry, "m", source)
    with pytest.raises(ComponentError, match=why):
        LOSSES.get(entry.partition(" ")[0])
    with pytest.raises(HfcompressError, match="others"):
        load(recipe, [f"stages.0.losses=[{entry.partition(' ')[0]}]"])
    assert LOSSES.get("soft_labels").name == "soft_labels"


def test_list_shows_a_broken_package_and_all_that_works(
    install,  # type: ignore[no-untyped-def]
    capsys: pytest.CaptureFixture[str],
) -> None:
    install("gone_loss = gone_losses:GoneLoss", "gone_losses", "import gone_away", dist="broken")
    install("halved_loss = other_losses:HalvedLoss", "other_losses")
    install("bare_loss = bare_losses:BareLoss", "bare_losses", BARE, dist="bare")
    assert factories.run_cli("list", "losses") == 0
    shown = capsys.readouterr().out
    assert re.search(r"gone_loss +broken: the loss", shown)
    assert "gone_away" in shown.replace("\n", "").replace(" ", "")
    assert re.search(r"halved_loss +Half of another\. +- +weight, scale", shown)
    assert re.search(r"bare_loss +- +- +weight", shown)
    assert "soft_labels" in shown
    assert "None" not in shown


def test_a_broken_backend_and_one_with_a_required_option_are_listed(
    install,  # type: ignore[no-untyped-def]
    capsys: pytest.CaptureFixture[str],
) -> None:
    source = BARE.replace("hfcompress.training.loss", "hfcompress.quantization.backends.base")
    source = source.replace("Loss", "Backend").replace("pass", "level: int")
    install("gone = gone_backends:Gone", "gone_backends", "import gone_away", dist="broken", group="backends")
    install("bare_backend = bare_backends:BareBackend", "bare_backends", source, dist="bare", group="backends")
    for command in (("list", "backends"), ("doctor",)):
        assert factories.run_cli(*command) == 0
        shown = capsys.readouterr().out
        assert re.search(r"gone +broken: the backend", shown)
        assert re.search(r"bare_backend +has options", shown)
        assert "torch_int8" in shown


def test_two_packages_that_offer_one_name_are_both_named(install) -> None:  # type: ignore[no-untyped-def]
    install("halved_loss = one:HalvedLoss", "one", dist="first")
    install("halved_loss = two:HalvedLoss", "two", dist="second")
    with pytest.raises(ComponentError, match=r"second 1\.2 and by first 1\.2"):
        LOSSES.get("halved_loss")


def test_a_class_or_an_object_is_a_component() -> None:
    class KLDivergence2(hfc.Loss):
        """Nothing."""

    class Named(hfc.Loss):
        """Nothing."""

        name: ClassVar[str] = "mine"

    stage = hfc.Distill(losses=[KLDivergence2, Named(weight=0.5), "cosine"])
    assert [loss.name for loss in stage.losses] == ["kl_divergence2", "mine", "cosine"]


def test_a_component_of_hfcompress_has_the_name_of_its_file() -> None:
    assert all(LOSSES.get(name).name == name for name in LOSSES.names())


def test_another_thing_is_no_component() -> None:
    with pytest.raises(ValueError, match="a loss is its name, or a mapping"):
        LOSSES.parse(3)
    with pytest.raises(ValueError, match="a loss is its name, or a mapping"):
        LOSSES.parse(factories.Path)
