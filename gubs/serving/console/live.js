// The pages "Groups", "Live" and "API".
import { call } from "./api.js";
import { $, make, table } from "./dom.js";

export async function groups() {
  const all = await call("v1/groups");
  const cards = all.map((g) =>
    make("article", {}, make("h3", {}, `${g.group_id}: ${g.name}`), make("p", { class: "quiet" }, `${g.members} members. ${g.features}`),
      make("details", {}, make("summary", {}, "Profile"), make("p", {}, g.profile))));
  $("#group-list").replaceChildren(cards.length ? make("div", { class: "side" }, ...cards) : make("p", {}, "This filter has no groups."));
}

export async function live() {
  const [status, models] = await Promise.all([call("v1/status"), call("v1/models")]);
  const replicas = Object.values(status.replicas).reduce((a, b) => a + b, 0);
  const figures = {
    "Requests per second": status.per_second.toFixed(2),
    "Median": `${status.p50_ms.toFixed(0)} ms`,
    "95 % within": `${status.p95_ms.toFixed(0)} ms`,
    "Candidates in work": status.waiting,
    "Engine replicas": replicas,
    "Errors, last 5 minutes": status.errors,
  };
  $("#figures").replaceChildren(...Object.entries(figures).map(([name, value]) => make("div", {}, make("dt", {}, name), make("dd", {}, String(value)))));
  $("#chart").replaceChildren(chart(status.history));
  const rows = models.map((m) =>
    make("tr", {}, make("th", { scope: "row" }, m.app), make("td", {}, m.name), make("td", {}, m.shadow ? `${m.weight} (shadow)` : String(m.weight)),
      make("td", {}, String(status.replicas[m.app] ?? 0)), make("td", {}, m.modes.join(", "))));
  $("#versions").replaceChildren(table("Deployed versions", ["Application", "Filter", "Share", "Replicas", "Modes"], rows));
}

function chart(values) {
  const top = Math.max(1, ...values);
  const points = values.map((v, i) => `${(100 * i) / Math.max(1, values.length - 1)},${50 - (48 * v) / top}`).join(" ");
  const label = `Requests per second over the last five minutes, at most ${top.toFixed(1)}`;
  return make("svg", { class: "chart", viewBox: "0 0 100 50", preserveAspectRatio: "none", role: "img", "aria-label": label }, make("polyline", { points }));
}

export async function api() {
  const schema = await call("openapi.json");
  const parts = Object.entries(schema.paths).filter(([path]) => path.startsWith("/v1") || path.endsWith("z") || path === "/metrics");
  $("#paths").replaceChildren(...parts.flatMap(([path, methods]) =>
    Object.entries(methods).map(([method, about]) =>
      make("article", {}, make("h3", {}, `${method.toUpperCase()} ${path}`), make("p", {}, about.description || about.summary || "")))));
}
