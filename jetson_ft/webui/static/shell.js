// What all tabs share: the language, notices, requests, copying.
export const language = location.pathname.split("/")[1] || "en";
document.documentElement.lang = language.replace("_", "-");

// Shows a notice for some seconds.
export function toast(text) {
  const box = document.createElement("div");
  box.className = "toast";
  box.setAttribute("role", "alert");
  box.textContent = text;
  document.body.append(box);
  setTimeout(() => box.remove(), 8000);
}

// Posts an action to a run; shows its error. Returns whether it was done.
export async function post(name, action, body) {
  const headers = body ? { "Content-Type": "application/json" } : {};
  const response = await fetch(`/runs/${encodeURIComponent(name)}/${action}`, {
    method: "POST", headers, body: body && JSON.stringify(body),
  });
  if (response.ok) return true;
  const error = await response.json().catch(() => ({ what: response.statusText }));
  toast([error.what, error.where, error.fix].filter(Boolean).join("\n"));
  return false;
}

// Saves a text as a file of the browser's machine.
export function download(name, text, type = "application/json") {
  const link = document.createElement("a");
  link.href = URL.createObjectURL(new Blob([text], { type }));
  link.download = name;
  link.click();
  setTimeout(() => URL.revokeObjectURL(link.href), 60000);
}

// Asks in a dialog; returns whether its second button, named by `action`, was pressed. The dialog
// is in the head (templates/head.jinja); the browser gives the focus back when it closes.
export function confirmDialog(text, action) {
  const dialog = document.getElementById("confirm");
  dialog.querySelector("p").textContent = text;
  dialog.querySelector("[value=yes]").textContent = action;
  dialog.returnValue = "";
  dialog.showModal();
  return new Promise((resolve) => {
    dialog.addEventListener("close", () => resolve(dialog.returnValue === "yes"), { once: true });
  });
}

// Copies the text of the element that the button names, or that is before it; it stays marked.
function copy(button) {
  const { copy: named } = button.dataset;
  getSelection().selectAllChildren(
    named ? document.querySelector(named) : button.previousElementSibling,
  );
  if (document.execCommand("copy")) button.dataset.copied = ""; // also without HTTPS
}

function speak(chosen) {
  document.cookie = `jetson-ft-language=${chosen}; path=/; max-age=31536000; samesite=strict`;
  location.href = `/${chosen}/${location.search}`;
}

document.addEventListener("click", (event) => {
  const button = event.target.closest("[data-language], [data-copy]");
  if (!button) return;
  if ("copy" in button.dataset) copy(button);
  else speak(button.dataset.language);
});
