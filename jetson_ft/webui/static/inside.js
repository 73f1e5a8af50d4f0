// The Inside tab: a form, and views that the script of jetson_ft/inside draws.
import { announce, language, onTabShown, request, send } from "./shell.js";

const page = () => document.getElementById("inside-page");
const form = () => document.getElementById("inside-form");
let draw, texts;

// Fetches the form and the drawing, once the tab is shown for the first time.
async function open() {
  if (!page()) {
    setTimeout(open, 50); // Gradio makes the tab's elements some time after the tab is chosen
    return;
  }
  if (form()) return;
  const { drawing } = page().dataset;
  try {
    const response = await request(`/live/${language}/inside`);
    const [html, script] = await Promise.all([response.text(), import(`${drawing}/inside.js`)]);
    if (form()) return;
    draw = script.draw;
    page().innerHTML = html;
  } catch (error) { // the tab tries again when it is shown again
    page().textContent = error.message;
    return;
  }
  const style = document.createElement("link");
  Object.assign(style, { rel: "stylesheet", href: `${drawing}/inside.css` });
  document.head.append(style);
  texts = JSON.parse(form().dataset.texts);
  form().addEventListener("submit", (event) => { event.preventDefault(); show(); });
  form().addEventListener("input", change);
  form().querySelectorAll("input[type=range]").forEach(showValue);
}

const showValue = (slider) => { slider.closest("label").querySelector("b").textContent = slider.value; };
const panel = () => form().elements.panel.value;
const fields = () => form().querySelector(`fieldset[data-panel="${panel()}"]`);

function change({ target }) {
  if (target.name === "panel") {
    form().querySelectorAll("fieldset[data-panel]").forEach((each) => {
      each.hidden = each.disabled = each !== fields();
    });
    document.getElementById("inside-views").replaceChildren();
    show();
  } else if (target.type === "range") {
    showValue(target);
    show();
  }
}

// What the form asks for: options of the views.
function options() {
  const values = {};
  const sampling = {};
  for (const { name, value, type } of fields().elements) {
    if (type === "range") sampling[name] = Number(value);
    else if (name === "examples") values.examples = pairs(value);
    else if (name && (value || name === "text")) values[name] = value;
  }
  if (Object.keys(sampling).length) values.sampling = sampling;
  return values;
}

// Lines `question = answer`; what has no `=` is left out.
const pairs = (text) => text.split("\n").filter((line) => line.includes("="))
  .map((line) => [line.slice(0, line.indexOf("=")).trim(), line.slice(line.indexOf("=") + 1).trim()]);

let running = false, wanted = null;

// Shows what the form asks for. While one question is answered, the newest other one waits.
async function show(changes = {}) {
  const views = form().querySelector("[name=panel]:checked").dataset.views.split(" ");
  wanted = { model: form().elements.model.value, panel: panel(), views, options: { ...options(), ...changes } };
  if (running) return;
  running = true;
  try {
    while (wanted) {
      const question = wanted;
      wanted = null;
      await answer(question);
    }
  } finally {
    running = false;
  }
}

let loaded = "";

async function answer({ model, panel: asked, views, options }) {
  const status = document.getElementById("inside-status"), error = document.getElementById("inside-error");
  status.textContent = loaded === model ? form().dataset.busy : form().dataset.loading;
  const drawn = [];
  for (const view of views) {
    try {
      const response = await send(`/inside/${view}`, { model, options: optionsOf(view, options) });
      drawn.push([view, await response.json()]);
    } catch ({ message }) {
      status.textContent = "";
      error.textContent = message;
      return;
    }
    loaded = model;
  }
  status.textContent = error.textContent = "";
  if (asked !== panel()) return; // another one has been chosen since
  const places = document.getElementById("inside-views");
  while (places.children.length < drawn.length) places.append(document.createElement("div"));
  drawn.forEach(([view, data], index) => draw(places.children[index], view, data, texts, show));
  announce(places.querySelector("h2")?.textContent ?? "");
}

// The options that a view takes. Attention is computed for one layer at a time.
function optionsOf(view, { layer, head, path, ...options }) {
  if (view === "attention" && layer !== undefined) options.layers = [layer];
  if (view === "attention_example") Object.assign(options, layer === undefined ? {} : { layer }, head === undefined ? {} : { head });
  if (view === "quantization" && path) options.path = path;
  return options;
}

onTabShown("inside", open);
