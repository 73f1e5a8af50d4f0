// Draws a view of what a model does inside, from its JSON (jetson_ft/inside).
import { forgetRemoved, hints, make } from "./charts.js";
import { drawAdapter, drawNumbers, drawQuantization } from "./model_views.js";
import { drawInContext, drawNextToken, drawReply } from "./reply_views.js";
import { drawAttention, drawAttentionExample, drawTokens } from "./text_views.js";

const VIEWS = {
  tokens: drawTokens, attention: drawAttention, attention_example: drawAttentionExample,
  next_token: drawNextToken, reply: drawReply, in_context: drawInContext,
  numbers: drawNumbers, quantization: drawQuantization, adapter: drawAdapter,
};

// Draws `data` of the view into `element`, whose content it replaces. `texts` are those of
// jetson_ft/inside/texts.py in one language. `reload(options)` computes the view with other options
// of `compute_view`, such as `layers`, and draws it; without it only what `data` has can be chosen.
export function draw(element, view, data, texts, reload = null) {
  const t = (name, values = {}) => (texts[name] ?? name).replace(/\{(\w+)\}/g, (_, key) => values[key]);
  const root = make("article", { class: "inside" },
    make("h2", {}, t(`${view}_heading`)), make("p", { class: "caption" }, t(`${view}_caption`)));
  VIEWS[view](root, data, t, reload);
  element.replaceChildren(root);
  hints(root);
  forgetRemoved();
}
