// The views of a model's sizes, of quantization, and of what an adapter changed.
import { bytes, choice, count, heatLegend, heatMap, legend, make, panel, percent, plot, short, stackedBars, table, tiles } from "./charts.js";

const FORMATS = ["fp32", "bf16", "int8", "nf4"];
const PART_STYLES = { embedding: "p5", attention: "p1", mlp: "p0", norms: "p3", other: "rest", head: "p4" };
const MEMORY_STYLES = { weights: "p5", gradients: "p2", optimizer: "p3", activations: "p1", other: "rest" };

export function drawNumbers(root, data, t) {
  const parts = data.parts.map((part) => ({ ...part, style: PART_STYLES[part.name], label: t(`part_${part.name}`) }));
  root.append(tiles([
    [t("parameters"), count(data.parameters)], [t("layers"), data.layers], [t("hidden"), count(data.hidden)],
    [t("mlp_width"), count(data.intermediate)],
    [t("heads"), data.heads === data.kv_heads ? data.heads : `${data.heads} / ${data.kv_heads}`],
    [t("vocabulary"), count(data.vocabulary)],
  ]));
  const byFormat = FORMATS.map((format) => {
    const total = parts.reduce((sum, part) => sum + part.bytes[format], 0);
    return { label: format, value: bytes(total),
      parts: parts.map((part) => ({ style: part.style, name: part.label, size: part.bytes[format] })) };
  });
  root.append(panel(t("weights_title"), t(data.tied ? "weights_note_tied" : "weights_note"),
    legend(parts.map((part) => [part.style, part.label])), stackedBars(byFormat, bytes),
    table([t("part"), t("parameters"), t("share"), ...FORMATS],
      [...parts.map((part) => [part.label, part.parameters.toLocaleString("en"), percent(part.parameters / data.parameters),
        ...FORMATS.map((format) => bytes(part.bytes[format]))]),
      [t("total"), data.parameters.toLocaleString("en"), "100 %", ...byFormat.map((row) => row.value)]], "sums")));
  const use = Object.entries(MEMORY_STYLES);
  const memory = (row, label) => ({ label, value: bytes(row.total),
    parts: use.map(([name, style]) => ({ style, name: t(`memory_${name}`), size: row[name] })) });
  const key = use.map(([name, style]) => [style, t(`memory_${name}`)]);
  const limit = { size: data.device_memory, text: t("free", { device: data.device, size: bytes(data.device_memory) }) };
  root.append(panel(t("training_title"), t("training_note", { tokens: data.tokens, rank: data.rank, adapter: count(data.adapter_parameters) }),
    legend(limit.size < 4 * data.training[0].total ? [...key, ["limit-line", limit.text]] : key),
    stackedBars(data.training.map((row) => memory(row, `${t(`method_${row.method}`)} (${row.format})`)), bytes, limit)));
  const boards = (method, sharded) => {
    const rows = data.boards.filter((row) => row.method === method && (row.sharded === sharded || row.boards === 1));
    return make("div", { class: "part" }, make("h3", {}, t(sharded ? "sharded" : "data_parallel")),
      make("p", { class: "note" }, t(sharded ? "sharded_note" : "data_parallel_note")),
      stackedBars(rows.map((row) => memory(row, t(row.boards === 1 ? "one_board" : "n_boards", { count: row.boards }))), bytes));
  };
  const pair = make("div", { class: "pair" });
  const show = (method) => pair.replaceChildren(boards(method, false), boards(method, true));
  root.append(panel(t("boards_title"), t("boards_note"),
    make("div", { class: "choices" }, choice(t("training_of"), [["full", t("method_full")], ["lora", t("method_lora")]], "full", show)),
    legend(key), pair));
  show("full");
}

