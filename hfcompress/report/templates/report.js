"use strict";

// Tables: a click on a heading sorts by it, a second click turns the order around.
function sortRows(table, column, ascending) {
  const sign = ascending ? 1 : -1;
  const value = (row) => {
    const cell = row.cells[column];
    return "value" in cell.dataset ? Number(cell.dataset.value) : cell.textContent.trim();
  };
  const missing = (key) => key === "-" || key === "";
  const body = table.tBodies[0];
  const rows = [...body.rows].map((row) => [value(row), row]);
  rows.sort(([a], [b]) => {
    if (missing(a) || missing(b)) return missing(a) - missing(b);
    if (typeof a === "number" && typeof b === "number") return sign * (a - b);
    return sign * String(a).localeCompare(String(b), undefined, { numeric: true });
  });
  body.append(...rows.map(([, row]) => row));
}

for (const table of document.querySelectorAll("table.sortable")) {
  const headings = [...table.tHead.rows[0].cells];
  headings.forEach((heading, column) => {
    heading.querySelector("button").addEventListener("click", () => {
      const ascending = heading.getAttribute("aria-sort") !== "ascending";
      for (const other of headings) other.setAttribute("aria-sort", "none");
      heading.setAttribute("aria-sort", ascending ? "ascending" : "descending");
      sortRows(table, column, ascending);
    });
  });
}

// Points: their figures are shown beside them. Without this script the browser shows the title of each point.
const tip = document.getElementById("tip");
function showTip(point, text) {
  tip.textContent = text;
  tip.hidden = false;
  const mark = point.querySelector(".reach").getBoundingClientRect();
  const most = document.documentElement.clientWidth - tip.offsetWidth - 8;
  tip.style.left = `${Math.max(8, Math.min(mark.left + mark.width / 2 - tip.offsetWidth / 2, most)) + scrollX}px`;
  const above = mark.top - tip.offsetHeight - 6;
  tip.style.top = `${(above > 0 ? above : mark.bottom + 6) + scrollY}px`;
}
function hideTip() {
  tip.hidden = true;
}
for (const point of document.querySelectorAll(".point")) {
  const title = point.querySelector("title");
  const text = title.textContent;
  title.remove();
  for (const event of ["pointerenter", "focus"]) point.addEventListener(event, () => showTip(point, text));
  for (const event of ["pointerleave", "blur"]) point.addEventListener(event, hideTip);
}
document.addEventListener("keydown", (event) => {
  if (event.key === "Escape") hideTip();
});

// The report itself is part of the page.
const save = document.getElementById("save");
save.hidden = false;
save.addEventListener("click", () => {
  const content = JSON.stringify(JSON.parse(document.getElementById("data").textContent), null, 2);
  const link = document.createElement("a");
  link.href = URL.createObjectURL(new Blob([content + "\n"], { type: "application/json" }));
  link.download = "report.json";
  link.click();
  URL.revokeObjectURL(link.href);
});
