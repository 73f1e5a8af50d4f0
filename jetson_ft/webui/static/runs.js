// The Runs tab: fetches the fragments that are shown, changes what differs, sends clicks.
import { morph } from "./morph.js";
import { confirmDialog, language, moveByKey, onTabShown, post, shownTab } from "./shell.js";

const MAX_DRAWN = 6; // runs drawn together: the number of colours
const SECONDS = 2.5; // between two refreshes
const state = {
  chosen: "", // run
  drawn: [], // runs drawn together, each at the place of its colour; "" is a free colour
  compared: [], // those of them that a person has chosen to compare
  view: "overview",
  sort: "newest",
  filter: "",
  table: false,
  ...JSON.parse(sessionStorage.getItem("jetson-ft-runs") || "{}"),
};
const asked = new URLSearchParams(location.search).get("run");
const fragments = new Map(); // id of an element -> { address, etag }
const wanted = new Map(); // id of an element -> address of the request whose answer it gets
let charts; // the module that draws them, once one is needed
let isUndrawn = false; // the view has charts that have not been drawn since it changed

const byId = (id) => document.getElementById(id);
const isShown = () => shownTab() === "runs" && byId("run-page") !== null;

function save() {
  sessionStorage.setItem("jetson-ft-runs", JSON.stringify(state));
}

function query(parameters) {
  const all = new URLSearchParams(parameters);
  state.drawn.forEach((name) => all.append("drawn", name));
  return all.toString();
}

// Fetches a fragment into its element, unless the element has it. Returns the status: 200 where the
// element has changed, 0 where the answer is not wanted any more.
async function swap(id, address) {
  const element = byId(id);
  if (!element) return 0;
  const known = element.childElementCount ? fragments.get(id) : undefined;
  const headers = known?.address === address ? { "If-None-Match": known.etag } : {};
  wanted.set(id, address);
  const response = await fetch(address, { headers, cache: "no-store" }).catch(() => null);
  document.body.classList.toggle("away", !response); // no server: keep what is shown
  if (!response || wanted.get(id) !== address) return 0;
  if (response.status !== 200) return response.status;
  const html = await response.text();
  if (wanted.get(id) !== address) return 0;
  morph(element, html);
  // A part that is being edited has kept its old content: it is fetched again afterwards.
  const isWhole = !element.querySelector('[data-keep="editing"]');
  fragments.set(id, { address, etag: isWhole ? response.headers.get("ETag") : "" });
  element.dispatchEvent(new CustomEvent("fragment", { bubbles: true }));
  return 200;
}

function clear(...ids) {
  ids.forEach((id) => {
    wanted.delete(id); // a request under way does not fill it again
    fragments.delete(id);
    byId(id)?.replaceChildren();
  });
}

// The parameters that a view's own controls have set: `data-query` of its element, as JSON.
const ownQuery = (id) => JSON.parse(byId(id).dataset.query || "{}");

export async function refresh() {
  if (!isShown()) return;
  byId("run-page").classList.toggle("as-table", state.table);
  byId("run-table").hidden = !state.table;
  byId("runs-table").setAttribute("aria-pressed", state.table);
  if (!state.table) return refreshRuns();
  const table = query({ compared: state.compared.join("/"), ...ownQuery("run-table"), view: "table" });
  return swap("run-table", `/live/${language}/runs?${table}`);
}

async function refreshRuns() {
  const listed = query({ chosen: state.chosen, sort: state.sort, filter: state.filter });
  const list = swap("run-list", `/live/${language}/runs?${listed}`);
  if (!state.chosen) {
    await list;
    if (state.chosen) return; // by a person, meanwhile
    const first = document.querySelector("#run-list [data-choose]");
    if (first) choose(first.dataset.choose);
    else clear("run-head", "run-view");
    return;
  }
  const run = `/live/${language}/runs/${encodeURIComponent(state.chosen)}`;
  byId("run-view").setAttribute("aria-labelledby", `view-${state.view}`);
  const [status, view] = await Promise.all([
    swap("run-head", `${run}/head?view=${state.view}`),
    swap("run-view", `${run}?${query({ ...ownQuery("run-view"), view: state.view })}`),
    list,
  ]);
  if (status === 404 || status === 422) { // deleted; the next refresh shows another one
    clear("run-head", "run-view");
    forget(state.chosen);
    return;
  }
  if (view === 200) isUndrawn = byId("run-view").querySelector(".plot") !== null;
  if (isUndrawn) {
    charts ??= import("./charts.js");
    isUndrawn = !(await (await charts).draw(byId("run-view"), state.view, state.chosen, state.drawn));
  }
}

