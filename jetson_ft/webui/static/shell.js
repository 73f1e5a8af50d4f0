// What all tabs share: the language, the colours, the chosen tab, notices, requests, copying.
export const language = location.pathname.split("/")[1] || "en";

// Has a screen reader read a text aloud, such as that a run has finished.
export function announce(text) {
  document.getElementById("announcer").textContent = text;
}

// Shows a notice for some seconds.
export function toast(text) {
  const box = document.createElement("div");
  box.className = "toast";
  box.setAttribute("role", "alert");
  box.textContent = text;
  document.body.append(box);
  setTimeout(() => box.remove(), 8000);
}

// Returns the response of a request. Throws an error whose message is for people.
export async function request(address, options) {
  const { noServer } = document.getElementById("announcer").dataset;
  const response = await fetch(address, options).catch(() => { throw new Error(noServer); });
  if (response.ok) return response;
  const error = await response.json().catch(() => ({ what: response.statusText }));
  const text = [error.what, error.where, error.fix].filter(Boolean).join("\n");
  throw new Error(text || response.statusText);
}

// Posts a value as JSON, or nothing; otherwise as `request`.
export function send(address, body) {
  const headers = body ? { "Content-Type": "application/json" } : {};
  return request(address, { method: "POST", headers, body: body && JSON.stringify(body) });
}

// Posts an action to a run; shows its error. Returns whether it was done.
export async function post(name, action, body) {
  try {
    await send(`/runs/${encodeURIComponent(name)}/${action}`, body);
    return true;
  } catch (error) {
    toast(error.message);
    return false;
  }
}

// Saves a text as a file of the browser's machine.
export function download(name, text, type = "application/json") {
  const link = document.createElement("a");
  link.href = URL.createObjectURL(new Blob([text], { type }));
  link.download = name;
  link.click();
  setTimeout(() => URL.revokeObjectURL(link.href), 60000);
}

// Asks in a dialog; returns whether its second button, named by `action`, was pressed. The dialog
// is in the head (templates/head.jinja); the browser gives the focus back when it closes.
export function confirmDialog(text, action) {
  const dialog = document.getElementById("confirm");
  dialog.querySelector("p").textContent = text;
  dialog.querySelector("[value=yes]").textContent = action;
  dialog.returnValue = "";
  dialog.showModal();
  return new Promise((resolve) => {
    dialog.addEventListener("close", () => resolve(dialog.returnValue === "yes"), { once: true });
  });
}

// Copies the text of the element that the button names, or that is before it; it stays marked.
function copy(button) {
  const { copy: named } = button.dataset;
  getSelection().selectAllChildren(
    named ? document.querySelector(named) : button.previousElementSibling,
  );
  if (!document.execCommand("copy")) return; // which works without HTTPS too
  button.dataset.copied = "";
  announce(document.getElementById("announcer").dataset.copied);
}

document.addEventListener("click", (event) => {
  const button = event.target.closest("[data-language], [data-copy]");
  if (!button) return;
  if ("copy" in button.dataset) copy(button);
  else speak(button.dataset.language);
});

// --- language and colours -------------------------------------------------------------------

function speak(chosen) {
  document.cookie = `jetson-ft-language=${chosen}; path=/; max-age=31536000; samesite=strict`;
  location.href = `/${chosen}/${location.search}${location.hash}`;
}

const system = matchMedia("(prefers-color-scheme: dark)");
const schemes = document.querySelectorAll("[name=scheme]");

// Gradio sets its class by the system's scheme when it starts and when that changes.
function applyScheme() {
  const chosen = localStorage.getItem("jetson-ft-scheme") || "";
  const dark = chosen ? chosen === "dark" : system.matches;
  document.documentElement.style.colorScheme = dark ? "dark" : "light";
  if (document.body.classList.contains("dark") !== dark) document.body.classList.toggle("dark");
  schemes.forEach((box) => { box.checked = box.value === chosen; });
}
schemes.forEach((box) => box.addEventListener("change", () => {
  localStorage.setItem("jetson-ft-scheme", box.value);
  applyScheme();
}));
system.addEventListener("change", applyScheme);
new MutationObserver(applyScheme).observe(document.body, { attributeFilter: ["class"] });
applyScheme();

// --- tabs -----------------------------------------------------------------------------------

// A tab's own content may have tabs too.
const tabs = () => [...document.querySelectorAll("#tabs > .tab-wrapper [role=tab]")];
const tabOf = (button) => button.dataset.tabId;

