// The views of a text: its tokens, and what each of them attends to.
import { choice, decode, heatColours, heatLegend, heatMap, legend, make, onTheme, panel, short, percent, tiles, toggle } from "./charts.js";

// A token's text with spaces, line ends and control characters visible, or its bytes where these are
// no whole characters.
const VISIBLE = { " ": "·", "\n": "↵", "\t": "→" };
const visible = (character) => VISIBLE[character] ?? `\\u${character.codePointAt(0).toString(16).padStart(4, "0")}`;
export const tokenText = (token) => (token.text == null ? `‹${token.bytes}›` : token.text.replace(/\s|\p{C}/gu, visible) || "∅");

const SMALL = "₁₂₃₄";
const isPart = (token) => token.text == null;

// The hexadecimal bytes at the end of the tokens that begin a character but don't complete it.
export function partBefore(tokens) {
  const bytes = [];
  for (const token of tokens.toReversed()) {
    if (!isPart(token)) break;
    bytes.unshift(...token.bytes.split(" "));
  }
  const start = bytes.findLastIndex((byte) => parseInt(byte, 16) >= 0xc0);
  const length = (byte) => (byte >= 0xf0 ? 4 : byte >= 0xe0 ? 3 : 2);
  if (start < 0 || bytes.length - start >= length(parseInt(bytes[start], 16))) return "";
  return bytes.slice(start).join(" ");
}

// The texts of tokens in a row: parts of a character are its first, second, … part: 猫₁ 猫₂.
export function labelled(tokens) {
  const texts = tokens.map(tokenText);
  for (let start = 0; start < tokens.length; start++) {
    if (!isPart(tokens[start]) || partBefore(tokens.slice(0, start))) continue;
    let end = start;
    while (end < tokens.length && isPart(tokens[end]) && partBefore(tokens.slice(start, end + 1))) end++;
    const whole = decode(tokens.slice(start, end + 1));
    if (end >= tokens.length || whole.includes("\ufffd")) continue;
    for (let at = start; at <= end; at++) texts[at] = whole.replace(/ /g, "·") + (SMALL[at - start] ?? "₊");
    start = end;
  }
  return texts;
}

// Tokens in a row, of which one is current: pointer, click and arrow keys choose it.
export function chips(tokens, options) {
  const { label, style = () => "", text = tokenText, chosen } = options;
  const nodes = tokens.map((token, index) => make("span", {
    class: `chip ${style(token, index)}`, role: "option", tabindex: index ? -1 : 0,
    pointerenter: () => chosen(index), click: () => focus(index), focus: () => chosen(index),
  }, text(token, index)));
  const focus = (index) => {
    const node = nodes[Math.max(0, Math.min(nodes.length - 1, index))];
    for (const each of nodes) each.tabIndex = each === node ? 0 : -1;
    node.focus();
  };
  const row = make("div", { class: "chips", role: "listbox", "aria-label": label, keydown: (event) => {
    const step = { ArrowLeft: -1, ArrowRight: 1, Home: -tokens.length, End: tokens.length }[event.key];
    if (step) { event.preventDefault(); focus(nodes.indexOf(document.activeElement) + step); }
  } }, nodes);
  return { row, nodes, mark: (index) => nodes.forEach((node, at) => node.setAttribute("aria-selected", at === index)) };
}

