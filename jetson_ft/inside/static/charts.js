// Elements, bars, curves and heat maps of the views. Texts are set as text, never as HTML.

// Returns an element; `attributes` with a function as value are event listeners.
export function make(tag, attributes = {}, ...children) {
  const node = document.createElement(tag);
  for (const [name, value] of Object.entries(attributes)) {
    if (typeof value === "function") node.addEventListener(name, value);
    else if (value === true) node.setAttribute(name, "");
    else if (value !== false && value != null) node.setAttribute(name, value);
  }
  node.append(...children.flat().filter((child) => child != null));
  return node;
}

function shape(tag, attributes, text) {
  const node = document.createElementNS("http://www.w3.org/2000/svg", tag);
  for (const [name, value] of Object.entries(attributes)) node.setAttribute(name, value);
  if (text !== undefined) node.textContent = text;
  return node;
}

// Returns a number with few digits: 0.0123, 1.5, 12, 1,234.
export function short(value) {
  if (value == null) return "–";
  const size = Math.abs(value);
  if (size && size < 0.001) return value.toExponential(1);
  if (size >= 1000) return Math.round(value).toLocaleString("en");
  return String(Number(value.toPrecision(3)));
}

export function percent(value) {
  if (value == null) return "–";
  if (value > 0 && value < 0.00005) return "< 0.01 %";
  return `${(100 * value).toFixed(value >= 0.0995 || !value ? 0 : value >= 0.001 ? 1 : 2)} %`;
}

export function bytes(value) {
  const units = ["B", "kB", "MB", "GB", "TB"];
  let unit = 0;
  while (value >= 999.5 && unit < 4) [value, unit] = [value / 1000, unit + 1];
  return `${value >= 100 || !unit ? value.toFixed(0) : value.toPrecision(3)} ${units[unit]}`;
}

export function count(value) {
  if (value >= 1e9) return `${(value / 1e9).toFixed(2)} B`;
  return value >= 1e6 ? `${(value / 1e6).toFixed(1)} M` : value.toLocaleString("en");
}

// A titled part of a view: heading, what it shows, its content.
export function panel(title, note, ...content) {
  return make("section", { class: "panel" }, make("h3", {}, title),
    note ? make("p", { class: "note" }, note) : null, ...content);
}

// A labelled choice; `options` are pairs of value and text. `change` gets the value.
export function choice(label, options, value, change) {
  const select = make("select", { "aria-label": label, change: () => change(select.value) },
    options.map(([key, text]) => make("option", { value: key, selected: String(key) === String(value) }, text)));
  return make("label", { class: "choice" }, make("span", {}, label), select);
}

// A choice of few: buttons of which one is pressed.
export function toggle(label, options, value, change) {
  const buttons = options.map(([key, text]) => make("button", {
    type: "button", "aria-pressed": String(key === value), click: () => {
      for (const each of buttons) each.setAttribute("aria-pressed", String(each === buttons[keys.indexOf(key)]));
      change(key);
    },
  }, text));
  const keys = options.map(([key]) => key);
  return make("div", { class: "choice", role: "group", "aria-label": label },
    make("span", {}, label), make("div", { class: "toggle" }, buttons));
}

export const tiles = (pairs) => make("dl", { class: "tiles" },
  pairs.map(([name, value]) => make("div", {}, make("dt", {}, name), make("dd", {}, value))));

// The text of tokens: their bytes together, as a part of a character is none by itself.
export const decode = (tokens) => new TextDecoder().decode(Uint8Array.from(
  tokens.flatMap((token) => (token.bytes ? token.bytes.split(" ") : [])), (byte) => parseInt(byte, 16)));

export function legend(entries) {
  return make("p", { class: "key" }, entries.map(([style, text]) =>
    make("span", {}, make("i", { class: style }), text)));
}

export function table(head, rows, style = "") {
  return make("div", { class: "scroll", tabindex: 0 }, make("table", { class: style },
    make("thead", {}, make("tr", {}, head.map((text) => make("th", { scope: "col" }, text)))),
    make("tbody", {}, rows.map((row) => make("tr", {}, row.map((cell, index) =>
      make(index ? "td" : "th", index ? {} : { scope: "row" }, cell)))))));
}

