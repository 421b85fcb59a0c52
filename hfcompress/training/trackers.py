"""The trackers that transformers can report a training to."""

from __future__ import annotations

from collections.abc import Sequence

from hfcompress.utils.errors import Problem, did_you_mean

_ALL_OR_NONE = ("all", "none")
_ASKED_AS = {"azure_ml": "azureml", "comet_ml": "comet", "flyte": "flytekit"}
"""The names of some trackers in transformers' functions `is_…_available`."""


def tracker_problems(names: Sequence[str]) -> list[Problem]:
    """Reports unknown names, and trackers that are not installed; the keys start with `report_to`."""
    from transformers.integrations import integration_utils

    known, found = list(integration_utils.INTEGRATION_TO_CALLBACK), []
    for index, name in enumerate(names):
        key = ("report_to", index)
        if name in _ALL_OR_NONE:
            if len(names) > 1:
                found.append(Problem(f"'{name}' means all trackers or none", "name it alone", key))
        elif name not in known:
            found.append(Problem(f"transformers knows no tracker '{name}'", did_you_mean(name, known), key))
        elif not _is_installed(name):
            found.append(Problem(f"the tracker '{name}' is not installed", f"install {name}, or leave it out", key))
    return found


def _is_installed(name: str) -> bool:
    from transformers.integrations import integration_utils

    ask = getattr(integration_utils, f"is_{_ASKED_AS.get(name, name)}_available", None)
    return ask is None or bool(ask())
