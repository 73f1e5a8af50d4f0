// The views of a run and the table of all runs: their forms, and the name edited in place.
import { post } from "./shell.js";

const queries = new Map();

// Returns what the form of a view has chosen, as a query.
export const viewQuery = (view) => queries.get(view) ?? "";

// Takes over a form's fields, and has the view fetched again.
function take(form) {
  queries.set(form.dataset.query, new URLSearchParams(new FormData(form)).toString());
  document.dispatchEvent(new CustomEvent("refresh-runs"));
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

function tick(form, name, isTicked) {
  const others = form.elements.compared.value.split("/").filter((each) => each && each !== name);
  set(form, "compared", (isTicked ? [...others, name] : others).join("/"));
}

// Puts a form into the place of a run's name.
function edit(button) {
  const place = button.closest(".run-name");
  place.append(place.querySelector("template").content.cloneNode(true));
  place.dataset.editing = "";
  const [title] = place.querySelector("form").elements;
  title.focus();
  title.select();
}

function leave(form) {
  const place = form.closest(".run-name");
  delete place.dataset.editing;
  form.remove();
  place.querySelector("[data-rename]").focus();
}

async function rename(form) {
  if (!(await post(form.dataset.run, "about", Object.fromEntries(new FormData(form))))) return;
  leave(form);
  document.dispatchEvent(new CustomEvent("refresh-runs"));
}

const formOf = (element) =>
  element.closest("#run-view, #run-table")?.querySelector("form[data-query]");

let timer;
document.addEventListener("input", ({ target }) => {
  const form = target.closest("form[data-query]");
  if (!form) return;
  clearTimeout(timer);
  timer = setTimeout(() => filter(form), target.type === "search" ? 250 : 0);
});
document.addEventListener("change", ({ target }) => {
  if (target.dataset.tick) tick(formOf(target), target.dataset.tick, target.checked);
});
document.addEventListener("click", ({ target }) => {
  const button = target.closest("[data-set], [data-sort], [data-rename], [data-leave]");
  if (!button) return;
  const { set: name, sort: key } = button.dataset;
  if (name) set(formOf(button), name, button.value);
  else if (key) sort(formOf(button), key);
  else if ("rename" in button.dataset) edit(button);
  else leave(button.form);
});
document.addEventListener("submit", (event) => {
  const form = event.target;
  if (!form.matches("form[data-query], form[data-name]")) return;
  event.preventDefault();
  if (form.dataset.query) filter(form);
  else rename(form);
});
document.addEventListener("keydown", (event) => {
  const form = event.target.closest?.("form[data-name]");
  if (!form || event.isComposing) return; // Enter and Escape belong to the input method
  if (event.key === "Escape") leave(form);
  if (event.key === "Enter" && (event.ctrlKey || event.metaKey)) form.requestSubmit();
});