// Stacked horizontal bars. A row has `label`, `value` (text) and `parts`: {style, name, size}.
// `limit` draws a line at a size, with its text.
export function stackedBars(rows, format, limit = null) {
  const sums = rows.map((row) => row.parts.reduce((sum, part) => sum + part.size, 0));
  const largest = Math.max(...sums, limit && limit.size < 4 * Math.max(...sums) ? limit.size : 0) || 1;
  const bars = rows.map((row) => make("div", { class: "row" },
    make("span", { class: "label" }, row.label),
    make("span", { class: "track" },
      row.parts.filter((part) => part.size).map((part) => {
        const text = `${row.label}: ${part.name} ${format(part.size)}`;
        return make("i", { class: part.style, tabindex: 0, role: "img", "aria-label": text,
          "data-hint": text, style: `width:${(100 * part.size) / largest}%` });
      }),
      limit && limit.size <= largest
        ? make("b", { class: "limit", style: `left:${(100 * limit.size) / largest}%`, "data-hint": limit.text }) : null),
    make("span", { class: "value" }, row.value)));
  return make("div", { class: "bars" }, bars);
}

// Shows the text of `data-hint` beside what the pointer or the focus is on, inside `root`.
export function hints(root) {
  const box = make("div", { class: "hint", hidden: true });
  root.append(box);
  const show = (event) => {
    if (event.target.closest?.(".plot, .heat")) return; // these place it themselves
    const target = event.target.closest?.("[data-hint]");
    if (!target || !root.contains(target)) return void (box.hidden = true);
    const area = target.getBoundingClientRect();
    const x = event.type === "pointermove" ? event.clientX : area.left + Math.min(area.width / 2, 60);
    moveHint(root, target.dataset.hint, x, area.top);
  };
  for (const type of ["pointermove", "focusin"]) root.addEventListener(type, show);
  for (const type of ["pointerleave", "focusout"]) root.addEventListener(type, () => (box.hidden = true));
}

// Places the hint above a point of the window, inside `root`; no text hides it.
function moveHint(root, text, x, y) {
  const box = root.querySelector(":scope > .hint");
  box.hidden = !text;
  if (!text) return;
  box.textContent = text;
  const area = root.getBoundingClientRect();
  const left = Math.max(0, Math.min(area.width - box.offsetWidth, x - area.left - box.offsetWidth / 2));
  box.style.left = `${left}px`;
  box.style.top = `${y - area.top - box.offsetHeight - 8}px`;
}

const painted = new Set(); // [node, paint] of what has colours that CSS doesn't set

function paintAll() {
  heatStops = null;
  forgetRemoved();
  for (const [, paint] of painted) paint();
}
matchMedia("(prefers-color-scheme: dark)").addEventListener("change", paintAll);
new MutationObserver(paintAll).observe(document.body, { attributeFilter: ["class"] });

// Forgets what has been taken out of the document since.
export function forgetRemoved() {
  for (const each of painted) if (!each[0].isConnected) painted.delete(each);
}

// Calls `paint` whenever the theme changes, as long as the node is in the document.
export const onTheme = (node, paint) => painted.add([node, paint]);

// Calls `paint` with the width of `box` whenever that or the theme changes.
function repaint(box, paint) {
  let width = 0;
  new ResizeObserver(() => {
    if (box.clientWidth && box.clientWidth !== width) paint((width = box.clientWidth));
  }).observe(box);
  onTheme(box, () => box.clientWidth && paint(box.clientWidth));
}

function ticks(low, high, wanted) {
  const span = high - low || 1, power = 10 ** Math.floor(Math.log10(span / wanted));
  const step = [1, 2, 2.5, 5, 10].map((m) => m * power).find((size) => span / size <= wanted);
  const result = [];
  for (let n = Math.ceil(low / step - 1e-9); n * step <= high + 1e-9 * span; n++) result.push(Number((n * step).toPrecision(10)));
  return result;
}