export function drawTokens(root, data, t) {
  const has = (role) => data.tokens.some((token) => token.role === role);
  const rate = (name) => short(data.scripts[name].tokens_per_character);
  root.append(tiles([
    [t("tokens"), data.tokens.length], [t("characters"), data.scripts.all.characters], [t("per_character"), rate("all")],
    [t("per_chinese"), rate("chinese")], [t("per_latin"), rate("latin")],
  ]));
  const readout = make("p", { class: "readout", "aria-live": "polite" }, t("choose_token"));
  const isTrained = (token) => token.role === "answer" || token.role === "end";
  const names = labelled(data.tokens), place = make("div"), roles = { context: t("context"), answer: t("trained_on"), end: t("trained_on") };
  const show = (shown) => {
    const texts = { text: (_, index) => names[index], id: (token) => String(token.id), bytes: (token) => token.bytes };
    const { row, mark } = chips(data.tokens, {
      label: t("tokens_heading"), text: texts[shown],
      style: (token, index) => (has("context") && !isTrained(token) ? "context" : `tint${index % 5}`) + (isTrained(token) ? " trained" : ""),
      chosen: (index) => {
        const token = data.tokens[index];
        mark(index);
        readout.textContent = [`${index}: ${names[index]}`, t("token_id", { id: token.id }), t("token_bytes", { bytes: token.bytes }),
          token.is_special ? t("special") : "", roles[token.role] ?? ""].filter(Boolean).join("  ·  ");
      },
    });
    place.replaceChildren(row);
  };
  root.append(panel(t("text_as_tokens"), t("text_as_tokens_note"),
    make("div", { class: "choices" }, toggle(t("show"), [["text", t("text")], ["id", t("ids")], ["bytes", t("bytes")]], "text", show)),
    has("context") ? legend([["context-key", t("context")], ["trained-key", t("trained_on")]]) : null, place, readout));
  show("text");
  if (!data.split_characters.length) return;
  root.append(panel(t("split_title"), t("split_note"), make("div", { class: "split" }, data.split_characters.map((each) => {
    const parts = splitBytes(each, data.tokens);
    return make("figure", {}, make("b", {}, each.character), make("span", { class: "byte-row" }, parts.map((part, index) =>
      make("span", { class: `bytes tint${index % 5}`, tabindex: 0, "data-hint": `${t("token_id", { id: data.tokens[part.at].id })} · ${part.bytes.join(" ")}` }, part.bytes.join(" ")))));
  }))));
}

// The bytes of a character, by the token that they are in.
function splitBytes(each, tokens) {
  const owned = each.tokens.flatMap((at) => tokens[at].bytes.split(" ").map((byte) => ({ byte, at })));
  const wanted = each.bytes.split(" ");
  let start = owned.findIndex((_, from) => wanted.every((byte, index) => owned[from + index]?.byte === byte));
  const parts = [];
  for (const { byte, at } of owned.slice(start < 0 ? 0 : start).slice(0, wanted.length)) {
    if (parts.at(-1)?.at === at) parts.at(-1).bytes.push(byte);
    else parts.push({ at, bytes: [byte] });
  }
  return parts;
}

// --- attention ---