export function drawQuantization(root, data, t, reload) {
  const [low, high] = data.edges, bins = data.counts.length, width = (high - low) / bins;
  const centres = data.counts.map((_, index) => low + (index + 0.5) * width);
  const names = { before: t("before"), ...Object.fromEntries(data.roundings.map((each) => [each.format, each.format])) };
  const after = choice(t("format"), data.roundings.map((each) => [each.format, each.format]), "nf4", (format) => show(format));
  const layer = reload ? choice(t("matrix"), data.layers.map((path) => [path, path]), data.path, (path) => reload({ path }))
    : make("p", { class: "choice" }, make("span", {}, t("matrix")), make("code", {}, data.path));
  const place = make("div"), total = data.shape[0] * data.shape[1];
  const show = (format) => {
    const chosen = data.roundings.find((each) => each.format === format);
    place.replaceChildren(legend([["p5", names.before], ["p2", format]]), plot({
      x: centres, steps: true, xLabel: t("weight"), yLabel: t("weights_count"), height: 260,
      series: [{ style: "soft", values: data.counts, name: names.before }, { style: "c2", values: chosen.counts, name: format }],
      describe: (index) => `${short(centres[index] - width / 2)} … ${short(centres[index] + width / 2)}\n` +
        `${names.before}: ${percent(data.counts[index] / total)}\n${format}: ${percent(chosen.counts[index] / total)}`,
    }));
  };
  root.append(make("div", { class: "choices" }, layer, after));
  root.append(panel(t("histogram_title", { rows: data.shape[0], columns: data.shape[1] }), t("histogram_note"), place,
    table([t("format"), t("bits"), t("max_error"), t("rms_error"), t("snr")],
      data.roundings.map((each) => [each.format, short(each.bits_per_weight), short(each.max_error), short(each.rms_error),
        each.snr_db == null ? "∞" : `${each.snr_db.toFixed(1)} dB`]))));
  show("nf4");
  const share = (counts) => counts.map((count) => count / total);
  const scaled = share(data.scaled_counts), levels = share(data.level_counts), step = 2 / bins;
  root.append(panel(t("levels_title"), t("levels_note"), legend([["p5", names.before], ["p2", "nf4"]]), plot({
    x: scaled.map((_, index) => -1 + (index + 0.5) * step), steps: true, fill: true, height: 260, xLabel: t("over_largest"), yLabel: t("share"),
    series: [{ style: "soft", values: scaled }], sticks: data.levels.map((x, index) => ({ x, value: levels[index] })),
    describe: (index) => {
      const from = -1 + index * step;
      const inside = data.levels.map((level, at) => [level, at]).filter(([level]) => level >= from && level <= from + step + 1e-9);
      return [`${names.before}: ${percent(scaled[index])}`, ...inside.map(([level, at]) => `nf4 ${short(level)}: ${percent(levels[at])}`)].join("\n");
    },
  })));
  // The example block: each weight before, and the level that stands for it.
  const order = data.block.map((value, index) => [value, data.block_nf4[index]]).sort((a, b) => a[0] - b[0]);
  const reach = 1.05 * Math.max(...data.block.map(Math.abs));
  root.append(panel(t("block_title"), t("block_note"), legend([["p5", names.before], ["p2", "nf4"]]), plot({
    x: order.map((_, index) => index + 1), xLabel: t("block_axis"), yLabel: t("weight"), height: 240, low: -reach, top: reach, steps: true, whole: true,
    series: [{ style: "soft", values: order.map((pair) => pair[0]) }, { style: "c2", values: order.map((pair) => pair[1]) }],
    describe: (index) => `${names.before}: ${short(order[index][0])}\nnf4: ${short(order[index][1])}\n${t("error")}: ${short(order[index][1] - order[index][0])}`,
  })));
}

export function drawAdapter(root, data, t) {
  const layers = [...new Set(data.layers.map((each) => each.layer))].sort((a, b) => a - b);
  const at = new Map(data.layers.map((each) => [`${each.layer} ${each.target}`, each]));
  const most = data.layers.reduce((a, b) => (b.relative_norm > a.relative_norm ? b : a));
  const find = (row, column) => at.get(`${layers[column]} ${data.targets[row]}`);
  const measures = {
    relative_norm: [t("relative_norm"), percent], effective_rank: [t("effective_rank"), short], rank_90: [t("rank_90"), short],
  };
  root.append(tiles([
    [t("most_changed"), t("layer_target", { layer: most.layer, target: most.target })], [t("its_change"), percent(most.relative_norm)],
    [t("mean_effective_rank"), t("of_rank", { value: short(data.mean_effective_rank), rank: data.rank })], [t("scale"), short(data.scale)],
  ]));
  const place = make("div", { class: "map" }), curves = make("div");
  const showCurves = (chosen) => {
    const ranks = Array.from({ length: data.rank }, (_, index) => index + 1);
    const padded = (each) => ranks.map((_, index) => each.singular_values[index] ?? null);
    const name = t("layer_target", { layer: chosen.layer, target: chosen.target });
    const same = data.layers.filter((each) => each.target === chosen.target && each !== chosen);
    curves.replaceChildren(legend([["tuned-bar", name], ["p5", t("same_target", { target: chosen.target })]]), plot({
      x: ranks, whole: true, xLabel: t("singular_index"), yLabel: t("singular_value"), height: 240,
      series: [...same.map((each) => ({ style: "faint", values: padded(each) })), { style: "adapter", values: padded(chosen) }],
      describe: (index) => `${name}\nσ${index + 1} = ${short(chosen.singular_values[index])}`,
    }), make("p", { class: "readout" }, t("rank_used", { effective: short(chosen.effective_rank), most: chosen.rank_90, rank: chosen.singular_values.length })));
  };
  const showMap = (measure) => {
    const [label, format] = measures[measure];
    const max = measure === "relative_norm" ? most.relative_norm : data.rank;
    const { map } = heatMap({
      rows: data.targets, columns: layers.map(String), value: (row, column) => find(row, column)?.[measure] ?? null,
      max, format, slanted: false, maxCell: 36, rowTitle: t("target"), columnTitle: t("layer"),
      describe: (row, column, text) => `${t("layer_target", { layer: layers[column], target: data.targets[row] })}: ${text == null ? t("no_adapter") : `${label} ${text}`}`,
      pick: (row, column) => { const each = find(row, column); if (each) showCurves(each); },
    });
    place.replaceChildren(heatLegend(label, max, format), map);
  };
  root.append(panel(t("change_title"), t(data.is_dora ? "change_note_dora" : "change_note"),
    make("div", { class: "choices" }, choice(t("measure"), Object.entries(measures).map(([key, [text]]) => [key, text]), "relative_norm", showMap)), place));
  root.append(panel(t("singular_title"), t("singular_note"), curves));
  showMap("relative_norm");
  showCurves(most);
}
