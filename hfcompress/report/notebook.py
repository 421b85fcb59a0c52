"""A report that a notebook shows as a table."""

from __future__ import annotations

from html import escape
from typing import Any

from hfcompress.report.conditions import describe_conditions
from hfcompress.report.tables import format_cells, list_headings, render_markdown


class Report(dict[str, Any]):
    """The content of report.json as a mapping; a notebook shows it as a table."""

    @property
    def rows(self) -> list[dict[str, Any]]:
        """The measurements of each model, the source first: quality, sizes, latency, memory, energy."""
        return list(self["rows"])

    def to_pandas(self) -> Any:
        """Makes a pandas DataFrame of the table, with a row for each model."""
        import pandas as pd

        return pd.DataFrame(format_cells(self), columns=list_headings(self))

    def _repr_markdown_(self) -> str:
        return render_markdown(self) if self["rows"] else "no rows"

    def _repr_html_(self) -> str:
        if not self["rows"]:
            return "<p>no rows</p>"
        head = "".join(f"<th>{escape(text)}</th>" for text in list_headings(self))
        rows = ("".join(f"<td>{escape(text)}</td>" for text in row) for row in format_cells(self))
        body = "".join(f"<tr>{row}</tr>" for row in rows)
        note = f"<p>{escape(describe_conditions(self))}</p>"
        return f"<table><thead><tr>{head}</tr></thead><tbody>{body}</tbody></table>{note}"

    def __str__(self) -> str:
        return self._repr_markdown_()
