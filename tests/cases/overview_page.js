// The overview of a page, without a browser: `node overview_page.js SCRIPT...` reads what a server would answer from
// standard input and prints the cards that were drawn, with the curves that Plotly would get, and the page's text.
const fs = require("fs");
const vm = require("vm");

class Node {
  constructor(name) {
    Object.assign(this, { name, children: [], attributes: {}, dataset: {}, style: {} });
  }
  append(...children) { this.children.push(...children); }
  replaceChildren(...children) { this.children = children; }
  addEventListener() {}
  on(event, listener) { this[event] = listener; }
  setAttribute(key, value) {
    this.attributes[key] = value;
    if (key.startsWith("data-")) this.dataset[key.slice(5)] = value;
  }
  get lastChild() { return this.children.at(-1); }
  get textContent() { return this.children.map((child) => child.textContent ?? child).join(" "); }
  set textContent(text) { this.children = [text]; }
}

const answers = fs.readFileSync(0, "utf8");
const body = new Node("body");
Object.assign(globalThis, {
  Node,
  document: { createElement: (name) => new Node(name), getElementById: () => ({ textContent: answers }), documentElement: body, body },
  location: { search: "", hash: "" },
  matchMedia: () => ({ matches: false }),
  getComputedStyle: () => ({ getPropertyValue: () => "#000" }),
  Plotly: { react: (box, traces, layout) => Object.assign(box, { data: traces, layout }) },
});

const scripts = process.argv.slice(2).map((path) => fs.readFileSync(path, "utf8"));
const view = vm.runInThisContext(`${scripts.join("\n")}\nview`);

(async () => {
  view.runs = await view.ask("runs");
  const page = await view.pages.overview(0);
  page.ready();
  await new Promise(setImmediate); // the charts are drawn in microtasks
  const nodes = page.nodes.flat(9);
  const cards = nodes.find((node) => node.attributes.class === "cards").children.map((card) => {
    const chart = card.children.find((child) => child.attributes.class === "chart");
    const clicked = (x) => {
      location.hash = "";
      chart.plotly_click({ points: [{ x }] });
      return location.hash;
    };
    const { data, layout } = chart;
    return { title: card.dataset.title, data, layout, text: card.textContent, click: clicked(1) };
  });
  console.log(JSON.stringify({ cards, text: nodes.map((node) => node.textContent).join("\n") }));
})();
