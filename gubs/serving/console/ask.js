// The page "Ask": a user, candidates, decisions, and the four answers side by side.
import { call } from "./api.js";
import { $, bar, make, table } from "./dom.js";
import { framesOf } from "./frames.js";

const OPTIONS = {
  sequential: { A: "no skip", B: "skip: the video", C: "skip: the recommendation", D: "skip: the user" },
  click: { A: "click", B: "no click" },
};
const WHOSE = { own: "The user's own profile", similar: "A similar user's", group: "The group's", none: "No profile" };
const added = new Map();
let asked = {};

export async function start(models) {
  const modes = [...new Set(models.flatMap((m) => m.modes))];
  $("#mode").replaceChildren(...modes.map((m) => make("option", { value: m }, m)));
  const examples = await call("v1/examples?count=200");
  $("#users").replaceChildren(...examples.users.map((u) => make("option", { value: u })));
  if (!$("#user").value) $("#user").value = examples.users[0] || "";
  if (!$("#candidates").value) $("#candidates").value = examples.videos.slice(0, 6).join("\n");
  await describe();
}

export function listen(report) {
  const guarded = (work) => (event) => {
    event.preventDefault();
    report(work(event));
  };
  $("#ask-form").addEventListener("submit", guarded(submit));
  $("#user").addEventListener("change", guarded(describe));
  $("#video").addEventListener("change", guarded((event) => add(event.target.files[0])));
  const drop = $("#drop");
  drop.addEventListener("dragover", (event) => {
    event.preventDefault();
    drop.classList.add("over");
  });
  drop.addEventListener("dragleave", () => drop.classList.remove("over"));
  drop.addEventListener("drop", guarded((event) => add(event.dataTransfer.files[0])));
}

async function add(file) {
  $("#drop").classList.remove("over");
  if (!file) return;
  const { frames, seconds } = await framesOf(file);
  const id = file.name.replace(/[\x00-\x1f\x7f]/g, "").slice(0, 200);
  added.set(id, { id, title: id.replace(/\.[^.]+$/, ""), duration_s: seconds, frames });
  $("#candidates").value = `${$("#candidates").value.trim()}\n${id}`.trim();
  $("#added").textContent = `${id}: ${frames.length} ${frames.length === 1 ? "frame" : "frames"} taken`;
}

async function describe() {
  const id = $("#user").value.trim();
  $("#person").replaceChildren();
  if (!id) return;
  const user = await call(`v1/users/${encodeURIComponent(id)}`);
  const lines = user.history.map((line) => make("li", {}, line));
  $("#person").replaceChildren(
    make("p", {}, `Profile: ${user.profile}`),
    make("p", {}, user.groups.length ? `In group ${user.groups.join(", ")}` : "In no group"),
    make("details", {}, make("summary", {}, `History: ${lines.length} views`), make("ul", {}, ...lines)),
  );
}

async function submit() {
  const ids = $("#candidates").value.split("\n").map((s) => s.trim()).filter(Boolean);
  asked = { task: $("#task").value, user: { id: $("#user").value.trim() } };
  const body = { ...asked, candidates: ids.map((id) => added.get(id) || { id }) };
  if ($("#mode").value) body.mode = $("#mode").value;
  if ($("#threshold").value !== "") body.threshold = Number($("#threshold").value);
  const button = $("#ask-form button");
  button.disabled = true;
  try {
    show(await call("v1/filter", body));
  } finally {
    button.disabled = false;
  }
}

function show(answer) {
  $("#why").replaceChildren();
  const kept = answer.results.filter((r) => r.decision === "keep").length;
  const caption = `${kept} of ${answer.results.length} kept in ${answer.timing_ms.total} ms, P(skip) from ${answer.threshold.toFixed(2)} drops`;
  const rows = answer.results.map((result) => row(result, answer));
  $("#results").replaceChildren(table(caption, ["Video", "Decision", "P(skip)", "Option", "Reason", "Details"], rows, "results"));
}

function row(result, answer) {
  const node = $("#result-row").content.cloneNode(true).firstElementChild;
  $("th", node).textContent = result.id;
  const decision = $(".decision", node);
  decision.textContent = result.decision;
  decision.classList.add(result.decision === "keep" ? "keep" : "drop-it");
  if (result.skip_probability !== null) {
    $(".skip-probability", node).append(bar(result.skip_probability, answer.threshold), result.skip_probability.toFixed(2));
  }
  $(".option", node).textContent = result.option ? `${result.option}: ${OPTIONS[asked.task][result.option]}` : "";
  $(".reason", node).textContent = result.error ? result.error.message : result.reason || "";
  const button = $("button", node);
  button.setAttribute("aria-label", `Why? ${result.id}`);
  button.addEventListener("click", () => document.dispatchEvent(new CustomEvent("why", { detail: result.id })));
  return node;
}

export async function explain(id) {
  const answer = await call("v1/explain", { ...asked, candidate: added.get(id) || { id } });
  const frames = answer.frames.map((data, i) =>
    make("li", {}, make("img", { src: `data:image/jpeg;base64,${data}`, alt: `Frame ${i + 1} of ${id}` })),
  );
  const cards = answer.perspectives.map((p) => {
    const card = $("#perspective").content.cloneNode(true).firstElementChild;
    const result = p.result;
    $("h4", card).textContent = WHOSE[p.whose];
    const verdict = $(".verdict", card);
    if (result.skip_probability === null) verdict.textContent = "no readable answer";
    else verdict.append(bar(result.skip_probability), `P(skip) ${result.skip_probability.toFixed(2)}, ${result.option}: ${OPTIONS[asked.task][result.option]}`);
    $(".reason", card).textContent = result.reason || "";
    $(".told", card).textContent = p.profile;
    return card;
  });
  const history = make("details", {}, make("summary", {}, `The user's last ${answer.history.length} views`),
    make("ul", {}, ...answer.history.map((line) => make("li", {}, line))));
  $("#why").replaceChildren(
    make("h3", {}, `Why: ${answer.title || id}`),
    make("ul", { class: "frames", "aria-label": "What the model saw" }, ...frames),
    history,
    make("div", { class: "side" }, ...cards),
  );
  $("#why").focus();
}