export function drawAttention(root, data, t, reload) {
  const sides = Object.keys(data.sides), tokens = data.tokens, labels = labelled(tokens);
  const numbered = (index) => `${index}: ${labels[index]}`;
  const layersShown = data.sides[sides[0]].layers.map((each) => each.layer);
  const state = { layer: layersShown[Math.floor(layersShown.length / 2)], head: "mean" };
  const matrix = (side) => {
    if (state.layer === "rollout") return withoutFirst(data.sides[side].rollout);
    const layer = data.sides[side].layers.find((each) => each.layer === state.layer);
    return state.head === "mean" ? layer.mean : layer.heads[state.head];
  };
  let current = Object.fromEntries(sides.map((side) => [side, matrix(side)])); // the chosen maps
  // Why a cell has no value: the row is the token that attends.
  const absent = (r, c) => {
    if (state.layer === "rollout" && !c) return t("left_out", { token: numbered(c) });
    return c > r ? t("masked", { from: numbered(r), to: numbered(c) }) : t("masked_short");
  };
  let row = tokens.length - 1;
  const readout = make("p", { class: "readout" }), flow = make("div", { class: "pair" });
  const maps = {}, flows = {};
  const showRow = (index) => {
    row = index;
    readout.textContent = t("attends", { token: numbered(row) });
    for (const side of sides) flows[side](current[side][row]);
  };
  const cards = sides.map((side) => {
    const map = heatMap({
      rows: labels, columns: labels, value: (r, c) => current[side][r][c], max: 1, root: true, format: percent,
      rowTitle: t("query_token"), columnTitle: t("key_token"), maxCell: 26,
      describe: (r, c, text) => (text == null ? absent(r, c)
        : t("attention_of", { from: numbered(r), to: numbered(c), value: text })),
      moved: (r, c) => {
        for (const other of sides) if (other !== side) maps[other].mark(r, c);
        if (r !== row) showRow(r);
      },
    });
    maps[side] = map;
    const { row: line, nodes } = chips(tokens, { label: t(side), text: (_, index) => labels[index], chosen: showRow });
    flows[side] = (weights) => {
      const colour = heatColours(line);
      nodes.forEach((node, index) => {
        const weight = weights[index];
        node.classList.toggle("masked", weight == null);
        node.classList.toggle("current", index === row);
        [node.style.background, node.style.color] = weight == null ? ["", ""] : colour(Math.sqrt(weight));
        node.dataset.hint = weight == null ? absent(row, index) : percent(weight);
      });
    };
    flow.append(make("div", {}, make("p", { class: `side ${side}` }, t(side)), line));
    return make("div", {}, make("p", { class: `side ${side}` }, t(side)), map.map);
  });
  const heads = make("div", { class: "thumbnails" }), choices = make("div", { class: "choices" });
  const headPanel = panel(t("heads_title"), t("heads_note"), heads), key = make("div", { class: "keys" }), note = make("p", { class: "note" });
  const show = () => {
    const layers = Object.keys(data.heads).map(Number).filter((layer) => reload || layersShown.includes(layer));
    const headCount = data.heads[state.layer] ?? 0, isRollout = state.layer === "rollout";
    note.textContent = isRollout ? t("rollout_note") : "";
    key.replaceChildren(heatLegend(t("probability"), 1, percent, true), legend([["masked-key", t(isRollout ? "masked_or_first" : "masked_short")]]));
    headPanel.hidden = isRollout;
    choices.replaceChildren(...[
      choice(t("layer"), [...layers.map((layer) => [layer, String(layer)]), ["rollout", t("rollout")]], state.layer, (value) => {
        state.layer = value === "rollout" ? value : Number(value);
        if (value !== "rollout" && !layersShown.includes(state.layer)) return reload({ layers: [state.layer] });
        if (!data.heads[state.layer]) state.head = "mean";
        show();
      }),
      isRollout ? null : choice(t("head"), [["mean", t("head_mean")], ...Array.from({ length: headCount }, (_, head) => [head, String(head)])],
        state.head, (value) => { state.head = value; show(); })].filter(Boolean));
    current = Object.fromEntries(sides.map((side) => [side, matrix(side)]));
    for (const side of sides) maps[side].update();
    showRow(row);
    drawThumbnails();
  };
  const drawThumbnails = () => {
    const side = sides.at(-1), layer = data.sides[side].layers.find((each) => each.layer === state.layer);
    heads.replaceChildren(...(layer ? Object.entries(layer.heads) : []).map(([head, values]) => {
      return make("button", { type: "button", "aria-pressed": String(head === String(state.head)), "aria-label": `${t("head")} ${head}`,
        click: () => { state.head = head; show(); } }, thumbnail(values, root), make("span", {}, `${t("head")} ${head}`));
    }));
  };
  root.append(panel(t("map_title"), t("map_note"), choices, note, key,
    make("div", { class: "pair" }, cards)));
  root.append(panel(t("flow_title"), t("flow_note"), readout, flow));
  root.append(headPanel);
  onTheme(root, show);
  requestAnimationFrame(show); // the scale's colours are known once the view is in the document
}

