// The page of a group, without a browser: `node group_page.js SCRIPT...` reads what a server would answer from standard
// input and prints for each colouring of tokens its name, its legend and the colours of tokens, as [text, colour].
const fs = require("fs");
const { load } = require("./document.js");

const view = load(process.argv.slice(2), fs.readFileSync(0, "utf8"));
const within = (node) => [node, ...node.children.filter((child) => child instanceof Node).flatMap(within)];
const named = (nodes, name) => nodes.filter((node) => node.name === name);
const isOf = (name) => (node) => node.attributes.class === name;

(async () => {
  view.runs = await view.ask("runs");
  const page = await view.pages.group(0, 1, 0);
  const nodes = page.nodes.flat(9);
  const colourings = [];
  const names = named(nodes.flatMap(within), "option").map((option) => option.textContent);
  for (const name of names) {
    const drawn = nodes.flatMap(within);
    const scale = drawn.find(isOf("scale"));
    const tokens = named(drawn, "span").filter((span) => "i" in span.dataset);
    colourings.push({
      name,
      legend: scale.children.map((span) => [span.textContent, span.attributes.style.replace("background:", "")]),
      tokens: tokens.map((span) => [span.textContent, span.style.background ?? ""]),
    });
    page.cycle();
  }
  console.log(JSON.stringify(colourings));
})();