// Gives a run the first free colour; returns false where there is none.
function draw(name) {
  if (state.drawn.includes(name)) return true;
  const free = state.drawn.indexOf("");
  if (free >= 0) state.drawn[free] = name;
  else if (state.drawn.length < MAX_DRAWN) state.drawn.push(name);
  else return false;
  return true;
}

function release(name) {
  state.drawn = state.drawn.map((drawn) => (drawn === name ? "" : drawn));
}

// Removes what is known of a run that is deleted.
function forget(name) {
  release(name);
  state.compared = state.compared.filter((other) => other !== name);
  if (state.chosen === name) state.chosen = "";
  save();
}

// Shows a run. The one before it stays drawn only where it was compared; all others keep their
// colours.
export function choose(name) {
  if (name !== state.chosen) {
    if (state.chosen && !state.compared.includes(state.chosen)) release(state.chosen);
    if (!draw(name)) {
      const last = state.drawn.at(-1);
      state.compared = state.compared.filter((other) => other !== last);
      state.drawn[MAX_DRAWN - 1] = name;
    }
    state.chosen = name;
  }
  state.table = false;
  const address = new URL(location.href);
  address.searchParams.set("run", name);
  history.replaceState(history.state, "", address);
  save();
  refresh();
}

function compare(name) {
  const compared = new Set(state.compared);
  if (!compared.delete(name)) {
    if (draw(name)) compared.add(name);
  } else if (name !== state.chosen) release(name);
  state.compared = [...compared];
  save();
  refresh();
}

function show(view) {
  state.view = view;
  delete byId("run-view").dataset.query;
  document.querySelectorAll("#run-head [role=tab]").forEach((tab) => {
    tab.setAttribute("aria-selected", tab.dataset.view === view);
    tab.tabIndex = tab.dataset.view === view ? 0 : -1;
  });
  save();
  refresh();
}

// Acts on the run that the button belongs to, even where another has been chosen since.
async function act(button) {
  const { run, do: action } = button.dataset;
  button.disabled = true;
  if (!(await post(run, action))) button.disabled = false;
  else if (action === "delete") forget(run);
  refresh();
}

async function submit(form) {
  const { run, post: action } = form.dataset;
  if (await post(run, action, Object.fromEntries(new FormData(form)))) form.reset();
  refresh();
}

document.addEventListener("click", async (event) => {
  const button = event.target.closest("[data-choose], [data-draw], [data-do], [data-view], [data-chat-with], #runs-table");
  if (!button) return;
  if (button.dataset.choose) choose(button.dataset.choose);
  else if (button.dataset.draw) compare(button.dataset.draw);
  else if (button.dataset.view) show(button.dataset.view);
  else if (button.dataset.chatWith) window.jetsonFt.chatWith(button.dataset.chatWith);
  else if (button.id === "runs-table") {
    state.table = !state.table;
    save();
    refresh();
  } else if (!button.dataset.sure || (await confirmDialog(button.dataset.sure, button.textContent))) act(button);
});
document.addEventListener("submit", (event) => {
  if (!event.target.matches("form[data-post]")) return;
  event.preventDefault();
  submit(event.target);
});
document.addEventListener("input", (event) => {
  if (event.target.id !== "runs-filter" && event.target.id !== "runs-sort") return;
  state[event.target.id.slice(5)] = event.target.value;
  save();
  refresh();
});
document.addEventListener("keydown", (event) => {
  moveByKey(event, [...document.querySelectorAll("#run-head [role=tab]")]);
});

// Gradio makes the tab's content when it is first opened.
function whenMade() {
  if (!byId("run-page")) return false;
  byId("runs-filter").value = state.filter;
  byId("runs-sort").value = state.sort;
  refresh();
  return true;
}
const observer = new MutationObserver(() => { if (whenMade()) observer.disconnect(); });
if (!whenMade()) observer.observe(document.documentElement, { childList: true, subtree: true });

if (asked) choose(asked);
onTabShown("runs", refresh);
window.jetsonFt = { ...window.jetsonFt, choose };
setInterval(refresh, 1000 * SECONDS);
