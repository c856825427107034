"use strict";
// Bring the page of a run in progress up to date. It waits while a reader steps through tokens or has marked text, and
// keeps what was opened and ticked.
const every = 1000 * Number(document.querySelector("meta[name=every]").content);
let tag = null;

function kept(main) {
  return [...main.querySelectorAll("details, input")];
}

async function refresh() {
  const main = document.querySelector("main");
  const status = document.querySelector("#status");
  try {
    const reply = await fetch("/", { headers: tag ? { "If-None-Match": tag } : {}, cache: "no-store" });
    if (reply.status === 200) {
      const next = new DOMParser().parseFromString(await reply.text(), "text/html").querySelector("main");
      const busy = document.activeElement?.closest(".heat") || String(getSelection());
      if (!busy) {
        kept(next).forEach((element, i) => {
          const old = kept(main)[i];
          if (old?.open) element.open = true;
          if (old?.checked) element.checked = true;
        });
        main.replaceWith(document.adoptNode(next));
        tag = reply.headers.get("ETag");
      }
    }
    status.textContent = "";
  } catch {
    status.textContent = "No answer: rto watch has ended. What is shown is the last that it said.";
  }
  setTimeout(refresh, every);
}
setTimeout(refresh, every);
