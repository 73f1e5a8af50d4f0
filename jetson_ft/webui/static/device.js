// The Device tab: the findings, and the gauges while the tab is shown.
import { morph } from "./morph.js";
import { announce, language, onTabShown, shownTab } from "./shell.js";

const GAUGE_MS = 2000, EXAMINE_MS = 1000;
const isExamining = () => Boolean(document.querySelector("#device-findings [data-examining]"));
let timer;

async function update(id, address) {
  const response = await fetch(`/live/${language}/${address}`);
  if (response.ok) morph(document.getElementById(id), await response.text());
}

async function refresh() {
  clearTimeout(timer);
  if (shownTab() !== "device") return;
  const wasExamining = isExamining();
  await Promise.allSettled([update("device-findings", "device"), update("device-gauges", "gauges")]);
  if (wasExamining && !isExamining()) announce(document.querySelector("#device-findings h2").innerText);
  clearTimeout(timer);
  timer = setTimeout(refresh, isExamining() ? EXAMINE_MS : GAUGE_MS);
}

onTabShown("device", refresh);
document.addEventListener("click", async (event) => {
  if (event.target.id !== "examine-again") return;
  await fetch("/device/examine", { method: "POST" });
  refresh();
});