// Returns the tab that is shown; an empty text while Gradio starts, or where the window is hidden.
// A tab polls only while it is this one.
export function shownTab() {
  const button = tabs().find((tab) => tab.ariaSelected === "true");
  return button && !document.hidden ? tabOf(button) : "";
}

// Calls a function whenever a tab begins to be shown, also where the window is shown again.
export function onTabShown(tab, action) {
  document.addEventListener("tab-shown", (event) => { if (event.detail === tab) action(); });
  if (shownTab() === tab) whenMade(tab, action);
}

// Gradio makes a tab's elements, piece by piece, when the tab is chosen for the first time.
function whenMade(tab, action, before = 0) {
  const made = document.querySelectorAll(`#${tab}-tab *`).length;
  if (made && made === before) action();
  else if (shownTab() === tab) setTimeout(whenMade, 50, tab, action, made);
}

let shown = "";
function noticeTab() {
  const buttons = tabs();
  for (const button of buttons) {
    const tabIndex = button.ariaSelected === "true" ? 0 : -1;
    if (button.tabIndex !== tabIndex) button.tabIndex = tabIndex;
  }
  if (shownTab() === shown) return;
  const address = new URL(location.href); // Gradio's `<base>` has no query: "#tab" alone would remove it
  if (shown) address.search = ""; // at first the server has yet to read it
  shown = shownTab();
  if (!shown) return;
  address.hash = shown;
  if (address.hash !== location.hash) history.replaceState(history.state, "", address);
  const tab = shown;
  whenMade(tab, () => document.dispatchEvent(new CustomEvent("tab-shown", { detail: tab })));
}

// The tab of the address; of one that names a run alone, Runs.
function openTab() {
  const named = location.hash.slice(1) || (/[?&]run=/.test(location.search) ? "runs" : "");
  tabs().find((tab) => tabOf(tab) === named)?.click();
}

// Has the arrow keys, Home and End press one of the buttons of a list, where one has the focus.
export function moveByKey(event, buttons) {
  const at = buttons.indexOf(event.target);
  const to = { ArrowLeft: at - 1, ArrowRight: at + 1, Home: 0, End: -1 }[event.key];
  if (at < 0 || to === undefined) return;
  event.preventDefault();
  const next = buttons.at(to % buttons.length);
  next.focus();
  next.click();
}

// Gradio draws the tabs when it has started.
function whenDrawn(action) {
  const observer = new MutationObserver(() => {
    if (!tabs().length) return;
    observer.disconnect();
    action();
  });
  observer.observe(document.querySelector("gradio-app"), { childList: true, subtree: true });
}

// Nothing moves under the eye while the first tab is made.
const reveal = () => { delete document.documentElement.dataset.starting; };
document.addEventListener("tab-shown", reveal, { once: true });
setTimeout(reveal, 3000);

whenDrawn(() => {
  openTab();
  const list = document.querySelector("#tabs [role=tablist]");
  list.addEventListener("keydown", (event) => moveByKey(event, tabs()));
  new MutationObserver(noticeTab).observe(list, { attributeFilter: ["aria-selected"], subtree: true });
  noticeTab();
  restoreScroll();
});
document.addEventListener("visibilitychange", noticeTab);
addEventListener("hashchange", openTab);

// --- a page's beginning and end -------------------------------------------------------------

function keepScroll() {
  sessionStorage.setItem("jetson-ft-scroll", `${location.hash} ${scrollY}`);
}

// What is above arrives piece by piece; a person who scrolls ends this.
function restoreScroll() {
  const [hash, y] = (sessionStorage.getItem("jetson-ft-scroll") || "").split(" ");
  if (hash !== location.hash || !Number(y)) return;
  const observer = new ResizeObserver(() => scrollTo(0, Number(y)));
  observer.observe(document.body);
  const end = () => observer.disconnect();
  setTimeout(end, 3000);
  ["wheel", "touchmove", "keydown", "mousedown"].forEach((type) => addEventListener(type, end, { once: true }));
}

// The session's name is the client's own, which it sends first here.
const session = () => performance.getEntriesByType("resource")
  .map(({ name }) => /heartbeat\/(\w+)/.exec(name)?.[1]).find(Boolean);

addEventListener("pagehide", () => {
  keepScroll();
  if (session()) navigator.sendBeacon(`/closed/${session()}`);
});
