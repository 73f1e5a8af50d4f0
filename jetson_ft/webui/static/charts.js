// Draws the curves of runs with Chart.js, which is loaded when a chart is first drawn. The charts of
// a view share their cursor, the part that is shown, the x axis and the smoothing.
import { language } from "./shell.js";

const KEY = "jetson-ft-charts";
const settings = { axis: "step", smoothing: 0.6, ...JSON.parse(sessionStorage.getItem(KEY) || "{}") };
const ROWS = 30; // of the table of values
const NOISY = ["loss", "grad_norm", "watts"]; // curves that are smoothed
let plots = []; // of the view that is shown
let shown = null; // the part of the x axis, as [from, to]; null: all
let newest = null; // what was drawn last: { panel, runs, chosen }
let fetched = null; // the curves that are drawn: { address, etag, runs }
let turn = 0; // of the newest call of `draw`
let library;

function loadLibrary() {
  library ??= new Promise((resolve) => {
    const script = document.createElement("script");
    script.src = "/static/chart.js";
    script.onload = () => resolve(window.Chart);
    script.onerror = () => {
      library = undefined; // the next refresh tries again
      resolve(null);
    };
    document.head.append(script);
  });
  return library;
}

// Returns the curves of runs; null: there is no server.
async function fetchCurves(view, drawn) {
  const query = new URLSearchParams({ view });
  drawn.forEach((name) => query.append("drawn", name));
  const address = `/live/${language}/curves?${query}`;
  const known = fetched?.address === address ? fetched : null;
  const headers = known ? { "If-None-Match": known.etag } : {};
  const response = await fetch(address, { headers, cache: "no-store" }).catch(() => null);
  return response?.ok ? { address, etag: response.headers.get("ETag"), runs: await response.json() } : known;
}

// Draws the charts of a view; `drawn` are the runs at the places of their colours. Returns false where
// it drew nothing: there is no server, or another call has begun since.
export async function draw(panel, view, chosen, drawn) {
  const mine = ++turn;
  const [Chart, curves] = await Promise.all([loadLibrary(), fetchCurves(view, drawn)]);
  if (!Chart || !curves || mine !== turn) return false;
  fetched = curves;
  const chosenFirst = [...curves.runs].sort((one, other) => (other.name === chosen) - (one.name === chosen));
  if (newest?.chosen !== chosen) shown = null;
  newest = { panel, runs: chosenFirst, chosen };
  const elements = [...panel.querySelectorAll(".plot")];
  plots.filter((plot) => !elements.includes(plot.element)).forEach((plot) => plot.chart.destroy());
  plots = elements.map((element) => plots.find((plot) => plot.element === element) ?? new Plot(Chart, element));
  drawAll();
  return true;
}

function drawAll() {
  const tools = document.getElementById("chart-tools");
  if (!newest || !tools) return;
  tools.querySelector("#chart-axis").value = settings.axis;
  tools.querySelector("#chart-smoothing").value = settings.smoothing;
  tools.querySelector("#chart-reset").hidden = !shown;
  const words = JSON.parse(tools.dataset.names);
  const axis = chooseAxis(newest.runs, JSON.parse(tools.dataset.units));
  plots.forEach((plot) => plot.draw(newest.runs, axis, words));
}

// Returns what puts the points of a run on the x axis, and what names a place on it.
function chooseAxis(runs, units) {
  if (settings.axis === "step") return { place: (run, step) => step, text: (x) => x.toLocaleString() };
  const known = (run) => run.curves[settings.axis] ?? [[], []];
  const place = (run, step) => interpolate(...known(run), step);
  if (settings.axis === "tokens") return { place, text: (x) => Math.round(x).toLocaleString() };
  const longest = Math.max(0, ...runs.map((run) => known(run)[1].at(-1) ?? 0));
  const number = longest < 180 ? 0 : longest < 3 * 3600 ? 1 : 2;
  const divisor = 60 ** number;
  return {
    place: (run, step) => place(run, step) / divisor,
    text: (x) => `${Number(x.toPrecision(3)).toLocaleString()} ${units[number]}`,
  };
}

