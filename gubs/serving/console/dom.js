// Small helpers. Texts are always set as text, never as markup.
export const $ = (selector, root = document) => root.querySelector(selector);

export function make(tag, attributes = {}, ...children) {
  const space = ["svg", "rect", "line", "polyline", "title"].includes(tag) && attributes.svg !== false;
  const node = space ? document.createElementNS("http://www.w3.org/2000/svg", tag) : document.createElement(tag);
  for (const [name, value] of Object.entries(attributes)) if (name !== "svg") node.setAttribute(name, value);
  node.append(...children);
  return node;
}

export function table(caption, columns, rows, name = "") {
  const head = make("tr", {}, ...columns.map((c) => make("th", { scope: "col" }, c)));
  const body = make("tbody", {}, ...rows);
  const title = make("caption", { class: "quiet" }, caption);
  return make("div", { class: "scroll" }, make("table", { class: name }, title, make("thead", {}, head), body));
}

export function bar(share, mark) {
  const percent = `${(100 * share).toFixed(0)} %`;
  const svg = make("svg", { class: "bar", viewBox: "0 0 100 10", preserveAspectRatio: "none", role: "img", "aria-label": percent });
  svg.append(make("rect", { class: "track", width: 100, height: 10 }), make("rect", { class: "part", width: 100 * share, height: 10 }));
  if (mark !== undefined) svg.append(make("line", { class: "mark", x1: 100 * mark, x2: 100 * mark, y1: 0, y2: 10 }));
  return svg;
}