// Curves over a common x. A series has `style`, `name` and `values`; `steps` draws them as the
// outline of a histogram. `describe(index)` is the text of a place, for pointer and arrow keys.
export function plot({ x, series, xLabel, yLabel, describe, steps = false, fill = false, height = 220, top, low = 0, whole = false, sticks = [], picked = null }) {
  const box = make("div", { class: "plot", tabindex: 0, role: "img", "aria-label": `${yLabel}; ${xLabel}` });
  let at = -1, place = () => {};
  const all = [...series.flatMap((each) => each.values), ...sticks.map((each) => each.value)];
  const high = top ?? (Math.max(...all.filter((value) => value != null)) || 1);
  const paint = (width) => {
    const left = 64, right = width - 12, bottom = height - 40, start = 12;
    const half = steps ? (x[1] - x[0]) / 2 : 0, first = x[0] - half, last = x.at(-1) + half;
    const toX = (value) => left + ((right - left) * (value - first)) / (last - first || 1);
    const toY = (value) => bottom - ((bottom - start) * (value - low)) / (high - low || 1);
    const svg = shape("svg", { width, height, viewBox: `0 0 ${width} ${height}` });
    for (const tick of ticks(low, high, 4)) {
      svg.append(shape("line", { class: "grid", x1: left, x2: right, y1: toY(tick), y2: toY(tick) }),
        shape("text", { x: left - 8, y: toY(tick) + 4, "text-anchor": "end" }, short(tick)));
    }
    for (const tick of ticks(first, last, Math.max(4, Math.floor(width / 90))).filter((tick) => !whole || Number.isInteger(tick))) {
      svg.append(shape("text", { x: toX(tick), y: bottom + 18, "text-anchor": "middle" }, short(tick)));
    }
    svg.append(shape("line", { class: "axis", x1: left, x2: right, y1: bottom, y2: bottom }),
      shape("text", { class: "axis-label", x: (left + right) / 2, y: height - 4, "text-anchor": "middle" }, xLabel),
      shape("text", { class: "axis-label", x: 0, y: 0, transform: `translate(11 ${(start + bottom) / 2}) rotate(-90)`, "text-anchor": "middle" }, yLabel));
    for (const each of sticks) svg.append(shape("line", { class: `stick ${each.style}`, x1: toX(each.x), x2: toX(each.x), y1: bottom, y2: toY(each.value) }));
    for (const { style, values } of series) {
      const points = values.flatMap((value, index) => value == null ? [] : steps
        ? [[toX(x[index] - half), toY(value)], [toX(x[index] + half), toY(value)]]
        : [[toX(x[index]), toY(value)]]);
      const line = points.map((point) => point.join(" ")).join(" L ");
      if (fill) svg.append(shape("path", { class: `area ${style}`, d: `M ${points[0][0]} ${bottom} L ${line} L ${points.at(-1)[0]} ${bottom} Z` }));
      svg.append(shape("path", { class: `curve ${style}`, d: `M ${line}` }));
    }
    const cursor = shape("g", { class: "cursor" });
    svg.append(cursor);
    box.replaceChildren(svg);
    place = (index, show = true) => {
      at = Math.max(0, Math.min(x.length - 1, index));
      const to = toX(x[at]);
      cursor.replaceChildren(shape("line", { x1: to, x2: to, y1: start, y2: bottom }),
        ...series.filter((each) => each.values[at] != null).map((each) =>
          shape("circle", { class: each.style, cx: to, cy: toY(each.values[at]), r: 4 })));
      const area = box.getBoundingClientRect();
      if (show) moveHint(box.closest(".inside"), describe(at), area.left + to, area.top + start);
    };
    box.onpointermove = (event) => {
      const value = first + ((event.clientX - box.getBoundingClientRect().left - left) / (right - left)) * (last - first);
      let nearest = 0;
      for (let i = 1; i < x.length; i++) if (Math.abs(x[i] - value) < Math.abs(x[nearest] - value)) nearest = i;
      place(nearest);
    };
  };
  const clear = () => { box.querySelector(".cursor")?.replaceChildren(); moveHint(box.closest(".inside"), ""); };
  box.addEventListener("pointerleave", clear);
  box.addEventListener("blur", clear);
  if (picked) box.addEventListener("click", () => at >= 0 && picked(at));
  box.addEventListener("keydown", (event) => {
    const step = { ArrowLeft: -1, ArrowRight: 1 }[event.key];
    if (step) { event.preventDefault(); place(at + step); }
  });
  repaint(box, paint);
  return box;
}

