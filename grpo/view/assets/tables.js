"use strict";
// Search in all completions, what became of every prompt, and the events of the run.
{
  const wanted = { text: "", regex: "", low: "", high: "", first: "", last: "", reason: "", prompt: "" };
  const labels = { text: "text", regex: "regular expression", low: "reward from", high: "to", first: "step from", last: "to", reason: "end" };

  const progress = async (run) => {
    const state = await view.ask(`${run}/index`);
    const said = state.indexed < state.recorded ? `${state.indexed} of ${state.recorded} steps are indexed so far. ` : "";
    return said + state.faults.join(" ");
  };

  view.pages.search = async (run, query = "") => {
    const given = new URLSearchParams(query);
    for (const name of Object.keys(wanted)) wanted[name] = given.get(name) ?? "";
    const asked = Object.values(wanted).some(Boolean);
    const none = (error) => ({ found: [], more: false, fault: error?.message }); // the form stays, to be mended
    const { found, more, fault } = asked ? await view.ask(`${run}/search`, wanted).catch(none) : none();
    const submit = (event) => {
      event.preventDefault();
      const set = Object.entries(wanted).filter(([, value]) => value);
      location.hash = view.link(run, "search", new URLSearchParams(set).toString());
    };
    const field = (name) => view.make("label", {}, labels[name], name === "reason"
      ? view.make("select", { name, onchange: (event) => { wanted[name] = event.target.value; } }, ["", "stop", "length", "max_turns", "environment", "abort"].map((value) => view.make("option", { value, selected: wanted[name] === value }, value || "any")))
      : view.make("input", { name, value: wanted[name], size: /text|regex/.test(name) ? 22 : 5, oninput: (event) => { wanted[name] = event.target.value; } }));
    const form = view.make("form", { class: "tools", onsubmit: submit }, Object.keys(labels).map(field), view.make("button", {}, "search"));
    const columns = [["step", (row) => row.step, (row) => view.make("a", { href: view.link(run, "group", row.step, row.number) }, row.step)], ["sample", (row) => row.sample], ["reward", (row) => row.reward],
      ["tokens", (row) => row.length], ["end", (row) => row.reason], ["prompt", (row) => row.prompt], ["completion", (row) => row.text]];
    const said = asked ? `${more ? "more than " : ""}${found.length} found` : "Text is found in prompts and completions; capitals do not matter, but in a regular expression they do.";
    return { title: "search", focus: form.querySelector("input"), nodes: [form, view.make("p", { class: "soft" }, await progress(run), said), fault ? view.make("p", { class: "fault" }, fault) : asked ? view.table(columns, found) : ""] };
  };

  view.pages.data = async (run) => {
    const prompts = await view.ask(`${run}/prompts`);
    const kinds = { all: () => true, "never solved": (row) => !row.right, "always solved": (row) => row.right === row.n, "in between": (row) => row.right && row.right < row.n, "same text elsewhere": (row) => row.same };
    const counts = Object.entries(kinds).map(([name, test]) => [name, prompts.filter(test).length]);
    const box = view.make("div");
    const bars = (row) => view.make("div", { class: "bars", style: "height:20px;max-width:160px" }, row.rates.map((rate, i) => view.make("i", { title: `step ${row.steps[i]}: ${view.show(rate)}`, style: `height:${6 + 94 * rate}%` })));
    const draw = (name) => box.replaceChildren(view.table([["prompt", (row) => row.prompt_id, (row) => view.make("a", { href: view.link(run, "diff", row.prompt_id) }, row.prompt_id)],
      ["completions", (row) => row.n], ["pass rate", (row) => row.right / row.n], ["over time", (row) => row.rates.at(-1) - row.rates[0], bars], ["same text", (row) => row.same], ["text", (row) => row.prompt]], prompts.filter(kinds[name])));
    const choice = view.make("select", { onchange: (event) => draw(event.target.value) }, counts.map(([name, count]) => view.make("option", { value: name }, `${name} (${count})`)));
    draw("all");
    return { title: "data", nodes: [view.make("div", { class: "tools" }, choice, view.make("span", { class: "soft" }, "A completion passes with a first reward of 1 or more. ", await progress(run))), box] };
  };

  view.pages.events = async (run) => {
    const events = await view.ask(`${run}/events`);
    const rest = ({ time, event, step, ...others }) => JSON.stringify(others);
    return { title: "events", nodes: [view.table([["time", (row) => row.time ?? ""], ["event", (row) => row.event], ["step", (row) => row.step ?? row.after_step], ["what", rest]], events.toReversed(), 2000)] };
  };
}
