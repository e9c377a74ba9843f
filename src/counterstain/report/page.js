"use strict";

// A click on a heading sorts its table by that column; a second click turns the order round. The headings are buttons,
// so the keyboard does the same.
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

// A copier copies the text of what stands beside it.
for (const button of document.querySelectorAll("button.copier")) {
  button.addEventListener("click", async () => {
    const source = button.nextElementSibling;
    const said = button.textContent;
    button.textContent = (await copied(source)) ? "Copied" : "Selected: press Ctrl+C";
    setTimeout(() => { button.textContent = said; }, 2000);
  });
}

async function copied(source) {
  getSelection().selectAllChildren(source);
  try {
    await navigator.clipboard.writeText(source.innerText);
    return true;
  } catch { // an old browser, or a page that may not
    return document.execCommand("copy");
  }
}

// The gallery shows the patches that fit all choices.
const gallery = document.getElementById("gallery");
if (gallery) {
  const choices = gallery.querySelector(".filters");
  const patches = [...gallery.querySelectorAll(".patches > li")];
  const filter = () => {
    const wanted = [...new FormData(choices)].filter(([, value]) => value);
    let shown = 0;
    for (const patch of patches) {
      patch.hidden = !wanted.every(([name, value]) => patch.dataset[name].split("|").includes(value));
      if (!patch.hidden) shown += 1;
    }
    choices.querySelector("output").textContent = `${shown} ${shown === 1 ? "patch" : "patches"}`;
  };
  choices.addEventListener("change", filter);
  choices.addEventListener("submit", (event) => event.preventDefault());
  filter(); // browsers keep choices over a reload
  const known = JSON.parse(document.getElementById("pictures").textContent);
  const byNumber = new Map(known.pictures.map((picture) => [picture.number, picture]));
  gallery.querySelector(".patches").addEventListener("click", (event) => {
    const button = event.target.closest("button");
    if (button) show(byNumber.get(Number(button.dataset.number)), byNumber, known.colours);
  });
}

function show(picture, byNumber, colours) {
  const dialog = document.getElementById("patch");
  const real = byNumber.get(picture.source);
  const image = (number) => gallery.querySelector(`[data-number="${number}"] img`).src;
  const views = [[picture.method, image(picture.number)], ["its labels", picture.mask]];
  if (picture !== real) views.push(["real", image(real.number)], ["real labels", real.mask]);
  dialog.querySelector(".views").replaceChildren(...views.map(([name, source]) => view(name, source)));
  const facts = { Slide: picture.slide, Patient: picture.patient, Region: picture.region,
    Place: `x ${picture.x_px}, y ${picture.y_px} px` };
  if (picture !== real) facts["Images drawn"] = picture.attempts;
  dialog.querySelector(".facts").replaceChildren(...Object.entries(facts).map(([name, value]) =>
    element("div", {}, element("dt", {}, name), element("dd", {}, String(value)))));
  dialog.querySelector("tbody").replaceChildren(...picture.labels.map(([before, after, area]) =>
    element("tr", {}, labelCell(before, colours), labelCell(after, colours), element("td", {}, area.toLocaleString("en")))));
  dialog.showModal();
}

function view(name, source) {
  return element("figure", {}, element("img", { src: source, alt: name }), element("figcaption", {}, name));
}

function labelCell(name, colours) {
  const chip = element("i", { className: "chip" });
  chip.style.background = colours[name] ?? "#fff";
  return element("td", {}, chip, name);
}

function element(tag, properties, ...children) {
  const made = Object.assign(document.createElement(tag), properties);
  made.append(...children);
  return made;
}

// What is folded away on the screen belongs on paper, but for what is there to be copied.
addEventListener("beforeprint", () => {
  for (const details of document.querySelectorAll("details:not(.copy)")) details.open = true;
});
