// Asks the search of a built site: node site_search.js WORKER INDEX < questions.json > answers.json. The worker is the
// script that a browser runs; it is told what the page would tell it, and each answer is a list of places in the index.
const fs = require("fs");
const [worker, index] = process.argv.slice(2);
const [SETUP, , QUERY, RESULT, FAILURE] = [0, 1, 2, 3, 4];
const questions = JSON.parse(fs.readFileSync(0, "utf8"));
const answers = [];

globalThis.self = {
  postMessage({ type, data }) {
    if (type === FAILURE) throw new Error("the search has failed");
    if (type === RESULT) answers.push(data.items.map((item) => item.id));
    const input = questions[answers.length];
    if (input === undefined) console.log(JSON.stringify(answers));
    else self.onmessage({ data: { type: QUERY, data: { input } } });
  },
};
eval(fs.readFileSync(worker, "utf8"));
self.onmessage({ data: { type: SETUP, data: JSON.parse(fs.readFileSync(index, "utf8")) } });
