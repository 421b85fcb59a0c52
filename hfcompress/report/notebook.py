"""A report that a notebook shows as a table."""

from __future__ import annotations

from html import escape
from typing import Any

from hfcompress.report.report import as_markdown, cells, conditions, headings


class Report(dict[str, Any]):
    """The content of report.json; `rows` has one entry a model, the source first."""

    @property
    def rows(self) -> list[dict[str, Any]]:
        """One entry a model: quality, sizes, latency, memory, energy."""
        return list(self["rows"])

    def to_pandas(self) -> Any:
        """The table as a pandas DataFrame, with one row a model."""
        import pandas as pd

        return pd.DataFrame(cells(self), columns=headings(self))

    def _repr_markdown_(self) -> str:
        return as_markdown(self) if self["rows"] else "no rows"

    def _repr_html_(self) -> str:
        if not self["rows"]:
            return "<p>no rows</p>"
        head = "".join(f"<th>{escape(text)}</th>" for text in headings(self))
        body = "".join("<tr>" + "".join(f"<td>{escape(text)}</td>" for text in row) + "</tr>" for row in cells(self))
        note = f"<p>{escape(conditions(self))}</p>"
        return f"<table><thead><tr>{head}</tr></thead><tbody>{body}</tbody></table>{note}"

    def __str__(self) -> str:
        return self._repr_markdown_()
