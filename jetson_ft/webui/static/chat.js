// The Chat tab: its drawers, the history that this browser keeps, few-shot examples, notes.
import { download, language, onTabShown } from "./shell.js";

const HISTORY = "jetson-ft-chats"; // in localStorage, the newest first
const CURRENT = "jetson-ft-chat"; // in sessionStorage: the id of the conversation of this page
const WANTED = "jetson-ft-chat-with"; // there too: the model that a link to this tab names
const MOST = 100; // conversations that are kept
const byId = (id) => document.getElementById(id);

let shown = null; // the conversation on the page
let pending = null; // what `take` puts there next
let timer = 0;
let retryButton = null; // a copy of Gradio's
let retried = ""; // the pane and the turn of the answer to give again

// --- history --------------------------------------------------------------------------------

function history() {
  try {
    return JSON.parse(localStorage.getItem(HISTORY)) ?? [];
  } catch {
    return []; // blocked by the browser, or damaged
  }
}

// Stores the conversations; drops the oldest where the browser has no room.
function storeHistory(list) {
  for (let count = Math.min(list.length, MOST); count >= 0; count--) {
    try {
      localStorage.setItem(HISTORY, JSON.stringify(list.slice(0, count)));
      return;
    } catch {
      // the next round stores one less
    }
  }
}

const textOf = (content) =>
  typeof content === "string" ? content : content.map((part) => part.text ?? "").join("");

// Returns a pane's messages with their text alone.
const plain = (messages) =>
  (messages ?? []).map(({ role, content, metadata, options }) => ({
    role, content: [{ type: "text", text: textOf(content) }], metadata, options,
  }));

// Remembers what the page shows, after each change of a pane.
function keep(first, second, ...messages) {
  if (pending) return; // the page is about to show another one
  const panes = messages.map(plain);
  requestAnimationFrame(() => (panes.forEach(showNotes), followAnswers()));
  clearTimeout(timer);
  if (shown && !panes[0].length) save(); // another one begins
  const id = panes[0].length ? (shown?.id ?? Date.now().toString(36)) : null;
  const titles = ["chat-first", "chat-second"].map((name) => byId(name)?.querySelector("input")?.value);
  // Other models begin another conversation, so what was begun keeps its own.
  shown = id && { models: [first, second], titles, ...shown, id, at: Date.now(), panes };
  timer = setTimeout(save, 300);
}

function save() {
  if (!shown) return sessionStorage.removeItem(CURRENT);
  sessionStorage.setItem(CURRENT, shown.id);
  const stored = history();
  const before = stored.find(({ id }) => id === shown.id);
  // One that was only opened keeps its place.
  if (before && JSON.stringify(before.panes) === JSON.stringify(shown.panes)) shown.at = before.at;
  const others = stored.filter(({ id }) => id !== shown.id);
  storeHistory([shown, ...others].sort((one, other) => other.at - one.at));
  showHistory();
}

function showHistory() {
  const home = byId("chat-history");
  if (!home) return;
  const rows = history().map((entry) => {
    const row = home.querySelector("template").content.cloneNode(true).firstElementChild;
    const [load] = row.children;
    const day = new Date(entry.at).toLocaleDateString(language.replace("_", "-"));
    const title = document.createElement("span");
    title.textContent = textOf(entry.panes[0][0].content);
    const about = document.createElement("small");
    about.textContent = [day, ...entry.titles.slice(0, entry.models[1] ? 2 : 1)].join(" · ");
    load.append(title, about);
    if (entry.id === shown?.id) load.setAttribute("aria-current", "true");
    row.dataset.id = entry.id;
    return row;
  });
  home.querySelector("ol").replaceChildren(...rows);
}

// Puts a conversation on the page; without one, an empty page for the same models.
function load(entry) {
  clearTimeout(timer);
  if (shown) save();
  pending = entry ?? { panes: [[], []] };
  shown = entry ?? null;
  loadPending();
}

// Presses the button that ends the answer being generated and then calls `take`.
function loadPending() {
  if (pending) byId("chat-load").click();
}

// --- what Gradio's events call ---------------------------------------------------------------

// Before the tab is opened: the model that a link names, the conversation before a reload.
function open(first, second, _wanted, pane) {
  const wanted = sessionStorage.getItem(WANTED) ?? "";
  sessionStorage.removeItem(WANTED);
  if (wanted) pending = { models: [wanted, ""], panes: [[], []] };
  else if (!pane?.length) {
    pending = history().find(({ id }) => id === sessionStorage.getItem(CURRENT)) ?? null;
    shown = pending;
  }
  return [first, second, wanted, pane];
}

