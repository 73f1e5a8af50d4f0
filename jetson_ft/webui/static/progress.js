// The live run's progress in the page's title, and a notification when a run ends. While no run is
// live, nothing is fetched after the first answer.
import { language, request, toast } from "./shell.js";

const SECONDS = 10;
const KEY = "jetson-ft-notify";
const NAME = "jetson-ft";
let watched = new Set(); // the runs that were live
let progress = ""; // of the first one
let timer;

function applyTitle() {
  if (document.title !== progress + NAME) document.title = progress + NAME;
}

async function update() {
  clearTimeout(timer);
  timer = setTimeout(update, 1000 * SECONDS);
  const query = new URLSearchParams([...watched].map((name) => ["watched", name]));
  let runs;
  try {
    runs = await (await request(`/progress/${language}?${query}`, { cache: "no-store" })).json();
  } catch { // no server, or a busy one
    return;
  }
  const live = runs.filter((run) => run.is_live);
  const first = live.find((run) => run.share !== null) ?? live.at(-1);
  const part = first && (first.share === null ? first.state : `${Math.round(100 * first.share)} %`);
  progress = first ? `${part} · ` : "";
  applyTitle();
  const ended = runs.filter((run) => !run.is_live && watched.has(run.name));
  watched = new Set(live.map((run) => run.name));
  if (!live.length) {
    clearTimeout(timer);
    timer = undefined;
  }
  ended.forEach(notify);
}

function notify(run) {
  if (!isOn()) return;
  try {
    const notice = new Notification(run.title, { body: run.state, tag: run.name });
    notice.onclick = () => {
      window.focus();
      window.jetsonFt.choose(run.name);
    };
  } catch { // Chrome on Android has notifications of service workers alone
    toast(`${run.title}: ${run.state}`);
  }
}

const isOn = () => window.isSecureContext && "Notification" in window
  && Notification.permission === "granted" && localStorage.getItem(KEY) === "on";

async function toggle(button) {
  if (!window.isSecureContext || !("Notification" in window)) return toast(button.dataset.insecure);
  if (isOn()) localStorage.removeItem(KEY);
  else if ((await Notification.requestPermission()) !== "granted") toast(button.dataset.denied);
  else {
    localStorage.setItem(KEY, "on");
    toast(button.dataset.on);
  }
  button.setAttribute("aria-pressed", isOn());
}

document.addEventListener("click", (event) => {
  const button = event.target.closest("#runs-notify");
  if (button) toggle(button);
});
// The list of runs has changed: a run may have started or ended.
document.addEventListener("fragment", (event) => {
  if (event.target.id !== "run-list") return;
  document.getElementById("runs-notify").setAttribute("aria-pressed", isOn());
  const live = [...event.target.querySelectorAll("li.live")].map((item) => item.dataset.run);
  const isSame = live.length === watched.size && live.every((name) => watched.has(name));
  if (!isSame || (live.length && !timer)) update();
});
// Gradio sets the title when it has started.
new MutationObserver(applyTitle).observe(document.head, { childList: true, characterData: true, subtree: true });
update();
