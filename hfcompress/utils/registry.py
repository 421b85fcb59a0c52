"""Strict options and named components.

A component (a loss, a criterion, a backend) *is* its own options: a frozen pydantic model in a file whose name is the
YAML key. Nothing registers it: the drawer's folder is the registry.
"""

from __future__ import annotations

import importlib
import importlib.util
import pkgutil
from typing import Any, ClassVar, Generic, TypeVar

from pydantic import BaseModel, ConfigDict, ValidationError, model_validator
from pydantic_core import InitErrorDetails, PydanticCustomError, PydanticKnownError

from hfcompress.base.errors import did_you_mean


class Strict(BaseModel):
    """Options that refuse an unknown key (with the nearest known one), a wrong type, and later change."""

    model_config = ConfigDict(
        extra="forbid", frozen=True, strict=True, allow_inf_nan=False, use_attribute_docstrings=True
    )

    def says(self, *keys: str) -> list[str]:
        """Those of the keys that have another value than their default: one that is spelled out says nothing new."""
        fields = type(self).model_fields
        return [key for key in keys if getattr(self, key) != fields[key].get_default(call_default_factory=True)]

    @model_validator(mode="wrap")
    @classmethod
    def _name_the_nearest_key(cls, data: Any, handler: Any) -> Any:
        try:
            return handler(data)
        except ValidationError as error:
            known = [field.alias or name for name, field in cls.model_fields.items()]
            raise ValidationError.from_exception_data(
                error.title, [_explained(details, known) for details in error.errors(include_url=False)]
            ) from None


def _explained(details: Any, known: list[str]) -> InitErrorDetails:
    kind: Any = details["type"]
    context = dict(details.get("ctx", {}))
    if kind == "extra_forbidden" and len(details["loc"]) == 1:
        key = str(details["loc"][0])
        hint = did_you_mean(key, known)
        kind, context = (
            PydanticCustomError("unknown_key", "unknown key '{key}'; {hint}", {"key": key, "hint": hint}),
            {},
        )
    elif isinstance(context.get("error"), Exception) or not _is_core_error(kind, context):
        kind, context = PydanticCustomError("invalid", "{text}", {"text": _text(details)}), {}
    return InitErrorDetails(type=kind, loc=details["loc"], input=details["input"], ctx=context)


def _text(details: Any) -> str:
    return str(details["msg"]).removeprefix("Value error, ")


def _is_core_error(kind: str, context: dict[str, Any]) -> bool:
    try:
        PydanticKnownError(kind, context or None)  # type: ignore[arg-type]
    except (KeyError, TypeError):
        return False
    return True


class Component(Strict):
    """A named choice inside a stage.

    Attributes:
        source: Where the method comes from (paper or documentation), shown by `list` and in the card.
        extra: The optional dependency group that it needs (`pip install hfcompress[EXTRA]`).
        modules: The modules of that group, looked for by `check`.
    """

    source: ClassVar[str] = ""
    extra: ClassVar[str] = ""
    modules: ClassVar[tuple[str, ...]] = ()

    @property
    def name(self) -> str:
        """The YAML key: the name of the file the class stands in."""
        return type(self).__module__.rpartition(".")[2]

    def missing_modules(self) -> list[str]:
        """Modules of this component's extra that are not installed."""
        return [module for module in self.modules if not _installed(module)]

    def spelled(self) -> dict[str, Any]:
        """The component as a recipe would spell it out, defaults resolved."""
        return {"use": self.name, **self.model_dump()}


def _installed(module: str) -> bool:
    try:
        return importlib.util.find_spec(module) is not None
    except ModuleNotFoundError:  # the package that it would lie in is not there either
        return False


C = TypeVar("C", bound=Component)


class Drawer(Generic[C]):
    """The components of one package, found by file name and imported when asked for."""

    def __init__(self, package: str, base: type[C]) -> None:
        self.package, self.base = package, base
        self.what = base.__name__.lower()

    def names(self) -> list[str]:
        """The YAML keys, from the file names alone: nothing is imported but the package."""
        package = importlib.import_module(self.package)
        return sorted(m.name for m in pkgutil.iter_modules(package.__path__) if m.name != "base")

    def get(self, name: str) -> type[C]:
        """The class behind a YAML key.

        Raises:
            ValueError: for an unknown key, with the nearest known one.
        """
        if name not in self.names():
            raise ValueError(f"unknown {self.what} '{name}'; {did_you_mean(name, self.names())}")
        module = importlib.import_module(f"{self.package}.{name}")
        found = [v for v in vars(module).values() if isinstance(v, type) and issubclass(v, self.base)]
        return next(cls for cls in found if cls.__module__ == module.__name__)

    def parse(self, value: Any) -> C:
        """A component from `name` or `{use: name, option: value, …}`."""
        if isinstance(value, self.base):
            return value
        if isinstance(value, str):
            value = {"use": value}
        if not isinstance(value, dict) or not isinstance(value.get("use"), str):
            raise ValueError(f"a {self.what} is its name, or a mapping with `use: NAME` and options")
        options = {key: option for key, option in value.items() if key != "use"}
        return self.get(value["use"]).model_validate(options)
