// The Chat tab.
import { download } from "./shell.js";

// Downloads both conversations.
function transcript(model, base, adapter) {
  const text = (content) =>
    typeof content === "string" ? content : content.map((part) => part.text ?? "").join("");
  const plain = (turns) =>
    (turns ?? []).map(({ role, content }) => ({ role, content: text(content) }));
  const conversation = { model, base: plain(base), adapter: plain(adapter) };
  download("conversation.json", JSON.stringify(conversation, null, 2));
}

window.jetsonFt = { ...window.jetsonFt, transcript };
