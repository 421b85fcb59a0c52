"""Finds components by name: losses, criteria and backends.

A component *is* its own options: a frozen pydantic model. A component of hfcompress is in a file whose name is the YAML
key, and the folder is the registry. A component of another package is named by an entry point, or passed as an object.
"""

from __future__ import annotations

import importlib
import importlib.util
import pkgutil
import re
import sys
from functools import lru_cache
from importlib.metadata import EntryPoint, entry_points
from typing import Any, ClassVar, Generic, TypeVar

from hfcompress.utils.errors import HfcompressError, did_you_mean
from hfcompress.utils.strict_model import StrictModel


class ComponentError(HfcompressError, ValueError):
    """A component cannot be found: no package offers it, several do, or the package that offers it is broken."""


class Component(StrictModel):
    """A named choice inside a stage.

    Attributes:
        name: The YAML key. In hfcompress it is the name of the class's file; elsewhere the name of the class in small
            letters (`MyLoss`: `my_loss`), unless the class sets it.
        source: The paper or documentation of the method, shown by `list` and in the card.
        extra: The optional dependency group that it needs (`pip install hfcompress[EXTRA]`).
        modules: The modules of that group; `check` looks for them.
    """

    name: ClassVar[str] = ""
    source: ClassVar[str] = ""
    extra: ClassVar[str] = ""
    modules: ClassVar[tuple[str, ...]] = ()

    def __init_subclass__(cls, **options: Any) -> None:
        super().__init_subclass__(**options)
        if "name" not in vars(cls):
            package, _, file = cls.__module__.rpartition(".")
            ours = package.partition(".")[0] == "hfcompress"
            cls.name = file if ours else re.sub(r"(?<=[a-z0-9])(?=[A-Z])|(?<=[A-Z])(?=[A-Z][a-z])", "_", cls.__name__)
            cls.name = cls.name.lower()

    def missing_modules(self) -> list[str]:
        """Lists the modules of this component's extra that are not installed."""
        return [module for module in self.modules if not _is_installed(module)]

    def spell_out(self) -> dict[str, Any]:
        """Spells the component as in a recipe, with all defaults."""
        return {"use": self.name, **self.model_dump()}


def _is_installed(module: str) -> bool:
    try:
        return importlib.util.find_spec(module) is not None
    except ModuleNotFoundError:  # the package that the module lies in is not there either
        return False


C = TypeVar("C", bound=Component)


class Registry(Generic[C]):
    """The components of one package, found by file name, and those that other packages offer as entry points.

    It imports a component when it is asked for. The group of entry points is `hfcompress.` and the last part of the
    package's name, such as `hfcompress.losses`.
    """

    def __init__(self, package: str, base: type[C]) -> None:
        self.package, self.base = package, base
        self.what = base.__name__.lower()
        self.group = f"hfcompress.{package.rpartition('.')[2]}"

    def names(self) -> list[str]:
        """Lists the YAML keys, by the names of files and entry points alone."""
        return sorted({*self._files(), *self._entry_points()})

    def get(self, name: str) -> type[C]:
        """Imports the class of a YAML key.

        Raises:
            ComponentError: for a key that no package offers, with the nearest known key; for a key that several
                packages offer; and for one whose package cannot be imported.
        """
        files, foreign = self._files(), self._entry_points().get(name, ())
        if name not in files and not foreign:
            raise ComponentError(f"unknown {self.what} '{name}'; {did_you_mean(name, self.names())}")
        offers = [*(["hfcompress"] if name in files else []), *map(_distribution, foreign)]
        if len(offers) > 1:
            raise ComponentError(
                f"the {self.what} '{name}' is offered by {' and by '.join(offers)}, so it is not clear which is meant",
                f"uninstall {offers[-1]}, or give its entry point and its class another name",
            )
        return self._load(foreign[0]) if foreign else self._import(name)

    def parse(self, value: Any) -> C:
        """Makes a component from `name` or `{use: name, option: value, …}`; takes an object or its class as it is.

        Raises:
            ValueError: for any other value, and in the cases of `get`.
        """
        if isinstance(value, self.base):
            return value
        if isinstance(value, type) and issubclass(value, self.base):
            return value()
        if isinstance(value, str):
            value = {"use": value}
        if not isinstance(value, dict) or not isinstance(value.get("use"), str):
            raise ValueError(f"a {self.what} is its name, or a mapping with `use: NAME` and options")
        options = {key: option for key, option in value.items() if key != "use"}
        return self.get(value["use"]).model_validate(options)

    def _files(self) -> list[str]:
        package = importlib.import_module(self.package)
        return [module.name for module in pkgutil.iter_modules(package.__path__) if module.name != "base"]

    def _entry_points(self) -> dict[str, tuple[EntryPoint, ...]]:
        return _entry_points(self.group, tuple(sys.path))

    def _import(self, name: str) -> type[C]:
        module = importlib.import_module(f"{self.package}.{name}")
        found = [v for v in vars(module).values() if isinstance(v, type) and issubclass(v, self.base)]
        return next(cls for cls in found if cls.__module__ == module.__name__)

    def _load(self, entry: EntryPoint) -> type[C]:
        what = f"the {self.what} '{entry.name}' of {_distribution(entry)}"
        try:
            found = entry.load()
        except Exception as error:  # a foreign module may raise any error when it is imported
            raise ComponentError(
                f"{what} cannot be loaded: {entry.value}: {type(error).__name__}: {error}", "upgrade or uninstall it"
            ) from error
        if not isinstance(found, type) or not issubclass(found, self.base):
            raise ComponentError(f"{what} is no subclass of {self.base.__name__}: {entry.value}")
        if found.name != entry.name:
            raise ComponentError(
                f"{what} calls itself '{found.name}', and a recipe would know it by two names",
                f'set `name = "{entry.name}"` in {entry.value}',
            )
        return found


@lru_cache(maxsize=8)
def _entry_points(group: str, _path: tuple[str, ...]) -> dict[str, tuple[EntryPoint, ...]]:
    """Finds the entry points of a group by name, once for each `sys.path`."""
    found: dict[str, tuple[EntryPoint, ...]] = {}
    for entry in entry_points(group=group):
        found[entry.name] = (*found.get(entry.name, ()), entry)
    return found


def _distribution(entry: EntryPoint) -> str:
    return f"{entry.dist.name} {entry.dist.version}" if entry.dist is not None else entry.value