// Returns the value at a step between known ones; it is 0 at step 0.
function interpolate(steps, values, step) {
  const after = lowerBound(steps, step);
  if (after === steps.length) return values.at(-1) ?? step;
  const [from, start] = after ? [steps[after - 1], values[after - 1]] : [0, 0];
  return start + ((values[after] - start) * (step - from)) / Math.max(1, steps[after] - from);
}

function lowerBound(sorted, value, key = (item) => item) {
  let [low, high] = [0, sorted.length];
  while (low < high) {
    const middle = (low + high) >> 1;
    if (key(sorted[middle]) < value) low = middle + 1;
    else high = middle;
  }
  return low;
}

// Exponential moving average, corrected for its start (as Adam's moments are).
function smooth(points, weight) {
  let mean = 0;
  return points.map(({ x, y }, index) => {
    mean = weight * mean + (1 - weight) * y;
    return { x, y: mean / (1 - weight ** (index + 1)) };
  });
}

function nearest(points, x) {
  const after = lowerBound(points, x, (point) => point.x);
  const [left, right] = [points[after - 1], points[after]];
  return !left || (right && right.x - x < x - left.x) ? right : left;
}

// Returns the colour of a token in the page's present scheme.
function colour(token) {
  const probe = document.body.appendChild(document.createElement("i"));
  probe.style.color = `var(${token})`;
  const text = getComputedStyle(probe).color;
  probe.remove();
  return text;
}

const number = (value) => Number(value.toPrecision(4)).toLocaleString(undefined, { maximumSignificantDigits: 4 });

// One chart in its element.
class Plot {
  constructor(Chart, element) {
    this.element = element;
    this.Chart = Chart;
    this.from = null; // where a drag began, in pixels
    this.canvas = element.appendChild(document.createElement("canvas"));
    this.box = element.appendChild(document.createElement("output"));
    this.box.className = "chart-box";
    this.box.hidden = true;
    this.chart = new Chart(this.canvas, {
      type: "line",
      data: { datasets: [] },
      options: {
        animation: false, parsing: false, normalized: true, maintainAspectRatio: false, events: [],
        plugins: { legend: { display: false }, tooltip: { enabled: false } },
        scales: { x: { type: "linear", ticks: { maxRotation: 0 } }, y: { type: "linear" } },
      },
      plugins: [{ id: "cursor", afterDraw: (chart) => this.drawCursor(chart) }],
    });
    element.addEventListener("pointermove", (event) => this.move(event));
    element.addEventListener("pointerdown", (event) => this.press(event));
    element.addEventListener("pointerup", (event) => this.release(event));
    element.addEventListener("pointerleave", () => { if (this.from === null) setCursor(null); });
    element.addEventListener("dblclick", () => showPart(null));
    element.addEventListener("keydown", (event) => this.key(event));
    element.addEventListener("blur", () => setCursor(null));
  }

  get scale() {
    return this.chart.scales.x;
  }

