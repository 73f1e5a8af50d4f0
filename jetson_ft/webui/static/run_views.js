// The views of a run and the table of all runs: their forms, and the name edited in place.
import { refresh } from "./runs.js";
import { post } from "./shell.js";

// Puts a form's fields into the query of its panel, and has the panel fetched again.
function take(form) {
  const fields = Object.fromEntries(new FormData(form));
  form.closest("#run-view, #run-table").dataset.query = JSON.stringify(fields);
  refresh();
}

// Takes over a filter: what it leaves is shown from the first page on.
function filter(form) {
  form.querySelectorAll("[data-restart]").forEach((field) => (field.value = field.dataset.restart));
  take(form);
}

function set(form, name, value) {
  form.elements[name].value = value;
  take(form);
}

// Sorts the table: the first click upwards, the second downwards.
function sort(form, key) {
  const again = form.elements.sort.value === key && !form.elements.down.value;
  form.elements.down.value = again ? "1" : "";
  set(form, "sort", key);
}

// Shows the form of a run's name and notes in their place; `data-keep`: see morph.js.
function edit(button) {
  const place = button.closest(".run-name");
  const form = place.querySelector("form");
  form.reset();
  place.dataset.keep = "editing";
  form.elements.title.select();
}

function leave(form) {
  const place = form.closest(".run-name");
  delete place.dataset.keep;
  place.querySelector("[data-rename]").focus();
}

async function rename(form) {
  if (!(await post(form.dataset.run, "about", Object.fromEntries(new FormData(form))))) return;
  leave(form);
  refresh();
}

const formOf = (element) =>
  element.closest("#run-view, #run-table")?.querySelector("form[data-controls]");

let timer;
document.addEventListener("input", ({ target }) => {
  const form = target.closest("form[data-controls]");
  if (!form) return;
  clearTimeout(timer);
  timer = setTimeout(() => filter(form), target.type === "search" ? 250 : 0);
});
document.addEventListener("click", ({ target }) => {
  const button = target.closest("[data-set], [data-sort], [data-rename], [data-leave], [data-choose]");
  if (!button) return;
  const { set: name, sort: key } = button.dataset;
  if (button.dataset.choose) { // another run takes the place of the one that is edited
    document.querySelector(".run-name[data-keep]")?.removeAttribute("data-keep");
  } else if (name) set(formOf(button), name, button.value);
  else if (key) sort(formOf(button), key);
  else if ("rename" in button.dataset) edit(button);
  else leave(button.form);
});
document.addEventListener("submit", (event) => {
  const form = event.target;
  if (!form.matches("form[data-controls], form[data-name]")) return;
  event.preventDefault();
  if ("controls" in form.dataset) filter(form);
  else rename(form);
});
document.addEventListener("keydown", (event) => {
  const form = event.target.closest?.("form[data-name]");
  if (!form || event.isComposing) return; // Enter and Escape belong to the input method
  if (event.key === "Escape") leave(form);
  if (event.key === "Enter" && (event.ctrlKey || event.metaKey)) form.requestSubmit();
});
