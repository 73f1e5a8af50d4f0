// The views of what comes next: the next token, a reply token by token, examples in the prompt.
import { decode, legend, make, panel, percent, plot, short, table, tiles, toggle } from "./charts.js";
import { chips, labelled, partBefore, tokenText } from "./text_views.js";

const STYLES = { base: "base-bar", adapter: "tuned-bar" };

// Horizontal bars of candidates: {label, before, after, hint}; `after` 0 is a token that was cut.
function candidateBars(rows, style, most) {
  return make("ol", { class: "candidates" }, rows.map((row) => make("li", { class: row.after === 0 ? "cut" : row.mark ? "marked" : "", "data-hint": row.hint, tabindex: 0 },
    make("span", { class: "token" }, row.label),
    make("span", { class: "track" }, make("i", { class: row.after === 0 ? "cut-bar" : style, style: `width:${(100 * (row.after || row.before)) / most}%` }),
      row.after && row.before !== row.after ? make("b", { class: "limit", style: `left:${(100 * row.before) / most}%` }) : null),
    make("span", { class: "value" }, row.after === 0 ? "–" : percent(row.after)))));
}

// A candidate's text; one that completes a character shows it.
function withPart(before, token) {
  const whole = before && token.text == null ? decode([{ bytes: `${before} ${token.bytes}` }]) : "\ufffd";
  return whole.includes("\ufffd") ? tokenText(token) : `${whole} ${tokenText(token)}`;
}

export function drawNextToken(root, data, t) {
  const sides = Object.keys(data.sides), steps = data.sides[sides[0]].steps.map((step) => step.name);
  const pair = make("div", { class: "pair" });
  const show = (step) => {
    const value = (each) => (step === "model" ? each.probability : each.after[step]);
    const most = Math.max(...sides.flatMap((side) => data.sides[side].candidates.flatMap((each) => [each.probability, value(each)])));
    pair.replaceChildren(...sides.map((side) => {
      const shown = data.sides[side], summary = shown.steps.find((each) => each.name === step);
      const rows = shown.candidates.map((each) => ({
        label: tokenText(each.token), before: each.probability, after: value(each), mark: each.token.id === shown.greedy,
        hint: [`${tokenText(each.token)}  ·  ${t("token_id", { id: each.token.id })}  ·  ${t("logit", { value: short(each.logit) })}`,
          `${t("step_model")}: ${percent(each.probability)}`, ...Object.entries(each.after).map(([name, after]) => `${t(`step_${name}`)}: ${after ? percent(after) : t("cut")}`)].join("\n"),
      }));
      return make("div", {}, make("p", { class: `side ${side}` }, t(side)), candidateBars(rows, STYLES[side], most),
        make("p", { class: "note" }, t("step_summary", { kept: summary.kept.toLocaleString("en"), entropy: short(summary.entropy), shown: percent(shown.shown) })));
    }));
  };
  root.append(panel(t("prompt_title"), t("prompt_note", { count: data.tokens.length }), make("p", { class: "prompt" }, decode(data.tokens))));
  root.append(panel(t("candidates_title"), t("candidates_note"),
    make("div", { class: "choices" }, toggle(t("after_step"), steps.map((name) => [name, t(`step_${name}`)]), steps.at(-1), show)),
    legend([...sides.map((side) => [STYLES[side], t(side)]), ["limit-line", t("before_sampling")], ["cut-bar", t("cut")]]), pair));
  root.append(panel(t("steps_title"), t("steps_note"), table([t("step"), ...sides.flatMap((side) => [`${t("kept")} (${t(side)})`, `${t("entropy")} (${t(side)})`])],
    steps.map((name, index) => [t(`step_${name}`), ...sides.flatMap((side) => {
      const step = data.sides[side].steps[index];
      return [step.kept.toLocaleString("en"), short(step.entropy)];
    })]))));
  show(steps.at(-1));
}

