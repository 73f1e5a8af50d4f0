// The Runs tab: polls fragments, swaps changed ones, sends clicks.
import { confirmDialog, language, post } from "./shell.js";

const state = {
  chosen: new URLSearchParams(location.search).get("run") || "",
  compared: new Set(),
};
const etags = new Map();
const wanted = new Map();

const query = () => {
  const parameters = new URLSearchParams({ chosen: state.chosen });
  state.compared.forEach((name) => parameters.append("compared", name));
  return parameters.toString();
};

// Empties the detail; a request under way does not fill it again.
function clearDetail() {
  etags.delete("run-detail");
  wanted.delete("run-detail");
  document.getElementById("run-detail")?.replaceChildren();
}

// Replaces an element's content by a fragment, unless it has that fragment already.
async function swap(id, address) {
  const element = document.getElementById(id);
  if (!element) return;
  const known = etags.get(id);
  const headers = known && known.address === address ? { "If-None-Match": known.etag } : {};
  wanted.set(id, address);
  const response = await fetch(address, { headers, cache: "no-store" });
  if (response.status === 304 || wanted.get(id) !== address) return;
  if (!response.ok) {
    if (id === "run-detail" && response.status !== 429) clearDetail();
    return;
  }
  const html = await response.text();
  if (wanted.get(id) !== address) return; // another run has been chosen
  const active = document.activeElement;
  const forms = [...element.querySelectorAll(`form[data-run="${CSS.escape(state.chosen)}"]`)];
  const isField = active?.matches("input, textarea, select");
  if (isField && forms.some((form) => form.contains(active))) return; // not while it is edited
  // Each kind of details has one class of its own.
  const open = [...element.querySelectorAll("details[open]")].map((one) => one.className);
  element.innerHTML = html;
  open.forEach((name) => element.querySelector(`details.${name}`)?.setAttribute("open", ""));
  // Keep what is typed or chosen and not sent, and the focus of the keyboard.
  forms.filter((form) => "changed" in form.dataset).forEach((form) => {
    element.querySelector(`form[data-post="${form.dataset.post}"]`)?.replaceWith(form);
  });
  if (active?.id && active !== document.activeElement) document.getElementById(active.id)?.focus();
  etags.set(id, { address, etag: response.headers.get("ETag") });
}

async function refresh() {
  if (document.hidden) return;
  try {
    await swap("run-list", `/live/${language}/runs?${query()}`);
    const first = document.querySelector("#run-list [data-choose]");
    if (!state.chosen && first) {
      choose(first.dataset.choose); // refreshes again, to mark it as chosen
      return;
    }
    if (state.chosen) {
      await swap("run-detail", `/live/${language}/runs/${encodeURIComponent(state.chosen)}?${query()}`);
    } else clearDetail();
    document.body.classList.remove("away");
  } catch {
    document.body.classList.add("away"); // no server: keep what is shown
  }
}

// Acts on the run that the button belongs to, even where another has been chosen since.
async function act(button) {
  const { run, do: action } = button.dataset;
  button.disabled = true;
  if (!(await post(run, action))) button.disabled = false;
  else if (action === "delete" && state.chosen === run) state.chosen = "";
  refresh();
}

async function submit(form) {
  const { run, post: action } = form.dataset;
  if (await post(run, action, Object.fromEntries(new FormData(form)))) delete form.dataset.changed;
  refresh();
}

function choose(name) {
  state.chosen = name;
  state.compared.delete(name);
  const address = new URL(location.href);
  address.searchParams.set("run", name);
  history.replaceState(null, "", address);
  refresh();
}

document.addEventListener("click", async (event) => {
  const button = event.target.closest("[data-choose], [data-do]");
  if (!button) return;
  const { choose: name, sure } = button.dataset;
  if (name) choose(name);
  else if (!sure || (await confirmDialog(sure, button.textContent))) act(button);
});
document.addEventListener("input", (event) => {
  const form = event.target.closest("form[data-post]");
  if (form) form.dataset.changed = "";
});
document.addEventListener("submit", (event) => {
  if (!event.target.matches("form[data-post]")) return;
  event.preventDefault();
  document.activeElement?.blur();
  submit(event.target);
});
document.addEventListener("change", (event) => {
  const name = event.target.dataset && event.target.dataset.compared;
  if (!name) return;
  event.target.checked ? state.compared.add(name) : state.compared.delete(name);
  refresh();
});
document.addEventListener("visibilitychange", refresh);

window.jetsonFt = { ...window.jetsonFt, choose };
refresh();
setInterval(refresh, 2500);