// Returns the models and panes to show.
function take(first, second, ...panes) {
  const next = pending;
  pending = null;
  isAtEnd = true;
  return next ? [...(next.models ?? [first, second]), ...next.panes] : [first, second, ...panes];
}

const retriedAnswer = () => retried;

// Returns the values of a request, with the examples of the drawer at their place.
function form(values, examples) {
  isAtEnd = true;
  values[examples] = [...document.querySelectorAll("#chat-examples li")]
    .map((row) => [...row.querySelectorAll("textarea")].map(({ value }) => value.trim()))
    .filter((pair) => pair.some(Boolean))
    .map(([instruction, output]) => JSON.stringify({ instruction, output }))
    .join("\n");
  return values;
}

function addPairs(text) {
  JSON.parse(text || "[]").forEach((pair) => addPair(...pair));
}

function addPair(question = "", answer = "") {
  const home = byId("chat-examples");
  const row = home.querySelector("template").content.cloneNode(true).firstElementChild;
  const fields = row.querySelectorAll("textarea");
  [fields[0].value, fields[1].value] = [question, answer];
  home.querySelector("ol").append(row);
  return fields[0];
}

// Writes the notes ("40 tokens · 12/s") under the answers of a pane.
function showNotes(messages, pane) {
  const rows = byId(["chat-a", "chat-b"][pane])?.querySelectorAll(".bot-row") ?? [];
  const answers = messages.filter(({ role }) => role === "assistant");
  rows.forEach((row, number) => (row.dataset.note = answers[number]?.metadata?.log ?? ""));
}

// Opens the tab with a model.
function chatWith(name) {
  sessionStorage.setItem(WANTED, name);
  location.hash = "chat";
}

// --- files -----------------------------------------------------------------------------------

// Returns the turns: a question with the answer of each model.
function turns({ panes, models }) {
  const count = models[1] ? 2 : 1;
  const result = [];
  panes.slice(0, count).forEach((messages, pane) => {
    let number = -1;
    for (const { role, content } of messages) {
      if (role === "user") {
        result[++number] ??= { question: textOf(content), answers: Array(count).fill("") };
      } else if (number >= 0) result[number].answers[pane] = textOf(content);
    }
  });
  return result;
}

function exportText() {
  const titles = shown.titles.slice(0, shown.models[1] ? 2 : 1);
  const parts = turns(shown).map(({ question, answers }) =>
    [`> ${question.replaceAll("\n", "\n> ")}`, ...answers.map((text, i) => `[${titles[i]}]\n${text}`)]
      .join("\n\n"));
  download("conversation.txt", parts.join("\n\n---\n\n") + "\n", "text/plain");
}

function exportJson() {
  const models = shown.models.filter(Boolean);
  const titles = shown.titles.slice(0, models.length);
  download("conversation.json", JSON.stringify({ models, titles, turns: turns(shown) }, null, 2));
}

// --- the page --------------------------------------------------------------------------------

// The rows of a turn of two panes: the question, the answer, its buttons, how to go on.
const ROWS = [".user-row, .message-buttons-right", ":not(.message-buttons-left, .options)",
  ".message-buttons-left", ".options"];
let isAtEnd = true; // of the conversation of two panes; false once it is scrolled up

// Puts the parts of each turn of two panes into the same rows of one grid, below the titles.
function placeRows(panes) {
  for (const wrap of panes.querySelectorAll(".message-wrap")) {
    let first = 2 - ROWS.length;
    for (const part of wrap.children) {
      if (part.matches(".user-row")) first += ROWS.length;
      part.style.gridRow = first + ROWS.findIndex((selector) => part.matches(selector));
    }
  }
}

// Writes the panes' titles on the switch between them.
function nameSwitch() {
  for (const button of document.querySelectorAll("[data-chat-pane]")) {
    const title = byId(`chat-${button.dataset.chatPane}`)?.querySelector("label")?.textContent.trim();
    if (title && button.textContent !== title) button.textContent = title;
  }
}

function noteScroll({ target }) {
  isAtEnd = target.scrollHeight - target.scrollTop - target.clientHeight < 40;
}

function followAnswers() {
  const panes = byId("chat-panes");
  if (isAtEnd) panes.scrollTop = panes.scrollHeight;
}

