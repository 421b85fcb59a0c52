"""Strict options and named components.

A component (a loss, a criterion, a backend) *is* its own options: a frozen pydantic model in a file whose name is the
YAML key. Nothing registers it: the drawer's folder is the registry.
"""

from __future__ import annotations

import importlib
import importlib.util
import pkgutil
from typing import Any, ClassVar, Generic, TypeVar

from hfcompress.utils.errors import did_you_mean
from hfcompress.utils.strict_model import StrictModel


class Component(StrictModel):
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


class Registry(Generic[C]):
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
