"use strict";
const table = document.querySelector("table");
const body = table.tBodies[0];
const rows = [...body.rows];
const sorters = [...table.tHead.querySelectorAll("button")];
const filters = [...document.querySelectorAll(".counts button")];
const status = document.querySelector("[role=status]");

function value(row, column) {
  const text = row.cells[column].dataset.value;
  return sorters[column].dataset.kind === "number" ? (text === "" ? null : Number(text)) : text;
}

function compare(a, b, sign) {
  // What was not measured comes last, whichever way the others are sorted.
  if (a === null || b === null) return (a === null) - (b === null);
  return sign * (typeof a === "number" ? a - b : a.localeCompare(b, "en", { numeric: true }));
}

function sort(column) {
  const heading = sorters[column].closest("th");
  const now = heading.getAttribute("aria-sort");
  const first = sorters[column].dataset.first;
  const order = now === "none" ? first : now === "ascending" ? "descending" : "ascending";
  const sign = order === "ascending" ? 1 : -1;
  for (const button of sorters) button.closest("th").setAttribute("aria-sort", "none");
  heading.setAttribute("aria-sort", order);
  rows.sort((a, b) => compare(value(a, column), value(b, column), sign));
  body.append(...rows);
}

function filter(chosen) {
  const kind = chosen.getAttribute("aria-pressed") === "true" ? null : chosen.dataset.kind;
  for (const button of filters) button.setAttribute("aria-pressed", String(button.dataset.kind === kind));
  for (const row of rows) row.hidden = kind !== null && row.dataset.kind !== kind;
  const shown = rows.filter((row) => !row.hidden).length;
  status.textContent = kind === null ? `All ${rows.length} models` : `${shown} of ${rows.length} models`;
}

sorters.forEach((button, column) => button.addEventListener("click", () => sort(column)));
filters.forEach((button) => button.addEventListener("click", () => filter(button)));
for (const button of [...sorters, ...filters]) button.disabled = false;