// Gives each answer the button that Gradio gives the last one.
function addRetryButtons(panes) {
  const groups = [...panes.querySelectorAll(".message-buttons-left .icon-button-wrapper")];
  const gradios = groups.map((group) => group.querySelector("button:nth-of-type(2):not([data-chat])"));
  if (!retryButton && (retryButton = gradios.find(Boolean)?.cloneNode(true))) {
    retryButton.disabled = false;
    retryButton.dataset.chat = "retry";
  }
  groups.forEach((group, number) => {
    const ours = group.querySelector("[data-chat]");
    if (gradios[number]) ours?.remove();
    else if (!ours && retryButton) group.append(retryButton.cloneNode(true));
  });
}

function retry(button) {
  if (document.querySelector("#chat-message .stop-button")) return;
  const pane = button.closest("#chat-b") ? 1 : 0;
  const answers = button.closest(".message-wrap").querySelectorAll(".message-buttons-left");
  retried = `${pane},${[...answers].indexOf(button.closest(".message-buttons-left"))}`;
  byId("chat-retry").click();
}

// After each change of a pane.
const changes = new MutationObserver((records) => {
  if (records.every(({ type }) => type === "characterData")) return followAnswers(); // more of an answer
  const panes = byId("chat-panes");
  placeRows(panes);
  addRetryButtons(panes);
  shown?.panes.forEach(showNotes); // Gradio can draw a quick answer after `keep` has run
  nameSwitch();
  followAnswers();
  // Gradio calls its buttons of questions to begin with a list, which may have no buttons.
  for (const list of panes.querySelectorAll(".examples[role=list]")) list.role = "group";
});

// Tells the style sheet where the tab begins, so that it fills the rest of the window.
function fit() {
  const top = byId("chat")?.offsetParent && byId("chat").getBoundingClientRect().top + scrollY;
  if (top) document.documentElement.style.setProperty("--chat-top", `${Math.round(top)}px`);
}

// Opens a drawer, or closes the open one.
function openDrawer(name) {
  const chat = byId("chat");
  const before = chat.dataset.drawer ?? "";
  chat.dataset.drawer = before === name ? "" : name;
  for (const button of chat.querySelectorAll("[data-chat][aria-expanded]")) {
    button.setAttribute("aria-expanded", button.dataset.chat === chat.dataset.drawer);
  }
  const opener = chat.querySelector(`[data-chat="${before}"][aria-expanded]`);
  if (!chat.dataset.drawer && before) opener?.focus();
  else byId(`chat-${name}`)?.querySelector("button")?.focus();
}

const actions = {
  new: () => load(null),
  history: () => (showHistory(), openDrawer("history")),
  settings: () => openDrawer("settings"),
  close: () => openDrawer(byId("chat").dataset.drawer),
  add: () => addPair().focus(),
  remove: (button) => button.closest("li").remove(),
  load: (button) => load(history().find(({ id }) => id === button.closest("li").dataset.id)),
  forget: (button) => {
    const gone = button.closest("li").dataset.id;
    const isShown = gone === shown?.id;
    if (isShown) shown = null;
    storeHistory(history().filter(({ id }) => id !== gone));
    showHistory();
    if (isShown) load(null);
  },
  retry,
  text: () => shown && exportText(),
  json: () => shown && exportJson(),
};

document.addEventListener("click", ({ target }) => {
  const button = target.closest("[data-chat]");
  if (button) actions[button.dataset.chat](button);
  const pane = target.closest("[data-chat-pane]");
  if (!pane) return;
  byId("chat").dataset.pane = pane.dataset.chatPane;
  for (const each of document.querySelectorAll("[data-chat-pane]")) {
    each.setAttribute("aria-pressed", each === pane);
  }
});

// A form in a model's answer is text: it sends nothing.
document.addEventListener("submit", (event) => {
  if (event.target.closest(".prose")) event.preventDefault();
}, true);

document.addEventListener("keydown", (event) => {
  if (event.key === "Escape" && byId("chat")?.dataset.drawer) actions.close();
  // An input method confirms a word by Enter, which must not send the message.
  const isComposing = event.isComposing || event.keyCode === 229;
  if (isComposing && event.target.closest?.("#chat")) event.stopPropagation();
}, true);

const sizes = new ResizeObserver(followAnswers);

addEventListener("resize", fit);
onTabShown("chat", function begin() {
  const panes = byId("chat-panes");
  if (!panes) return requestAnimationFrame(begin); // Gradio has yet to draw it
  fit();
  showHistory();
  changes.observe(panes, { childList: true, subtree: true, characterData: true });
  panes.addEventListener("scroll", noteScroll);
  sizes.observe(panes);
});

window.jetsonFt = {
  ...window.jetsonFt, chatWith, chat: { addPairs, form, keep, loadPending, open, retriedAnswer, take },
};
