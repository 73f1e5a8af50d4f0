// The live part of the page: asks for pieces, swaps what changed, sends what is clicked.
(() => {
  "use strict";
  const language = location.pathname.split("/")[1] || "en";
  const state = {
    chosen: new URLSearchParams(location.search).get("run") || "",
    beside: new Set(),
  };
  const etags = new Map();
  const wanted = new Map();

  const query = () => {
    const found = new URLSearchParams({ chosen: state.chosen });
    state.beside.forEach((name) => found.append("beside", name));
    return found.toString();
  };

  // Puts a piece into its place unless it is the one that is there already.
  async function swap(id, address) {
    const place = document.getElementById(id);
    if (!place) return;
    const known = etags.get(id);
    const headers = known && known.address === address ? { "If-None-Match": known.etag } : {};
    wanted.set(id, address);
    const answer = await fetch(address, { headers, cache: "no-store" });
    if (answer.status === 304 || wanted.get(id) !== address) return;
    if (!answer.ok) {
      if (id === "run-detail") place.innerHTML = "";
      return;
    }
    const html = await answer.text();
    if (wanted.get(id) !== address) return; // another run was chosen meanwhile
    const form = place.querySelector("form.about");
    const same = form?.dataset.about === state.chosen;
    if (same && form.contains(document.activeElement)) return; // never under somebody's fingers
    const open = [...place.querySelectorAll("details[open]")].map((one) => one.className);
    place.innerHTML = html;
    open.forEach((name) => place.querySelector(`details.${name}`)?.setAttribute("open", ""));
    // What is typed and not saved.
    if (same && "changed" in form.dataset) place.querySelector("form.about")?.replaceWith(form);
    etags.set(id, { address, etag: answer.headers.get("ETag") });
  }

  async function refresh() {
    if (document.hidden) return;
    try {
      await swap("run-list", `/live/${language}/runs?${query()}`);
      const first = document.querySelector("#run-list [data-choose]");
      if (!state.chosen && first) {
        choose(first.dataset.choose); // and refresh once more, so that it is marked as chosen
        return;
      }
      if (state.chosen) {
        await swap("run-detail", `/live/${language}/runs/${encodeURIComponent(state.chosen)}?${query()}`);
      }
      document.body.classList.remove("away");
    } catch {
      document.body.classList.add("away"); // the server is away; what is shown stays
    }
  }

  function say(text) {
    const box = document.createElement("div");
    box.className = "toast";
    box.textContent = text;
    document.body.append(box);
    setTimeout(() => box.remove(), 8000);
  }

  // Sends something to a run; says what was wrong with it.
  async function post(name, action, body) {
    const headers = body ? { "Content-Type": "application/json" } : {};
    const answer = await fetch(`/runs/${encodeURIComponent(name)}/${action}`, {
      method: "POST", headers, body: body && JSON.stringify(body),
    });
    if (answer.ok) return true;
    const told = await answer.json().catch(() => ({ what: answer.statusText }));
    say([told.what, told.where, told.fix].filter(Boolean).join("\n"));
    return false;
  }

  // What is sent goes to the run that the button stands with, whichever was chosen since.
  async function act(button) {
    const { run, do: action } = button.dataset;
    button.disabled = true;
    if (!(await post(run, action))) button.disabled = false;
    else if (action === "delete" && state.chosen === run) state.chosen = "";
    refresh();
  }

  async function describe(form) {
    const told = Object.fromEntries(new FormData(form));
    if (await post(form.dataset.about, "about", told)) delete form.dataset.changed;
    refresh();
  }

  function choose(name) {
    state.chosen = name;
    state.beside.delete(name);
    const address = new URL(location.href);
    address.searchParams.set("run", name);
    history.replaceState(null, "", address);
    refresh();
  }

  document.addEventListener("click", (event) => {
    const button = event.target.closest("[data-choose], [data-do], [data-language]");
    if (!button) return;
    if (button.dataset.language) {
      document.cookie = `jetson-ft-language=${button.dataset.language}; path=/; max-age=31536000; samesite=strict`;
      location.href = `/${button.dataset.language}/${location.search}`;
    } else if (button.dataset.choose) {
      choose(button.dataset.choose);
    } else if (!button.dataset.sure || confirm(button.dataset.sure)) {
      act(button);
    }
  });
  document.addEventListener("input", (event) => {
    const form = event.target.closest("form.about");
    if (form) form.dataset.changed = "";
  });
  document.addEventListener("submit", (event) => {
    if (!event.target.matches("form.about")) return;
    event.preventDefault();
    document.activeElement?.blur();
    describe(event.target);
  });
  document.addEventListener("change", (event) => {
    const name = event.target.dataset && event.target.dataset.beside;
    if (!name) return;
    event.target.checked ? state.beside.add(name) : state.beside.delete(name);
    refresh();
  });
  document.addEventListener("visibilitychange", refresh);

  // Both conversations of the chat as a file.
  function transcript(model, base, adapter) {
    const text = (content) =>
      typeof content === "string" ? content : content.map((part) => part.text ?? "").join("");
    const plain = (turns) =>
      (turns ?? []).map(({ role, content }) => ({ role, content: text(content) }));
    const told = JSON.stringify({ model, base: plain(base), adapter: plain(adapter) }, null, 2);
    const link = document.createElement("a");
    link.href = URL.createObjectURL(new Blob([told], { type: "application/json" }));
    link.download = "conversation.json";
    link.click();
    setTimeout(() => URL.revokeObjectURL(link.href), 60000);
  }

  window.jetsonFt = { choose, transcript };
  document.documentElement.lang = language === "zh" ? "zh-Hans" : "en";
  refresh();
  setInterval(refresh, 2500);
})();
