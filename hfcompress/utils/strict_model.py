"""A pydantic model that refuses unknown keys, wrong types and later changes."""

from __future__ import annotations

from typing import Any

from pydantic import BaseModel, ConfigDict, ValidationError, model_validator
from pydantic_core import InitErrorDetails, PydanticCustomError, PydanticKnownError

from hfcompress.utils.errors import did_you_mean


class StrictModel(BaseModel):
    """Options that refuse an unknown key (and name the nearest known one), a wrong type, and later changes."""

    model_config = ConfigDict(
        extra="forbid",
        frozen=True,
        strict=True,
        allow_inf_nan=False,
        use_attribute_docstrings=True,
        # Python spells `from:` as `origin=`; a recipe file has the one spelling (`by_name=False` where it is read).
        validate_by_name=True,
        validate_by_alias=True,
    )

    def says(self, *keys: str) -> list[str]:
        """Selects the keys whose value is not the default; a default that is spelled out does not count."""
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
                error.title, [_explain(details, known) for details in error.errors(include_url=False)]
            ) from None


def _explain(details: Any, known: list[str]) -> InitErrorDetails:
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
