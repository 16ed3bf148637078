// Shows one page at a time, by the address's fragment; errors go to one place.
import { call, setKey } from "./api.js";
import { explain, listen, start } from "./ask.js";
import { $ } from "./dom.js";
import { api, groups, live } from "./live.js";

const PAGES = ["ask", "groups", "live", "api"];
const REFRESH_MS = 2000;
let timer = 0;

async function guarded(work) {
  $("#problem").hidden = true;
  try {
    await work;
  } catch (error) {
    if (error.status === 401) return show("key");
    $("#problem").textContent = `${error.code ? `${error.code}: ` : ""}${error.message}`;
    $("#problem").hidden = false;
  }
  return undefined;
}

function show(page) {
  for (const name of [...PAGES, "key"]) $(`#${name}-page`).hidden = name !== page;
  for (const link of document.querySelectorAll("nav a")) {
    if (link.hash === `#${page}`) link.setAttribute("aria-current", "page");
    else link.removeAttribute("aria-current");
  }
}

async function open() {
  const page = PAGES.includes(location.hash.slice(1)) ? location.hash.slice(1) : "ask";
  clearInterval(timer);
  show(page);
  if (page === "groups") return groups();
  if (page === "api") return api();
  if (page === "live") {
    timer = setInterval(() => guarded(live()), REFRESH_MS);
    return live();
  }
  const models = await call("v1/models");
  $("#model").textContent = models.map((m) => `${m.name} ${m.version}`).join(", ");
  return start(models);
}

$("#key-form").addEventListener("submit", (event) => {
  event.preventDefault();
  setKey($("#key").value.trim());
  guarded(open());
});
addEventListener("hashchange", () => guarded(open()));
document.addEventListener("why", (event) => guarded(explain(event.detail)));
listen(guarded);
guarded(open());