  draw(runs, axis, words) {
    const { Chart, chart } = this;
    const figure = this.element.closest("[data-chart]");
    const [name, caption] = [figure.dataset.chart, figure.querySelector("figcaption").textContent];
    const [ink, line] = [colour("--soft"), colour("--line")];
    this.cursorColour = ink;
    this.partColour = Chart.helpers.color(colour("--focus")).alpha(0.2).rgbString();
    this.axis = axis;
    this.words = words;
    this.curves = []; // with a name each, as they are read out
    const datasets = [];
    runs.forEach((run, index) => {
      const stroke = colour(`--curve-${run.colour}`);
      const title = runs.length > 1 ? `${run.title} · ` : "";
      const points = (curve) => {
        const [steps, values] = run.curves[curve] ?? [[], []];
        return steps.map((step, place) => ({ x: axis.place(run, step), y: values[place], step }));
      };
      const style = { borderColor: stroke, backgroundColor: stroke, borderWidth: 2, pointRadius: 0 };
      const data = points(name);
      const isSmooth = NOISY.includes(name) && settings.smoothing > 0;
      if (isSmooth && index === 0) {
        const pale = Chart.helpers.color(stroke).alpha(0.3).rgbString();
        datasets.push({ ...style, data, borderColor: pale, borderWidth: 1, order: 2 });
      }
      const label = runs.length > 1 ? run.title : (words[name] ?? caption);
      datasets.push({ ...style, data: isSmooth ? smooth(data, settings.smoothing) : data, order: 1 });
      if (data.length === 1) datasets.at(-1).pointRadius = 3;
      if (data.length) this.curves.push({ label, stroke, points: data, drawn: datasets.at(-1).data });
      if (name !== "loss") return;
      const heldout = points("heldout_loss");
      datasets.push({ ...style, data: heldout, borderDash: [6, 4], pointRadius: 3, order: 0 });
      const heldoutLabel = title + words.heldout_loss;
      if (heldout.length) this.curves.push({ label: heldoutLabel, stroke, points: heldout, drawn: heldout });
    });
    chart.data.datasets = datasets;
    const { x, y } = chart.options.scales;
    [x.min, x.max] = shown ?? [0, undefined];
    for (const scale of [x, y]) {
      scale.ticks.color = ink;
      scale.grid = { color: line };
      scale.border = { color: line };
      scale.ticks.font = { size: 13, family: getComputedStyle(document.body).fontFamily };
    }
    x.ticks.maxTicksLimit = this.element.clientWidth < 420 ? 5 : 9;
    y.ticks.maxTicksLimit = 6;
    x.ticks.callback = (value) => axis.text(value);
    y.ticks.callback = (value) => number(value);
    chart.update("none");
    this.fillTable();
  }

  // The vertical line and the values at the cursor, and the part that a drag marks.
  drawCursor({ ctx, chartArea: area, scales: { x } }) {
    const pixel = this.cursor === undefined || this.cursor === null ? null : x.getPixelForValue(this.cursor);
    ctx.save();
    if (this.from !== null && this.to !== undefined) {
      ctx.fillStyle = this.partColour;
      ctx.fillRect(this.from, area.top, this.to - this.from, area.bottom - area.top);
    }
    if (pixel !== null && pixel >= area.left && pixel <= area.right) {
      ctx.strokeStyle = this.cursorColour;
      ctx.beginPath();
      ctx.moveTo(pixel, area.top);
      ctx.lineTo(pixel, area.bottom);
      ctx.stroke();
    }
    ctx.restore();
  }

  setCursor(x) {
    this.cursor = x;
    const values = x === null ? [] : this.valuesAt(x);
    this.box.hidden = !values.length;
    if (values.length) {
      const head = document.createElement("b");
      head.textContent = settings.axis === "step" ? `${this.words.step} ${this.axis.text(x)}` : this.axis.text(x);
      this.box.replaceChildren(head, ...values.map(({ label, stroke, y }) => {
        const line = document.createElement("span");
        const mark = line.appendChild(document.createElement("i"));
        mark.style.background = stroke;
        line.append(`${label} `);
        line.appendChild(document.createElement("b")).textContent = number(y);
        return line;
      }));
      const pixel = this.scale.getPixelForValue(x);
      const isRight = pixel > this.element.clientWidth / 2;
      this.box.style.left = isRight ? "" : `${pixel + 12}px`;
      this.box.style.right = isRight ? `${this.element.clientWidth - pixel + 12}px` : "";
    }
    this.chart.draw();
  }

  valuesAt(x) {
    return this.curves.map(({ label, stroke, points }) => ({ label, stroke, y: nearest(points, x)?.y }))
      .filter(({ y }) => y !== undefined);
  }

