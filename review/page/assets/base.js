"use strict";
// What every page uses. Text of a run goes into the page by textContent alone, so nothing in it is ever executed.
const view = { runs: [], pages: {}, token: new URLSearchParams(location.search).get("token") || "" };
const answers = document.getElementById("answers");
view.recorded = answers ? JSON.parse(answers.textContent) : null; // a report contains what a server would answer

view.ask = async (path, query = {}) => {
  if (view.recorded) {
    if (path in view.recorded) return view.recorded[path];
    throw new Error("this is not part of the report; `quartet-review view` on the run folder shows it");
  }
  const given = new URLSearchParams(Object.entries(query).filter(([, value]) => value !== "" && value != null));
  let response;
  try {
    response = await fetch(`/api/${path}?${given}`, { headers: { "x-token": view.token } });
  } catch {
    throw new Error("the server does not answer any more; start it again");
  }
  const found = await response.json();
  if (!response.ok) throw new Error(found.error);
  return found;
};

// make("p", {class: "soft", onclick: f}, "text", node, [more])
view.make = (name, attributes = {}, ...children) => {
  const node = document.createElement(name);
  for (const [key, value] of Object.entries(attributes)) {
    if (key.startsWith("on")) node.addEventListener(key.slice(2), value);
    else if (value === true) node.setAttribute(key, "");
    else if (value !== false && value != null) node.setAttribute(key, value);
  }
  node.append(...children.flat(9).filter((child) => child != null).map((c) => (c instanceof Node ? c : String(c))));
  return node;
};

view.show = (value, digits = 3) => {
  if (value == null) return "–";
  if (typeof value !== "number") return String(value);
  if (Number.isInteger(value)) return value.toLocaleString("en");
  const size = Math.abs(value);
  return size >= 1e5 || size < 1e-3 ? value.toExponential(2) : value.toPrecision(Math.max(digits, Math.ceil(Math.log10(size))));
};
view.mean = (values) => {
  const there = values.filter((value) => value != null);
  return there.length ? there.reduce((sum, value) => sum + value, 0) / there.length : null;
};
view.style = (name) => getComputedStyle(document.documentElement).getPropertyValue(name).trim();
view.link = (run, ...parts) => `#/${[run, ...parts].map(encodeURIComponent).join("/")}`;

// A table whose columns sort: columns are [title, value(row), cell(row)?]; without `cell` the value is shown.
view.table = (columns, rows, most = 500) => {
  let by = null, down = true;
  const box = view.make("div", { class: "scroll" });
  const draw = () => {
    const sorted = by == null ? rows : [...rows].sort((a, b) => {
      const [x, y] = [columns[by][1](a), columns[by][1](b)];
      const order = x == null ? 1 : y == null ? -1 : x < y ? -1 : x > y ? 1 : 0;
      return down ? -order : order;
    });
    const numeric = columns.map(([, value]) => rows.some((row) => typeof value(row) === "number"));
    const head = columns.map(([title], i) => view.make("th", { class: numeric[i] && "number" },
      view.make("button", { onclick: () => { down = by === i ? !down : true; by = i; draw(); } }, title, by === i ? (down ? " ↓" : " ↑") : "")));
    const body = sorted.slice(0, most).map((row) => view.make("tr", {}, columns.map(([, value, cell], i) =>
      view.make("td", { class: numeric[i] && "number" }, view.make("div", { class: "cell" }, cell ? cell(row) : view.show(value(row)))))));
    box.replaceChildren(view.make("table", {}, view.make("thead", {}, view.make("tr", {}, head)), view.make("tbody", {}, body)),
      rows.length > most ? view.make("p", { class: "soft" }, `the first ${most} of ${rows.length}`) : "");
  };
  draw();
  return box;
};

view.tip = (text, event) => {
  let tip = document.getElementById("tip");
  if (!text) return tip?.remove();
  if (!tip) document.body.append(tip = view.make("div", { id: "tip" }));
  tip.textContent = text;
  tip.style.left = `${Math.max(4, Math.min(event.clientX + 12, innerWidth - tip.offsetWidth - 8))}px`;
  tip.style.top = `${Math.max(4, Math.min(event.clientY + 16, innerHeight - tip.offsetHeight - 8))}px`;
};