// --- heat maps ---

const STOPS = 6; // --heat-0 to --heat-5
let heatStops = null; // their colours in this theme, once they are known

// Returns the red, green and blue of each stop of the scale, from the style sheet.
function readStops(node) {
  const probe = node.appendChild(make("i"));
  const context = make("canvas", { width: 1, height: 1 }).getContext("2d", { willReadFrequently: true });
  const stops = Array.from({ length: STOPS }, (_, index) => {
    probe.style.color = `var(--heat-${index})`;
    context.fillStyle = getComputedStyle(probe).color;
    context.fillRect(0, 0, 1, 1);
    return [...context.getImageData(0, 0, 1, 1).data.slice(0, 3)];
  });
  // Out of the document, or before the style sheet is loaded, there are none.
  if (getComputedStyle(probe).getPropertyValue("--heat-0")) heatStops = stops;
  probe.remove();
  return stops;
}

// Returns a function from a share of the scale to its colour and that of text on it, in this theme.
export function heatColours(node) {
  const stops = heatStops ?? readStops(node);
  return (share) => {
    const place = Math.max(0, Math.min(1, share)) * (STOPS - 1), index = Math.min(STOPS - 2, Math.floor(place));
    const mixed = stops[index].map((low, n) => Math.round(low + (stops[index + 1][n] - low) * (place - index)));
    const isLight = 0.3 * mixed[0] + 0.59 * mixed[1] + 0.11 * mixed[2] > 135;
    return [`rgb(${mixed.join(" ")})`, `var(--on-heat-${isLight ? "light" : "dark"})`];
  };
}

// The scale with its values: `max` and, with `root`, as square roots, where small values differ more.
export function heatLegend(label, max, format, root) {
  const at = (share) => max * (root ? share ** 2 : share);
  return make("div", { class: "heat-key" }, make("span", {}, label), make("i"),
    make("div", {}, [0, 0.25, 0.5, 0.75, 1].map((share) => make("span", {}, format(at(share))))));
}

