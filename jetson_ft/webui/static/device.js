// The Device tab: the findings, and the gauges while the tab is shown.
import { announce, language, onTabShown, shownTab } from "./shell.js";

const GAUGE_MS = 2000, EXAMINE_MS = 1000;
let timer;

// Gradio makes the tab's elements some time after the tab is chosen.
const isDrawn = () => document.getElementById("device-findings");

async function html(address, options) {
  const response = await fetch(address, options);
  return response.ok ? response.text() : null;
}

async function showFindings() {
  const text = await html(`/live/${language}/device`);
  const place = isDrawn();
  if (text === null || place.lastText === text) return;
  const wasExamining = place.querySelector("[data-examining]");
  const hadFocus = document.activeElement?.id === "examine-again";
  place.innerHTML = place.lastText = text;
  if (hadFocus) document.getElementById("examine-again")?.focus();
  if (wasExamining && !place.querySelector("[data-examining]"))
    announce(place.querySelector("h2").innerText);
}

// Bars of the same gauges move; others are drawn anew.
async function showGauges() {
  const text = await html(`/live/${language}/gauges`);
  const place = document.getElementById("device-gauges");
  if (text === null) return;
  const next = document.createElement("div");
  next.innerHTML = text;
  const widths = [...place.querySelectorAll(".track i")].map((bar) => bar.style.width);
  const bars = [...next.querySelectorAll(".track i")];
  const targets = bars.map((bar) => bar.style.width);
  if (widths.length === bars.length) bars.forEach((bar, n) => { bar.style.width = widths[n]; });
  place.replaceChildren(...next.childNodes);
  place.offsetWidth; // the bars are laid out at the old widths first
  bars.forEach((bar, n) => { bar.style.width = targets[n]; });
}

async function refresh() {
  clearTimeout(timer);
  if (shownTab() !== "device") return;
  if (!isDrawn()) {
    timer = setTimeout(refresh, 50);
    return;
  }
  await Promise.allSettled([showFindings(), showGauges()]);
  clearTimeout(timer);
  timer = setTimeout(refresh, isDrawn()?.querySelector("[data-examining]") ? EXAMINE_MS : GAUGE_MS);
}

onTabShown("device", refresh);
document.addEventListener("click", async (event) => {
  if (event.target.id !== "examine-again") return;
  await html("/device/examine", { method: "POST" });
  refresh();
});