// Shares of the tokens after the first: over many layers nearly all of a rollout comes from that one.
const withoutFirst = (matrix) => matrix.map((row) => {
  const rest = row.slice(1).reduce((sum, value) => sum + value, 0);
  return row.map((value, column) => (!column || value == null ? null : rest && value / rest));
});

function thumbnail(values, node) {
  const size = values.length, canvas = make("canvas", { width: size, height: size });
  const context = canvas.getContext("2d"), colour = heatColours(node);
  values.forEach((row, y) => row.forEach((value, x) => {
    if (value == null) return;
    [context.fillStyle] = colour(Math.sqrt(value));
    context.fillRect(x, y, 1, 1);
  }));
  return canvas;
}

// --- one head with its numbers ---

export function drawAttentionExample(root, data, t) {
  const place = make("div", { class: "steps" }), sides = Object.keys(data.sides), labels = labelled(data.tokens);
  const numbered = (index) => `${index}: ${labels[index]}`;
  const strip = (name, values, note) => {
    const most = Math.max(...values.map(Math.abs)) || 1;
    return make("div", { class: "vector" }, make("span", { class: "name" }, name),
      make("span", { class: "strip" }, values.map((value, index) => make("i", {
        "data-hint": `${name}[${index}] = ${short(value)}`,
        style: `background:color-mix(in srgb, var(--curve-${value < 0 ? 2 : 1}) ${Math.round((100 * Math.abs(value)) / most)}%, var(--card))`,
      }))),
      make("code", {}, `${note}   [${values.slice(0, 5).map(short).join(", ")}, …]`));
  };
  const show = (side) => {
    const example = data.sides[side], [own, other] = example.tokens, to = data.other;
    const from = numbered(data.position), target = numbered(to);
    const seen = data.tokens.map((token, index) => ({ token, index })).filter(({ index }) => example.products[index] != null);
    const most = Math.max(...seen.map(({ index }) => example.softmax[index]));
    const rows = seen.map(({ index }) => make("tr", { class: index === to ? "current" : "" },
      make("th", { scope: "row" }, numbered(index)), make("td", {}, short(example.products[index])), make("td", {}, short(example.scaled[index])),
      make("td", { class: "bar-cell" }, make("i", { class: "tuned-bar", style: `width:${(100 * example.softmax[index]) / most}%` })),
      make("td", {}, example.softmax[index].toFixed(4))));
    place.replaceChildren(
      panel(t("example_vectors"), t("example_vectors_note", { from, to: target, size: own.query.length }),
        strip("q", own.query, from), strip("k", other.key, target), strip("v", other.value, target)),
      panel(t("example_score"), t("example_score_note"), make("p", { class: "formula" },
        `q · k = ${short(example.products[to])}   →   ${data.softcap ? `softcap(` : ""}${short(example.products[to])} × ${short(data.scaling)}${data.softcap ? ")" : ""} = ${short(example.scaled[to])}   →   softmax = ${example.softmax[to].toFixed(4)}`),
        make("div", { class: "scroll tall", tabindex: 0 }, make("table", {}, make("thead", {}, make("tr", {},
          [t("key_token"), "q · k", `× ${short(data.scaling)}`, "", "softmax"].map((text) => make("th", { scope: "col" }, text)))), make("tbody", {}, rows)))),
      panel(t("example_sum"), t("example_sum_note", { difference: short(example.difference) }),
        strip("Σ p v", example.output, from),
        make("p", { class: "note" }, Object.entries(data.shapes).map(([name, shape]) => `${name} [${shape.join(" × ")}]`).join("   "))));
  };
  root.append(make("div", { class: "choices" }, make("p", { class: "note" }, t("example_where", { layer: data.layer, head: data.head, key_head: data.key_head })),
    sides.length > 1 ? toggle(t("side"), sides.map((side) => [side, t(side)]), sides.at(-1), show) : null), place);
  show(sides.at(-1));
}
