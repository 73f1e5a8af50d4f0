// The Train tab.

// --- data and summary: the plan, the rows, settings that a button applies ----------------------

const PLAN_DELAY = 1000; // ms after the last change
let planTimer;

function planSoon(delay = PLAN_DELAY) {
  document.getElementById("plan")?.classList.add("stale");
  clearTimeout(planTimer);
  planTimer = setTimeout(() => document.getElementById("plan-by-itself")?.click(), delay);
}

// Puts a text into a hidden box, whose event reaches the server; the end makes equal ones differ.
function send(id, text) {
  const box = document.querySelector(`#${id} textarea, #${id} input`);
  box.value = text;
  box.dispatchEvent(new Event("input", { bubbles: true }));
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
  if (settings) send("remedy", `${settings}\n${Date.now()}`);
  else if (plan !== undefined) {
    document.getElementById("plan").classList.add("stale");
    document.getElementById("plan-by-hand").click();
  } else if (sourceRemove !== undefined) {
    send("data-action", JSON.stringify({ do: "remove", source: +sourceRemove, at: Date.now() }));
  } else if (rowsTurn) turnRows(button.closest(".rows"), +rowsTurn);
});

document.addEventListener("change", (event) => {
  const { sourceShare, rowsTokens } = event.target.dataset;
  if (sourceShare !== undefined) {
    const percent = event.target.value;
    send("data-action", JSON.stringify({ do: "share", source: +sourceShare, percent, at: Date.now() }));
  } else if (rowsTokens !== undefined) {
    const shown = event.target.checked;
    for (const sample of event.target.closest(".rows").querySelectorAll(".sample")) {
      sample.querySelector(".turns").hidden = shown;
      sample.querySelector(".tokens").hidden = !shown;
    }
  }
});

// The plan is new: no longer stale.
new MutationObserver((changes) => {
  const plan = document.getElementById("plan");
  if (plan && changes.some(({ target }) => target !== plan && plan.contains(target))) {
    plan.classList.remove("stale");
  }
}).observe(document.body, { childList: true, subtree: true });

window.jetsonFt = Object.assign(window.jetsonFt ?? {}, { planSoon: () => planSoon() });
