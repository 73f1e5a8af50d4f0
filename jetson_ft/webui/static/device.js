// The Device tab: the findings, and the gauges while the tab is shown.
import { morph } from "./morph.js";
import { announce, language, onTabShown, request, send, shownTab, toast } from "./shell.js";

const GAUGE_MS = 2000, EXAMINE_MS = 1000;
const isExamining = () => Boolean(document.querySelector("#device-findings [data-examining]"));
let timer;
let opened = false; // and the server doesn't know it yet: it examines the machine then

// Fetches a fragment into its element; the browser has an unchanged one by its ETag.
async function update(id, address) {
  const response = await request(`/live/${language}/${address}`);
  morph(document.getElementById(id), await response.text());
}

async function updateFindings() {
  await update("device-findings", `device${opened ? "?opened=true" : ""}`);
  opened = false;
}

async function refresh() {
  clearTimeout(timer);
  if (shownTab() !== "device") return;
  const wasExamining = isExamining();
  await Promise.allSettled([updateFindings(), update("device-gauges", "gauges")]);
  if (wasExamining && !isExamining()) announce(document.querySelector("#device-findings h2").innerText);
  clearTimeout(timer);
  timer = setTimeout(refresh, isExamining() ? EXAMINE_MS : GAUGE_MS);
}

onTabShown("device", () => {
  opened = true;
  refresh();
});
document.addEventListener("click", async (event) => {
  if (event.target.id !== "examine-again") return;
  await send("/device/examine").catch((error) => toast(error.message));
  refresh();
});
