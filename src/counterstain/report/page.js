"use strict";
// A click on a heading sorts its table by that column; a second click turns the order round.
for (const button of document.querySelectorAll("table.sortable thead button")) {
  button.addEventListener("click", () => sortBy(button.closest("th")));
}

function sortBy(heading) {
  const column = heading.cellIndex;
  const body = heading.closest("table").tBodies[0];
  const direction = heading.getAttribute("aria-sort") === "ascending" ? -1 : 1;
  for (const other of heading.parentElement.cells) other.removeAttribute("aria-sort");
  heading.setAttribute("aria-sort", direction === 1 ? "ascending" : "descending");
  const value = (row) => parseFloat(row.cells[column].dataset.value);
  const known = [...body.rows].filter((row) => !Number.isNaN(value(row)));
  const unknown = [...body.rows].filter((row) => Number.isNaN(value(row)));
  known.sort((a, b) => direction * (value(a) - value(b)));
  body.append(...known, ...unknown); // cells without a value stay at the end
}

// What is folded away on the screen belongs on paper.
addEventListener("beforeprint", () => {
  for (const details of document.querySelectorAll("details")) details.open = true;
});
