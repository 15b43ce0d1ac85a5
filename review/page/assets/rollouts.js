"use strict";
// A step with its groups, a group with every token, and two completions of one prompt side by side.
{
  const rgb = { good: [26, 127, 55], bad: [179, 38, 30], blue: [0, 99, 166] };
  const DARKEST = 0.6; // above it the text on red or blue is hard to read in the light theme
  const tint = ([r, g, b], strength) => `rgba(${r},${g},${b},${(DARKEST * Math.max(0, Math.min(1, strength))).toFixed(3)})`;
  const signed = (value, scale) => (value == null ? "" : tint(value > 0 ? rgb.good : rgb.bad, Math.abs(value) / scale));
  const depths = (c) => [...new Set(c.flatMap(({ depths }) => depths ?? []))].filter(Boolean).sort((a, b) => a - b);
  const versions = (c) => [...new Set(c.flatMap(({ versions, policy_version }) => versions ?? [policy_version]))];
  // How tokens may be coloured: [name, value of token i, colour of a value, what it says, the values of its scale].
  const COLOURS = [
    ["log-probability", (c, i) => c.logprobs?.[i], (v) => (v == null ? "" : tint(rgb.bad, -v / 4)), "the darker, the less likely", () => [0, -1, -2, -3, -4]],
    ["surprise of the learner", (c, i) => c.policy_logprobs?.[i], (v) => (v == null ? "" : tint(rgb.bad, -v / 4)), "the learner's own log-probability", () => [0, -1, -2, -3, -4]],
    ["mismatch", (c, i) => (c.policy_logprobs && c.logprobs ? c.policy_logprobs[i] - c.logprobs[i] : null), (v) => signed(v, 0.2), "learner's minus sampler's log-probability", () => [-0.15, -0.05, 0, 0.05, 0.15]],
    ["ratio", (c, i) => (c.policy_logprobs && c.logprobs ? Math.exp(c.policy_logprobs[i] - c.logprobs[i]) : null), (v) => signed(v == null ? null : v - 1, 0.2), "above 1 green, below 1 red", () => [0.85, 0.95, 1, 1.05, 1.15]],
    ["advantage", (c, i) => (Array.isArray(c.advantage) ? c.advantage[i] : c.advantage), (v) => signed(v, 2), "what the step teaches: green more, red less", () => [-1.5, -0.5, 0, 0.5, 1.5]],
    ["draft depth", (c, i) => c.depths?.[i], (v) => (v ? tint(rgb.blue, v / (v + 2)) : ""), "accepted drafts, by depth", depths],
    ["policy version", (c, i) => c.versions?.[i] ?? c.policy_version, (v) => tint(rgb.blue, ((v * 37) % 10) / 10), "one shade for each version", versions],
    ["plain", () => null, () => "", "", () => []],
  ];
  const settings = { colour: 0 };
  const cut = (text, most = 160) => (text.length > most ? `${text.slice(0, most)} …` : text);

  view.pages.step = async (run, number) => {
    const overview = await view.ask(`${run}/overview`, { after: 1e9 });
    const steps = overview.recorded, step = number === undefined ? steps.at(-1) : +number;
    if (step === undefined) throw new Error("no rollouts were recorded yet");
    const { groups, failures } = await view.ask(`${run}/step/${step}`);
    const at = steps.indexOf(step);
    const highest = Math.max(...groups.flatMap((group) => group.rewards.map((reward) => reward ?? 0)), 1e-9);
    const lowest = Math.min(...groups.flatMap((group) => group.rewards.map((reward) => reward ?? 0)), 0);
    const card = ([group, g]) => view.make("a", { class: "card", href: view.link(run, "group", step, g) },
      view.make("div", {}, `group ${g}`, view.make("span", { class: "soft" }, ` reward ${view.show(view.mean(group.rewards))}, ${view.show(view.mean(group.lengths))} tokens`)),
      view.make("div", { class: "bars" }, group.rewards.map((reward, i) => view.make("i", { class: reward == null && "none", title: `sample ${i}: ${view.show(reward)}`,
        style: `height:${reward == null ? 6 : 4 + (96 * (reward - lowest)) / (highest - lowest || 1)}%` }))),
      view.make("div", { class: "soft" }, cut(group.prompt)),
      Object.entries(group.parts).map(([name, marks]) => view.make("div", { class: "soft" }, `${name} ${view.show(view.mean(marks))}`)));
    const cards = groups.map((group, g) => card([group, g]));
    const [tied, telling] = [true, false].map((wanted) => cards.filter((_, g) => groups[g].tied === wanted));
    const filter = (text) => cards.forEach((one, g) => { one.style.display = groups[g].prompt.toLowerCase().includes(text.toLowerCase()) ? "" : "none"; });
    const folded = view.make("details", { open: !telling.length }, view.make("summary", {}, `${tied.length} zero-variance groups: their completions have the same reward, so they teach nothing`),
      view.make("div", { class: "side" }, tied));
    const go = (offset) => { const other = steps[at + offset]; if (other !== undefined) location.hash = view.link(run, "step", other); };
    const choice = view.make("select", { onchange: (event) => { location.hash = view.link(run, "step", event.target.value); } },
      steps.map((other) => view.make("option", { value: other, selected: other === step }, `step ${other}`)));
    return { title: `step ${step}`, previous: () => go(-1), next: () => go(1), nodes: [
      view.make("div", { class: "tools" }, view.make("button", { onclick: () => go(-1), disabled: at <= 0 }, "←"), choice, view.make("button", { onclick: () => go(1), disabled: at === steps.length - 1 }, "→"),
        view.make("label", {}, "prompts with", view.make("input", { name: "filter", oninput: (event) => filter(event.target.value) })),
        view.make("span", { class: "soft" }, `${groups.length} groups, ${tied.length} with zero variance; a bar is the reward of a completion, from ${view.show(lowest)} to ${view.show(highest)}`),
        view.make("code", { class: "soft", title: "type this to see what the step has done, and because of what" }, `quartet why RUN ${step}`)),
      failures.map((event) => view.make("p", { class: "fault" }, `${event.event}: ${cut(String(event.error), 400)}`)),
      view.make("div", { class: "side" }, telling), tied.length ? folded : ""] };
  };

  const tokensOf = (completion) => {
    const [, valueOf, colourOf] = COLOURS[settings.colour];
    const box = view.make("div", { class: "text" });
    completion.tokens.forEach((text, i) => {
      if (!text) return;
      const tool = completion.sampled && !completion.sampled[i];
      const token = view.make("span", { class: tool && "tool", "data-i": i }, text);
      const colour = tool ? "" : colourOf(valueOf(completion, i));
      if (colour) token.style.background = colour;
      box.append(token);
    });
    box.addEventListener("mousemove", (event) => {
      const i = event.target.dataset?.i;
      if (i === undefined) return view.tip(null);
      const tool = completion.sampled && !completion.sampled[i];
      const said = COLOURS.slice(0, -1).map(([name, value]) => [name, value(completion, +i)]).filter(([, value]) => value != null).map(([name, value]) => `${name} ${view.show(value, 4)}`);
      view.tip([`token ${i}: ${JSON.stringify(completion.tokens[i])}`, tool ? "written by a tool, not learned from" : null, ...said].filter(Boolean).join("\n"), event);
    });
    box.addEventListener("mouseleave", () => view.tip(null));
    return box;
  };

  view.pages.group = async (run, step, number) => {
    const group = await view.ask(`${run}/group/${step}/${number}`);
    const side = view.make("div", { class: "side" });
    const draw = () => {
      const [, , colourOf, meaning, values] = COLOURS[settings.colour];
      about.textContent = meaning;
      scale.replaceChildren(...values(group.completions).map((value) => view.make("span", { style: `background:${colourOf(value)}` }, String(value))));
      side.replaceChildren(...group.completions.map((completion) => view.make("div", { class: "card" },
      view.make("div", {}, `sample ${completion.sample} `, view.make("b", {}, `reward ${view.show(completion.reward)}`),
        view.make("span", { class: "soft" }, ` advantage ${Array.isArray(completion.advantage) ? "per token" : view.show(completion.advantage)}, ${completion.tokens.length} tokens, ${completion.finish_reason}, version ${completion.policy_version}`)),
      view.make("div", { class: "soft" }, Object.entries({ ...completion.parts, ...completion.extras }).map(([name, mark]) => `${name} ${typeof mark === "object" ? cut(JSON.stringify(mark)) : view.show(mark)}`).join(", ")),
      tokensOf(completion))));
    };
    const choice = view.make("select", { onchange: (event) => { settings.colour = +event.target.value; draw(); } },
      COLOURS.map(([name], i) => view.make("option", { value: i, selected: i === settings.colour }, name)));
    const about = view.make("span", { class: "soft" });
    const scale = view.make("span", { class: "scale" });
    const go = (offset) => { const g = +number + offset; if (g >= 0 && g < group.groups) location.hash = view.link(run, "group", step, g); };
    draw();
    return { title: `step ${step}, group ${number}`, previous: () => go(-1), next: () => go(1),
      cycle: () => { settings.colour = (settings.colour + 1) % COLOURS.length; choice.value = settings.colour; draw(); },
      nodes: [view.make("div", { class: "tools" }, view.make("a", { href: view.link(run, "step", step) }, `step ${step}`), view.make("button", { onclick: () => go(-1), disabled: +number === 0 }, "←"),
        view.make("span", {}, `group ${number} of ${group.groups}`), view.make("button", { onclick: () => go(1), disabled: +number === group.groups - 1 }, "→"),
        view.make("label", {}, "colour", choice), about, scale, view.make("a", { href: view.link(run, "diff", group.prompt_id) }, "this prompt at other steps")),
      view.make("div", { class: "card" }, view.make("div", { class: "soft" }, `prompt ${group.prompt_id}`), view.make("div", { class: "text" }, group.prompt)), view.make("p", {}), side] };
  };

  // The longest common subsequence of words, as [kind, text] with kind -1 (only left), 0 (both), 1 (only right).
  view.diff = (left, right) => {
    const [a, b] = [left, right].map((text) => text.slice(0, 8000).split(/(\s+)/));
    const best = Array.from({ length: a.length + 1 }, () => new Uint16Array(b.length + 1));
    for (let i = a.length - 1; i >= 0; i--) for (let j = b.length - 1; j >= 0; j--)
      best[i][j] = a[i] === b[j] ? best[i + 1][j + 1] + 1 : Math.max(best[i + 1][j], best[i][j + 1]);
    const parts = [];
    let i = 0, j = 0;
    const push = (kind, text) => { if (parts.at(-1)?.[0] === kind) parts.at(-1)[1] += text; else parts.push([kind, text]); };
    while (i < a.length || j < b.length) {
      if (i < a.length && j < b.length && a[i] === b[j]) { push(0, a[i]); i++; j++; }
      else if (j >= b.length || (i < a.length && best[i + 1][j] >= best[i][j + 1])) push(-1, a[i++]);
      else push(1, b[j++]);
    }
    return parts;
  };

  view.pages.diff = async (run, prompt, left, right) => {
    const places = await view.ask(`${run}/places`, { prompt });
    if (!places.length) throw new Error(`no completion of the prompt ${prompt} is recorded`);
    const key = (place) => `${place.step}.${place.number}`;
    const found = (wanted, otherwise) => places.find((place) => key(place) === wanted) ?? otherwise;
    const chosen = [found(left, places[0]), found(right, places.at(-1))];
    const groups = await Promise.all(chosen.map((place) => view.ask(`${run}/group/${place.step}/${place.number}`)));
    const select = (which) => view.make("select", { onchange: (event) => {
      const keys = chosen.map(key); keys[which] = event.target.value; location.hash = view.link(run, "diff", prompt, ...keys);
    } }, places.map((place) => view.make("option", { value: key(place), selected: place === chosen[which] }, `step ${place.step}, group ${place.number}`)));
    const rows = Array.from({ length: Math.max(...groups.map((group) => group.completions.length)) }, (_, i) => {
      const pair = groups.map((group) => group.completions[i]);
      const parts = view.diff(pair[0]?.text ?? "", pair[1]?.text ?? "");
      const half = (which) => view.make("div", { class: "card" }, view.make("div", { class: "soft" }, pair[which] ? `sample ${i}, reward ${view.show(pair[which].reward)}` : "–"),
        view.make("div", { class: "text" }, parts.filter(([kind]) => kind !== (which ? -1 : 1)).map(([kind, text]) => (kind ? view.make(which ? "ins" : "del", {}, text) : text))));
      return view.make("div", { class: "side", style: "margin-bottom:.8rem" }, half(0), half(1));
    });
    return { title: `prompt ${prompt}`, nodes: [view.make("div", { class: "tools" }, select(0), "against", select(1)),
      view.make("div", { class: "card" }, view.make("div", { class: "text" }, groups[0].prompt)), view.make("p", {}), rows] };
  };
}
