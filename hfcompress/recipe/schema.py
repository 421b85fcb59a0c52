"""The schema of a recipe: its keys, with types, defaults and bounds."""

from __future__ import annotations

import re
from functools import partial
from typing import Annotated, Any

from pydantic import AfterValidator, BeforeValidator, Field, ValidationInfo, field_validator

from hfcompress.context import Stage
from hfcompress.data.tasks import AnyTask
from hfcompress.distillation.stage import Distill
from hfcompress.finetuning.stage import Finetune
from hfcompress.measure.measure import Measure
from hfcompress.measure.seeds import list_seeds
from hfcompress.pruning.stage import Prune
from hfcompress.quantization.stage import Quantize
from hfcompress.recipe.target import Target
from hfcompress.utils.card_metadata import require_hub_id, require_language, require_license
from hfcompress.utils.registry import Component
from hfcompress.utils.strict_model import StrictModel

MAX_NAME_BYTES = 200
"""The longest name of a recipe: file systems allow 255 bytes, and endings such as `.partial` are added."""
AnyStage = Annotated[Finetune | Distill | Prune | Quantize, Field(discriminator="kind")]


class Hub(StrictModel):
    """Metadata for the model card, and the repository for `push`."""

    repo: Annotated[str, AfterValidator(partial(require_hub_id, owner=True))] | None = None
    """The repository, such as `user/name`; `push --repo` overrides it."""
    private: bool = False
    push: bool = False
    """Publishes the model at the end of the run, as `hfcompress push` does; needs `repo`."""
    license: Annotated[str, AfterValidator(require_license)] | None = None
    """A licence id from the Hub's list; by default the licence that the card of the source names."""
    license_name: str | None = Field(default=None, pattern=r"^[a-z0-9][a-z0-9.-]*$", max_length=96)
    """The name of a licence that is not on the list (with `license: other`): small letters, digits, `-` and `.`."""
    license_link: str | None = Field(default=None, pattern=r"^https://[^\s]+$", max_length=500)
    """The address of that licence."""
    language: list[Annotated[str, BeforeValidator(require_language, json_schema_input_type=str)]] = ["en"]
    """ISO 639 codes, or `multilingual`, or `code`."""
    base_model: Annotated[str, AfterValidator(require_hub_id)] | None = None
    """The Hub id that the card names as base model, if the recipe's model is a local directory."""
    dataset: Annotated[str, AfterValidator(require_hub_id)] | None = None
    """The Hub id that the card names as data set, if the task's is a local directory."""

    @field_validator("push")
    @classmethod
    def _where(cls, value: bool, info: ValidationInfo) -> bool:
        if value and not info.data.get("repo"):
            raise ValueError("it needs `repo: user/name`")
        return value

    @field_validator("license_name", "license_link")
    @classmethod
    def _of_another_license(cls, value: str | None, info: ValidationInfo) -> str | None:
        if value is not None and info.data.get("license", "other") != "other":
            raise ValueError(
                "use it only with `license: other`; a licence from the Hub's list already has a name and a link"
            )
        return value


def require_file_name(name: str) -> str:
    """Requires a name that a directory can have on every file system, with room for an ending.

    Raises:
        ValueError: if the name is too long, ends with a dot, or is the name of a Windows device.
    """
    if len(name.encode()) > MAX_NAME_BYTES:
        raise ValueError(f"it has {len(name.encode())} bytes; a directory's name has at most {MAX_NAME_BYTES} here")
    if name.endswith(".") or re.fullmatch(r"(?i)(con|prn|aux|nul|com\d|lpt\d)(\..*)?", name):
        raise ValueError("no directory can have this name on every system; choose another")
    return name


class Recipe(StrictModel):
    """A recipe: a model, its task, the stages that make it smaller, and the options of the measurement."""

    name: Annotated[str, AfterValidator(require_file_name)] = Field(pattern=r"^[A-Za-z0-9][\w.-]*$", max_length=96)
    """The name of the run directory: letters, digits, `-`, `_` and `.`."""
    model: str = Field(min_length=1)
    """A Hub id (`id@revision` picks a revision), a directory, or `builtin:quickstart`."""
    task: AnyTask
    search: Target | None = None
    """The limits for `hfcompress search`."""
    stages: list[AnyStage] = Field(default=[], validate_default=True)
    """The steps, in order; `hfcompress search` finds those of a recipe that has `search`."""
    measure: Measure = Measure()
    hub: Hub = Hub()
    seed: int = Field(default=42, ge=0, lt=2**32)

    @field_validator("stages")
    @classmethod
    def _require_stages(cls, stages: list[AnyStage], info: ValidationInfo) -> list[AnyStage]:
        if not stages and info.data.get("search") is None:
            raise ValueError("a recipe needs at least one stage, or `search:` with limits")
        return stages

    @property
    def trains_source_head(self) -> bool:
        """True if a stage trains the task head of the source, so that the model needs none."""
        return any(stage.trains_source_head for stage in self.stages)

    def list_seeds(self) -> list[int]:
        """Lists the seeds that the models are made with, the recipe's own first."""
        return list_seeds(self.measure.seeds, self.seed)

    def stage_names(self) -> list[str]:
        """Lists the names of the stages' directories: `01-distill`, `02-prune`, …."""
        return [f"{index:02d}-{stage.kind}" for index, stage in enumerate(self.stages, start=1)]


def spell_out(recipe: Recipe) -> dict[str, Any]:
    """Converts a recipe to YAML values, with every default."""
    left_out = {"search"} if recipe.search is None else set()
    content = recipe.model_dump(mode="json", exclude=left_out)
    return {**content, "stages": [spell_out_stage(stage) for stage in recipe.stages]}


def spell_out_stage(stage: Stage) -> dict[str, Any]:
    """Converts a stage to YAML values, with every default; components get their names."""

    def spell(value: Any) -> Any:
        if isinstance(value, Component):
            return value.spell_out()
        if isinstance(value, StrictModel):
            fields = type(value).model_fields.items()
            return {field.alias or name: spell(getattr(value, name)) for name, field in fields}
        return [spell(entry) for entry in value] if isinstance(value, list) else value

    options: dict[str, Any] = spell(stage)
    return options
