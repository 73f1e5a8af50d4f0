// The Train tab's form: the chosen recipe, what differs from it, mistakes, and the draft.
// What the server knows of the form is in `data-form` of the recipe cards (tabs/train_goal.py).

const DRAFT = "jetson-ft-draft";
// They describe the user's rows: another recipe leaves them as they are.
const ROWS = /^data\.(train|heldout|format|encoding|on_invalid|columns\..*)$/;

let form = null;
let values = {}; // of the fields, by key, as Gradio last had them
let chosen = null; // { name, title, values }: what the fields are compared with
let pending = {}; // values that the next `formApply` puts into the fields
const mistakes = new Map(); // key -> message
let refused = false; // whether the mistakes are those of Start, for the fields as they are

const block = (key) => document.getElementById(`field-${key.replaceAll(".", "-")}`);
const same = (one, other) => String(one ?? "") === String(other ?? "");
const fill = (text, fields) => text.replace(/{(\w+)}/g, (_, name) => fields[name]);

function recipe(name) {
  return { name, ...form.recipes[name] };
}

// Returns whether rows are the user's: of no shipped recipe.
function isOwnData(rows) {
  return Object.values(form.recipes).every((other) => other.values["data.train"] !== rows);
}

// Returns the form's rows. Gradio draws an upload some time before it calls `formChanged`, so the
// field itself is read.
function currentRows() {
  return block("data.train")?.querySelector("textarea, input")?.value ?? values["data.train"];
}

// Gradio sets a field's value only as the result of an event: `formApply` is that of a hidden button.
export function setFields(changes) {
  pending = { ...pending, ...changes };
  document.getElementById("form-apply").click();
}

function formApply() {
  const changes = pending;
  pending = {};
  values = { ...values, ...changes };
  Object.keys(changes).forEach((key) => mistakes.delete(key));
  refused = false;
  refresh();
  return [chosen.name, ...form.order.map((key) => changes[key])]; // undefined: unchanged
}

function choose(next, keepsRows) {
  chosen = next;
  mistakes.clear();
  const keys = form.order.filter((key) => !(keepsRows && ROWS.test(key)));
  setFields(Object.fromEntries(keys.map((key) => [key, next.values[key]])));
}

function notice(text) {
  document.getElementById("goal-notice").textContent = text;
}

function chooseShipped(name) {
  values["data.train"] = currentRows();
  const keepsRows = isOwnData(values["data.train"]);
  choose(recipe(name), keepsRows);
  notice(keepsRows ? keptRows() : "");
}

const keptRows = () => fill(form.texts.kept, { data: dataNames() });