export function drawReply(root, data, t) {
  const sides = Object.keys(data.nats), steps = data.steps, both = sides.length > 1;
  const reply = steps.map((step) => step.token), names = labelled(reply);
  const label = (index) => `${index + 1}: ${names[index]}`;
  root.append(tiles([[t("tokens"), steps.length], ...sides.map((side) => [t("nats_of", { side: t(side) }), short(data.nats[side])]),
    ...(both ? [[t("most_different"), label(data.most_different[0])]] : [])]));
  const pair = make("div", { class: "pair" }), heading = make("p", { class: "readout", "aria-live": "polite" });
  let at = 0;
  const { row, mark } = chips(reply, {
    text: (_, index) => names[index], label: t("reply_heading"), chosen: (index) => show(index),
    style: (_, index) => (both && data.most_different.slice(0, 3).includes(index) ? "tint-most" : ""),
  });
  const show = (index) => {
    at = Math.max(0, Math.min(steps.length - 1, index));
    mark(at);
    const step = steps[at];
    heading.textContent = [label(at), ...sides.map((side) => t("chance_of", { side: t(side), value: percent(step.sides[side].probability), rank: step.sides[side].rank.toLocaleString("en") })),
      both ? t("divergence_of", { value: short(step.jensen_shannon) }) : ""].filter(Boolean).join("  ·  ");
    pair.replaceChildren(...sides.map((side) => make("div", {}, make("p", { class: `side ${side}` }, t(side)),
      candidateBars(step.sides[side].top.map((each) => ({
        label: withPart(partBefore(reply.slice(0, at)), each.token), before: each.probability, after: each.probability, mark: each.token.id === step.token.id,
        hint: `${tokenText(each.token)}  ·  ${t("token_id", { id: each.token.id })}  ·  ${percent(each.probability)}`,
      })), STYLES[side], 1))));
  };
  const step = (text, by) => make("button", { type: "button", class: "step", click: () => show(at + by) }, text);
  root.append(panel(t("stepped_title"), t("stepped_note"), make("p", { class: "prompt" }, decode(reply.filter((token) => !token.is_special))), row, heading,
    make("div", { class: "choices" }, step(`← ${t("previous")}`, -1), step(`${t("following")} →`, 1)), pair));
  const x = steps.map((_, index) => index + 1);
  const chance = (side) => steps.map((each) => each.sides[side].probability);
  root.append(panel(t("chances_title"), t("chances_note"), legend(sides.map((side) => [STYLES[side], t(side)])), plot({
    x, whole: true, xLabel: t("position"), yLabel: t("probability"), top: 1, series: sides.map((side) => ({ style: side, values: chance(side) })),
    describe: (index) => `${label(index)}\n${sides.map((side) => `${t(side)}: ${percent(chance(side)[index])}`).join("\n")}`, picked: show,
  })));
  if (both) {
    root.append(panel(t("divergence_title"), t("divergence_note"), plot({
      x, whole: true, xLabel: t("position"), yLabel: t("bits_unit"), top: 1, fill: true, height: 160, series: [{ style: "c1", values: steps.map((each) => each.jensen_shannon) }],
      describe: (index) => `${label(index)}\n${t("divergence_of", { value: short(steps[index].jensen_shannon) })}`, picked: show,
    })));
  }
  show(both ? data.most_different[0] : 0);
}

export function drawInContext(root, data, t) {
  const sides = Object.keys(data.sides), shots = data.sides[sides[0]];
  const most = Math.max(...sides.flatMap((side) => data.sides[side].map((shot) => shot.probability ?? 0)));
  root.append(panel(t("question"), null, make("p", { class: "prompt" }, data.question),
    data.answer ? make("p", { class: "note" }, t("answer_given", { answer: data.answer })) : null));
  root.append(make("div", { class: "columns" }, shots.map((shot, index) => make("section", { class: "panel" },
    make("h3", {}, t(["zero_shot", "one_shot"][shot.examples] ?? "few_shot", { count: shot.examples })),
    make("p", { class: "note" }, t("prompt_tokens", { count: shot.prompt_tokens })),
    sides.map((side) => {
      const each = data.sides[side][index];
      return make("div", { class: `reply ${side}` }, make("p", { class: `side ${side}` }, t(side)),
        make("p", { class: "prompt" }, each.reply + (each.ended ? "" : " …")),
        each.probability == null ? null : make("div", { class: "answer" },
          make("span", { class: "track" }, make("i", { class: STYLES[side], style: `width:${(100 * each.probability) / most}%` })),
          make("span", { class: "note" }, t("answer_probability", { value: percent(each.probability), bits: short(each.bits_per_character) }))));
    })))));
}
