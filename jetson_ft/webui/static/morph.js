const KEPT = ["open", "data-copied"]; // attributes that a person's action sets

// Makes the content of an element equal to HTML by changing only what differs: what stays keeps its
// focus, selection, scroll position and typed text. Elements are matched by `id`, else by their
// order. What a person opened or copied stays marked; an element with `data-keep` belongs to a
// script; one that comes with `data-same` stays as it is.
export function morph(element, html) {
  const template = document.createElement("template");
  template.innerHTML = html;
  const active = document.activeElement;
  morphChildren(element, template.content);
  if (active !== document.activeElement && element.contains(active)) active.focus({ preventScroll: true });
}

function morphChildren(old, fresh) {
  const wanted = new Set([...fresh.children].map((child) => child.id).filter(Boolean));
  [...old.children].forEach((child) => { if (child.id && !wanted.has(child.id)) child.remove(); });
  const byId = new Map([...old.children].filter((child) => child.id).map((child) => [child.id, child]));
  let place = old.firstChild; // of the next child
  for (const next of [...fresh.childNodes]) {
    let match = byId.get(next.id);
    if (!match && !next.id && place && !place.id && isAlike(place, next)) match = place;
    if (!match || !isAlike(match, next)) {
      old.insertBefore(next, place);
      continue;
    }
    if (match === place) place = place.nextSibling;
    else old.insertBefore(match, place);
    morphNode(match, next);
  }
  while (place) {
    const rest = place;
    place = place.nextSibling;
    rest.remove();
  }
}

const isAlike = (one, other) => one.nodeName === other.nodeName && one.type === other.type;

function morphNode(old, next) {
  if (old.nodeType !== Node.ELEMENT_NODE) {
    if (old.data !== next.data) old.data = next.data;
    return;
  }
  if ("keep" in old.dataset || "same" in next.dataset || old.isEqualNode(next)) return;
  for (const { name } of [...old.attributes]) {
    if (!KEPT.includes(name) && !next.hasAttribute(name)) old.removeAttribute(name);
  }
  for (const { name, value } of next.attributes) {
    if (!KEPT.includes(name) && old.getAttribute(name) !== value) old.setAttribute(name, value);
  }
  morphChildren(old, next);
}
