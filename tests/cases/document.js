// The document that the page's scripts see without a browser, as far as they use it. `load(scripts, answers)` runs them on
// what a server would answer and returns the page's `view`.
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

exports.load = (scripts, answers) => {
  const body = new Node("body");
  Object.assign(globalThis, {
    Node,
    document: { createElement: (name) => new Node(name), getElementById: () => ({ textContent: answers }), documentElement: body, body },
    location: { search: "", hash: "" },
    matchMedia: () => ({ matches: false }),
    getComputedStyle: () => ({ getPropertyValue: () => "#000" }),
    Plotly: { react: (box, traces, layout) => Object.assign(box, { data: traces, layout }) },
  });
  const texts = scripts.map((path) => fs.readFileSync(path, "utf8"));
  return vm.runInThisContext(`${texts.join("\n")}\nview`);
};
