// The overview of a page, without a browser: `node overview_page.js SCRIPT...` reads what a server would answer from
// standard input and prints the cards that were drawn, with the curves that Plotly would get, and the page's text.
const fs = require("fs");
const { load } = require("./document.js");

const view = load(process.argv.slice(2), fs.readFileSync(0, "utf8"));

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