// A map of `rows` x `columns` (labels); `value(row, column)` is a number, or null where masked. `max`
// is the value of the scale's end, or a function of it.
export function heatMap({ rows, columns, value, max, format, describe, root = false, rowTitle = "", columnTitle = "", maxCell = 30, slanted = true, pick = null, moved = null }) {
  const readout = make("p", { class: "readout", "aria-live": "polite" }, " ");
  const canvas = make("canvas", { tabindex: 0, role: "application", "aria-label": `${rowTitle} × ${columnTitle}` });
  const box = make("div", { class: "heat" }, canvas);
  let at = null, geometry = null, paintCell = null;
  const paint = (width) => {
    const style = getComputedStyle(box), font = `12px ${style.fontFamily}`;
    const context = canvas.getContext("2d");
    context.font = font;
    const measure = (labels) => Math.min(110, Math.max(8, ...labels.map((text) => context.measureText(text).width)));
    // Whole numbers: a cell is painted again alone.
    const left = Math.ceil(measure(rows)) + 14, right = slanted ? 24 : 2;
    const top = Math.ceil(slanted ? measure(columns) * 0.82 + 16 : 22) + 4;
    const cell = Math.max(11, Math.min(maxCell, Math.floor((width - left - right) / columns.length)));
    const high = slanted ? cell : 24;
    const size = [left + cell * columns.length + right, top + high * rows.length + 2];
    const ratio = devicePixelRatio || 1;
    [canvas.width, canvas.height] = size.map((length) => Math.ceil(length * ratio));
    [canvas.style.width, canvas.style.height] = size.map((length) => `${length}px`);
    context.scale(ratio, ratio);
    context.font = font;
    geometry = { left, top, cell, high };
    const limit = typeof max === "function" ? max() : max;
    const colour = heatColours(box), ink = style.color;
    const fit = (text, room) => {
      if (context.measureText(text).width <= room) return text;
      while (text && context.measureText(`${text}…`).width > room) text = text.slice(0, -1);
      return `${text}…`;
    };
    context.fillStyle = ink;
    context.textBaseline = "middle";
    const every = (length) => Math.ceil(16 / length); // 16: pixels from one label to the next
    rows.forEach((text, row) => {
      if (row % every(high)) return;
      context.textAlign = "right";
      context.fillText(fit(text, 110), left - 8, top + high * (row + 0.5));
    });
    columns.forEach((text, column) => {
      if (column % every(cell)) return;
      context.save();
      context.translate(left + cell * (column + 0.5), top - 8);
      if (slanted) context.rotate(-0.95);
      context.textAlign = slanted ? "left" : "center";
      context.fillText(fit(text, slanted ? 110 : cell * every(cell) - 2), 0, slanted ? 0 : -4);
      context.restore();
    });
    const gap = cell > 14 ? 1 : 0;
    paintCell = (row, column) => {
      const shown = value(row, column), x = left + cell * column, y = top + high * row;
      if (shown == null) {
        context.save();
        context.beginPath(); context.rect(x, y, cell - gap, high - gap); context.clip();
        context.clearRect(x, y, cell - gap, high - gap);
        context.strokeStyle = ink; context.lineWidth = 1; context.globalAlpha = 0.16; context.beginPath();
        for (let line = -high; line < cell; line += 5) {
          context.moveTo(x + line, y + high); context.lineTo(x + line + high, y);
        }
        context.stroke(); context.restore();
      } else {
        const share = shown / (limit || 1);
        [context.fillStyle] = colour(root ? Math.sqrt(Math.max(0, share)) : share);
        context.fillRect(x, y, cell - gap, high - gap);
      }
      if (at?.[0] !== row || at[1] !== column) return;
      context.strokeStyle = ink; context.lineWidth = 2; // inside the cell
      context.strokeRect(x + 1, y + 1, cell - gap - 2, high - gap - 2);
    };
    rows.forEach((_, row) => columns.forEach((__, column) => paintCell(row, column)));
  };
  const readOut = (row, column) => {
    const shown = value(row, column);
    readout.textContent = describe(row, column, shown == null ? null : format(shown));
  };
  const mark = (row, column) => {
    const before = at;
    at = [row, column];
    readOut(row, column);
    if (before) paintCell?.(...before);
    paintCell?.(row, column);
  };
  const move = (row, column) => {
    const isHere = at && at[0] === row && at[1] === column;
    if (isHere || row < 0 || column < 0 || row >= rows.length || column >= columns.length) return;
    mark(row, column);
    moved?.(row, column);
    const area = canvas.getBoundingClientRect(), { left, top, cell, high } = geometry;
    moveHint(box.closest(".inside"), readout.textContent, area.left + left + cell * (column + 0.5), area.top + top + high * row);
  };
  const leave = () => moveHint(box.closest(".inside"), "");
  canvas.addEventListener("pointerleave", leave);
  canvas.addEventListener("blur", leave);
  const cellAt = (event) => {
    const area = canvas.getBoundingClientRect();
    return [Math.floor((event.clientY - area.top - geometry.top) / geometry.high),
      Math.floor((event.clientX - area.left - geometry.left) / geometry.cell)];
  };
  canvas.addEventListener("pointermove", (event) => move(...cellAt(event)));
  canvas.addEventListener("click", (event) => { move(...cellAt(event)); if (at) pick?.(...at); });
  canvas.addEventListener("keydown", (event) => {
    const step = { ArrowUp: [-1, 0], ArrowDown: [1, 0], ArrowLeft: [0, -1], ArrowRight: [0, 1] }[event.key];
    if (step) { event.preventDefault(); move(...(at ? [at[0] + step[0], at[1] + step[1]] : [0, 0])); }
    if (event.key === "Enter" && at) pick?.(...at);
  });
  repaint(box, paint);
  const axes = make("p", { class: "axes" }, rowTitle ? make("span", {}, `↓ ${rowTitle}`) : null,
    columnTitle ? make("span", {}, `→ ${columnTitle}`) : null);
  const map = make("div", { class: "map" }, axes, box, readout);
  const update = () => {
    if (box.clientWidth) paint(box.clientWidth);
    if (at) readOut(...at);
  };
  return { map, mark, update };
}
