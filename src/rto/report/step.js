"use strict";
// Step through the tokens of the completions of one prompt, side by side: the arrow keys, Home and End where a heat-map
// has the focus, its buttons, or a click on a token. Events are caught on the document: a page that is brought up to
// date needs nothing done again.
document.documentElement.classList.add("scripted");
const at = new WeakMap();

function go(heat, i) {
  const sides = [...heat.querySelectorAll(".tokens")];
  const longest = Math.max(...sides.map((side) => side.children.length));
  i = Math.min(Math.max(i, 0), longest - 1);
  at.set(heat, i);
  heat.querySelectorAll(".here").forEach((token) => token.classList.remove("here"));
  const output = heat.querySelector("output");
  output.replaceChildren();
  for (const side of sides) {
    const token = side.children[i];
    if (token) token.classList.add("here");
    const line = document.createElement("span");
    const name = side.dataset.name ? side.dataset.name + ", " : "";
    line.textContent = token
      ? `${name}token ${i + 1} of ${side.children.length}: “${token.textContent.trim() || "space"}” ${token.title}`
      : `${name}ended after ${side.children.length}`;
    output.append(line);
  }
}

document.addEventListener("keydown", (event) => {
  const heat = event.target.closest?.(".heat");
  if (!heat || event.altKey || event.ctrlKey || event.metaKey) return;
  const now = at.get(heat) ?? -1;
  const to = { ArrowRight: now + 1, ArrowLeft: now - 1, Home: 0, End: Infinity }[event.key];
  if (to === undefined) return;
  event.preventDefault();
  go(heat, to);
});

document.addEventListener("click", (event) => {
  const heat = event.target.closest(".heat");
  if (!heat) return;
  const button = event.target.closest("button[data-step]");
  const token = event.target.closest(".tokens > span");
  if (button) go(heat, (at.get(heat) ?? -1) + Number(button.dataset.step));
  else if (token) go(heat, [...token.parentNode.children].indexOf(token));
});