// Returns the names of the user's files, without their folders.
function dataNames() {
  const names = String(values["data.train"]).replace(/[[\]{}'"]|source:|(share|rows): [\d.]+/g, "");
  return names.split(/[,，\n]/).map((name) => name.trim().split("/").pop()).filter(Boolean).join(", ");
}

// Once, when the tab is drawn: the fields' values come as they are; those of the draft go back.
function formLoad(fits, loaded, ...now) {
  form = JSON.parse(document.getElementById("recipes").dataset.form);
  unfolding.observe(document.getElementById("decisions"), { childList: true, subtree: true });
  formFits(fits);
  values = Object.fromEntries(form.order.map((key, place) => [key, now[place]]));
  chosen = recipe(form.first);
  pending = { ...chosen.values, ...readDraft() };
  const result = formApply();
  formLoaded(loaded);
  return result;
}

// Gradio's own event of a load can come before this script, and before the tab is drawn.
const waiting = setInterval(() => {
  if (form) clearInterval(waiting);
  else if (document.getElementById("recipes")) document.getElementById("form-load")?.click();
}, 50);

function readDraft() {
  try {
    const draft = JSON.parse(localStorage.getItem(DRAFT));
    if (!draft) return {};
    if (form.recipes[draft.name]) chosen = recipe(draft.name);
    else if (draft.base) chosen = { name: draft.name, title: draft.title, values: draft.base };
    // Of another version of the program, a key or its type may be gone.
    const fits = ([key, value]) =>
      key in chosen.values && (value === null || chosen.values[key] === null ||
        typeof value === typeof chosen.values[key]);
    return { ...chosen.values, ...Object.fromEntries(Object.entries(draft.values).filter(fits)) };
  } catch {
    return {};
  }
}

function writeDraft() {
  const changed = form.order.filter((key) => !same(values[key], chosen.values[key]));
  try {
    if (!changed.length && chosen.name === form.first) return localStorage.removeItem(DRAFT);
    const draft = { name: chosen.name, title: chosen.title,
      values: Object.fromEntries(changed.map((key) => [key, values[key]])) };
    if (!form.recipes[chosen.name]) draft.base = chosen.values;
    localStorage.setItem(DRAFT, JSON.stringify(draft));
  } catch { /* a browser that stores nothing */ }
}

// Gradio calls it after a change of any field, with the values of all.
function formChanged(...now) {
  if (!form) return;
  form.order.forEach((key, place) => {
    if (same(values[key], now[place])) return;
    values[key] = now[place];
    mistakes.delete(key);
    refused = false;
  });
  refresh();
}

// An uploaded recipe, or a run's.
function formLoaded(text) {
  if (!text || !form) return; // `formLoad` gets it
  const { title, values: base } = JSON.parse(text);
  const address = new URL(location.href);
  const isRun = address.searchParams.has("copy");
  values["data.train"] = currentRows();
  const keepsRows = !isRun && isOwnData(values["data.train"]) && !isOwnData(base["data.train"]);
  choose({ name: title, title, values: base }, keepsRows);
  const texts = [fill(form.texts.loaded, { title }), ...(keepsRows ? [keptRows()] : [])];
  notice(texts.join(" "));
  address.searchParams.delete("copy"); // else a reload would put it in the draft's place
  history.replaceState(null, "", address);
}

function formMistakes(text) {
  const marks = JSON.parse(text);
  if (refused && !marks.focus) return; // a plan, which checks less than Start
  mistakes.clear();
  Object.entries(marks.mistakes).forEach(([key, message]) => mistakes.set(key, message));
  refused = marks.focus && mistakes.size > 0;
  refresh();
  const first = form.order.find((key) => mistakes.has(key));
  if (marks.focus && first) visit(first);
}

function formFits(text) {
  if (!form) return; // `formLoad` gets them
  for (const [name, fit] of Object.entries(JSON.parse(text || "{}"))) {
    const card = document.querySelector(`.recipe input[value="${name}"]`)?.closest(".recipe");
    if (!card) continue;
    const badge = card.querySelector("[data-fit]");
    [badge.textContent, badge.title, badge.dataset.fit] = [fit.badge, fit.memory, fit.style];
    card.querySelector("[data-time]").textContent = fit.time;
  }
}

// --- what is drawn ------------------------------------------------------------------------------

let drawing = 0;
function refresh() {
  writeDraft();
  cancelAnimationFrame(drawing);
  drawing = requestAnimationFrame(draw);
}

function draw() {
  if (!form || !document.getElementById("recipes")) return;
  drawCards();
  form.order.forEach(drawField);
  for (const group of document.querySelectorAll("[id^=group-]")) {
    const keys = form.order.filter((key) => form.groups[key] === group.id);
    const count = keys.filter((key) => !same(values[key], chosen.values[key])).length;
    const button = group.querySelector("button");
    const title = button.querySelector("span");
    if (count) title.dataset.changed = fill(form.texts.changed, { count });
    else delete title.dataset.changed;
    button.setAttribute("aria-expanded", isOpen(group));
  }
  const wrong = form.order.filter((key) => mistakes.has(key));
  const links = wrong.map((key) => {
    const link = document.createElement("button");
    [link.type, link.dataset.visit, link.textContent] = ["button", key, form.labels[key]];
    return link;
  });
  const box = document.getElementById("attention");
  const text = wrong.length ? fill(form.texts.attention, { count: wrong.length }) : "";
  const shown = JSON.stringify([text, wrong]);
  if (box.dataset.shown === shown) return;
  box.dataset.shown = shown;
  box.replaceChildren(text, ...links);
}

function drawCards() {
  const first = document.getElementById("first-recipes");
  const other = first.querySelector(".own");
  if (form.recipes[chosen.name]) other?.remove();
  else if (other?.querySelector("input").value !== chosen.name) {
    other?.remove();
    const card = first.querySelector(".recipe").cloneNode(true);
    card.classList.add("own");
    card.querySelector("input").value = chosen.name;
    card.querySelectorAll("span").forEach((span) => span.replaceChildren());
    card.querySelector("b").textContent = chosen.title;
    first.prepend(card);
  }
  for (const input of document.querySelectorAll(".recipe input")) {
    input.checked = input.value === chosen.name;
    if (input.checked && input.closest("details")) input.closest("details").open = true;
  }
  const touched = localStorage.getItem(DRAFT) !== null;
  document.getElementById("start-over").hidden = !touched;
}

function drawField(key) {
  const place = block(key);
  if (!place) return;
  const changed = !same(values[key], chosen.values[key]);
  place.toggleAttribute("data-changed", changed);
  drawReset(place, key, changed);
  const message = mistakes.get(key);
  let text = place.querySelector(":scope > .mistake");
  const input = place.querySelector("input, textarea");
  if (!message) {
    text?.remove();
    input?.removeAttribute("aria-invalid");
    input?.removeAttribute("aria-describedby");
    return;
  }
  if (!text) {
    text = document.createElement("p");
    text.className = "mistake";
    text.id = `${place.id}-mistake`;
    place.insertBefore(text, place.querySelector(":scope > .reset"));
  }
  if (text.textContent !== message) text.textContent = message;
  input?.setAttribute("aria-invalid", "true");
  input?.setAttribute("aria-describedby", text.id);
}

function drawReset(place, key, changed) {
  let button = place.querySelector(":scope > .reset");
  if (!changed) return button?.remove();
  const base = chosen.values[key];
  const value = same(base, "") ? form.texts.empty : form.texts[base] ?? String(base);
  const label = fill(form.texts.reset, { value });
  if (!button) {
    button = document.createElement("button");
    [button.type, button.className, button.dataset.reset] = ["button", "reset", key];
    place.append(button);
  }
  if (button.textContent === label) return;
  button.textContent = label;
  button.setAttribute("aria-label", `${form.labels[key]}: ${label}`);
}

const isOpen = (group) =>
  group.querySelector("[data-testid=accordion-content]")?.style.display !== "none";

// Moves the focus to a field; unfolds its group first.
async function visit(key) {
  const group = document.getElementById(form.groups[key] ?? "");
  if (group && !isOpen(group)) group.querySelector("button").click();
  for (let tries = 0; tries < 50 && group && !block(key)?.offsetParent; tries += 1) {
    await new Promise((done) => setTimeout(done, 20)); // Gradio makes the fields when it unfolds
  }
  draw();
  const place = block(key)?.offsetParent ? block(key) : document.getElementById("decision-data");
  place.scrollIntoView({ block: "center" });
  place.querySelector("input:not([type=file]), textarea, button")?.focus({ preventScroll: true });
}

document.addEventListener("change", (event) => {
  if (event.target.name === "recipe" && form.recipes[event.target.value]) {
    chooseShipped(event.target.value);
  }
});

document.addEventListener("click", (event) => {
  const button = event.target.closest("[data-reset], [data-visit], #start-over, .group > button");
  if (!button || !form) return;
  if (button.closest(".group > .label-wrap")) return setTimeout(refresh); // Gradio unfolds it first
  const { reset, visit: key } = button.dataset;
  if (reset) {
    setFields({ [reset]: chosen.values[reset] });
    block(reset).querySelector("input, textarea").focus();
  } else if (key) visit(key);
  else {
    choose(recipe(form.first), false);
    notice("");
  }
});

// Fields appear when their group is unfolded.
const unfolding = new MutationObserver((records) => {
  if (records.some((record) => [...record.addedNodes].some(
    (node) => node.nodeType === 1 && (node.matches("[id^=field-]") || node.querySelector("[id^=field-]")),
  ))) refresh();
});

window.jetsonFt = {
  ...window.jetsonFt, formLoad, formApply, formChanged, formLoaded, formMistakes, formFits, setFields,
};