  // Returns the place of a pointer on the x axis.
  valueAt(event) {
    const { left } = this.canvas.getBoundingClientRect();
    return this.scale.getValueForPixel(event.clientX - left);
  }

  // Returns the place of the first curve's nearest point; null: it has none.
  snapped(x) {
    return nearest(this.curves[0]?.points ?? [], x)?.x ?? null;
  }

  move(event) {
    if (this.from !== null) {
      const { left, right } = this.chart.chartArea;
      this.to = Math.min(right, Math.max(left, event.clientX - this.canvas.getBoundingClientRect().left));
      this.chart.draw();
    } else setCursor(this.snapped(this.valueAt(event)));
  }

  press(event) {
    if (event.button !== 0 || event.pointerType === "touch") return; // a finger moves the cursor
    this.from = event.clientX - this.canvas.getBoundingClientRect().left;
    this.to = undefined;
    this.element.setPointerCapture(event.pointerId);
    setCursor(null);
  }

  release() {
    const { from, to } = this;
    this.from = null;
    this.to = undefined;
    if (from === null) return;
    if (to === undefined || Math.abs(to - from) < 8) this.chart.draw();
    else showPart([from, to].map((pixel) => this.scale.getValueForPixel(pixel)).sort((a, b) => a - b));
  }

  key(event) {
    const points = (this.curves[0]?.points ?? [])
      .filter(({ x }) => !shown || (x >= shown[0] && x <= shown[1]));
    if (event.key === "Escape") return showPart(null);
    const now = this.cursor === undefined || this.cursor === null ? -1 : lowerBound(points, this.cursor, (point) => point.x);
    const stride = event.shiftKey ? 10 : 1;
    const places = { ArrowLeft: now - stride, ArrowRight: now + stride, Home: 0, End: points.length - 1 };
    if (!(event.key in places) || !points.length) return undefined;
    event.preventDefault();
    return setCursor(points[Math.min(points.length - 1, Math.max(0, places[event.key]))].x);
  }

  // The values as a table, of some steps, once a person has opened it.
  fillTable() {
    const target = this.element.closest("figure").querySelector("[id^=values-]");
    if (!target?.closest("details").open || !this.curves.length) return;
    const { points } = this.curves[0];
    const stride = Math.max(1, Math.ceil(points.length / ROWS));
    const rows = points.filter((_point, index) => index % stride === 0 || index === points.length - 1);
    const table = document.createElement("table");
    const addRow = (cells, tag, parent) => {
      const row = parent.appendChild(document.createElement("tr"));
      cells.forEach((text) => { row.appendChild(document.createElement(tag)).textContent = text; });
    };
    addRow([this.words.step, ...this.curves.map(({ label }) => label)], "th", table.createTHead());
    const body = table.createTBody();
    rows.forEach(({ x, step }) => {
      addRow([step.toLocaleString(), ...this.valuesAt(x).map(({ y }) => number(y))], "td", body);
    });
    target.replaceChildren(table);
  }
}

function setCursor(x) {
  plots.forEach((plot) => plot.setCursor(x));
}

function showPart(part) {
  shown = part;
  drawAll();
}

function save() {
  sessionStorage.setItem(KEY, JSON.stringify(settings));
  drawAll();
}

document.addEventListener("input", (event) => {
  if (event.target.id === "chart-axis") {
    settings.axis = event.target.value;
    shown = null;
    save();
  } else if (event.target.id === "chart-smoothing") {
    settings.smoothing = Number(event.target.value);
    save();
  }
});
document.addEventListener("click", (event) => {
  if (event.target.id === "chart-reset") showPart(null);
});
document.addEventListener("toggle", (event) => {
  if (event.target.matches?.(".chart-values")) drawAll();
}, true);
// The colours follow the scheme of the page.
new MutationObserver(drawAll).observe(document.body, { attributes: true, attributeFilter: ["class"] });
matchMedia("(prefers-color-scheme: dark)").addEventListener("change", drawAll);
