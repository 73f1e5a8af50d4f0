// The Train tab's rows, plan, and settings that a button applies.
const PLAN_DELAY = 1000; // ms after the last change
let planTimer = 0;
let plansAsked = 0;
let sent = ""; // for the next event of a hidden button

function click(id) {
  document.getElementById(id).click();
}

function askPlan(button) {
  clearTimeout(planTimer);
  planTimer = 0;
  plansAsked += 1;
  click(button);
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

// Clicks a hidden button; its event passes the text to the server in the place of its first input.
function send(id, text) {
  sent = text;
  click(id);
}

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
  if (settings) send("apply-settings", settings);
  else if (plan !== undefined) {
    document.body.dataset.plan = "stale";
    askPlan("plan-by-hand");
  } else if (sourceRemove !== undefined) {
    send("data-action", JSON.stringify({ do: "remove", source: +sourceRemove }));
  } else if (rowsTurn) turnRows(button.closest(".rows"), +rowsTurn);
});

document.addEventListener("change", (event) => {
  const { sourceShare, rowsTokens } = event.target.dataset;
  if (sourceShare !== undefined) {
    const percent = event.target.value;
    send("data-action", JSON.stringify({ do: "share", source: +sourceShare, percent }));
  } else if (rowsTokens !== undefined) {
    const shown = event.target.checked;
    for (const sample of event.target.closest(".rows").querySelectorAll(".sample")) {
      sample.querySelector(".turns").hidden = shown;
      sample.querySelector(".tokens").hidden = !shown;
    }
  }
});

window.jetsonFt = Object.assign(window.jetsonFt ?? {}, {
  planSoon, planned, withSent: (_first, ...others) => [sent, ...others],
});
