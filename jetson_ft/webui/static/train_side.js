// The Train tab's rows, plan, and settings that a button applies.
import { shownTab } from "./shell.js";
import { setFields } from "./train_form.js";

const PLAN_DELAY = 1000; // ms after the last change
const WAIT_DELAY = 5000; // ms between two looks whether a run still trains
let planTimer = 0;
let plansAsked = 0;
const actions = []; // what a person did with the list of sources; the first is under way

function askPlan(button) {
  clearTimeout(planTimer);
  planTimer = 0;
  plansAsked += 1;
  document.getElementById(button).click();
}

function planSoon() {
  document.body.dataset.plan = "stale";
  clearTimeout(planTimer);
  planTimer = setTimeout(() => askPlan("plan-by-itself"), PLAN_DELAY);
}

function planned() {
  plansAsked -= 1;
  if (!plansAsked && !planTimer) delete document.body.dataset.plan;
}

// A plan that waits for a training run comes by itself when that has ended.
setInterval(() => {
  const waits = document.querySelector("[data-plan-waits]") && shownTab() === "train";
  if (waits && !planTimer && !plansAsked) askPlan("plan-by-itself");
}, WAIT_DELAY);

// Sets the fields of `KEY: VALUE, KEY: VALUE`.
function applySettings(settings) {
  const pairs = settings.split(", ").map((part) => part.split(": "));
  setFields(Object.fromEntries(pairs.map(([key, value]) => [key, isNaN(value) ? value : +value])));
}

// Clicks a hidden button; `withSent` puts the action into the place of its first input. One after
// the other: each changes what the one before it has left.
function changeSources(action) {
  actions.push(JSON.stringify(action));
  if (actions.length === 1) document.getElementById("data-action").click();
}

function sourcesChanged() {
  actions.shift();
  if (actions.length) document.getElementById("data-action").click();
}

// Gradio replaces the command after each change: what is unfolded stays so.
const folds = () => [...document.querySelectorAll("details.command, .command details")];
let unfolded = [];
function commandDrawn() {
  folds().forEach((fold, place) => { fold.open = unfolded[place] ?? false; });
}
document.addEventListener("toggle", (event) => {
  if (event.target.closest(".command")) unfolded = folds().map((fold) => fold.open);
}, true);

function turnRows(section, by) {
  const samples = [...section.querySelectorAll(".sample")];
  const pages = Math.ceil(samples.length / 5);
  const now = Math.floor(samples.findIndex((sample) => !sample.hidden) / 5) + by;
  samples.forEach((sample, index) => (sample.hidden = Math.floor(index / 5) !== now));
  section.querySelector("[data-rows-place]").textContent = `${now + 1} / ${pages}`;
  const [earlier, later] = section.querySelectorAll("[data-rows-turn]");
  earlier.disabled = now === 0;
  later.disabled = now === pages - 1;
}

document.addEventListener("click", (event) => {
  const button = event.target.closest("button");
  if (!button) return;
  const { settings, plan, sourceRemove, rowsTurn } = button.dataset;
  if (settings) applySettings(settings);
  else if (plan !== undefined) {
    document.body.dataset.plan = "stale";
    askPlan("plan-by-hand");
  } else if (sourceRemove !== undefined) {
    changeSources({ do: "remove", source: sourceRemove });
  } else if (rowsTurn) turnRows(button.closest(".rows"), +rowsTurn);
});

document.addEventListener("change", (event) => {
  const { sourceShare, rowsTokens } = event.target.dataset;
  if (sourceShare !== undefined) {
    const percent = event.target.value;
    changeSources({ do: "share", source: sourceShare, percent });
  } else if (rowsTokens !== undefined) {
    const shown = event.target.checked;
    for (const sample of event.target.closest(".rows").querySelectorAll(".sample")) {
      sample.querySelector(".turns").hidden = shown;
      sample.querySelector(".tokens").hidden = !shown;
    }
  }
});

window.jetsonFt = {
  ...window.jetsonFt, planSoon, planned, sourcesChanged, commandDrawn,
  withSent: (_first, ...others) => [actions[0], ...others],
};
