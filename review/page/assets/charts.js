"use strict";
// The overview: the curves of one run, or of all that were named, over one another.
{
  const COLORS = ["#0072B2", "#D55E00", "#009E73", "#CC79A7", "#E69F00", "#56B4E9", "#7A7A7A", "#8C564B"];
  // [title, pattern of the metrics, kind]; a title whose metrics were never measured is left out, and one whose curves
  // all keep their neutral value is named under the charts. Kind "result" is drawn always: a reward of 0 is a result.
  const CHARTS = [
    ["Reward", /^reward\/(mean|part\/.*)$/, "result"],
    ["Held out, 95 % intervals", /^eval\/(accuracy|accuracy_greedy|reward_mean|reward_mean_greedy|pass_at_\d+)$/, "result"],
    ["Zero-variance groups", /^group\/zero_variance$/],
    ["Entropy, nats per token", /^policy\/entropy$/],
    ["Length, tokens", /^completion\/length_(mean|max)$/],
    ["Truncated and aborted, share", /^completion\/(truncated|aborted)$/],
    ["KL and mismatch, nats", /^(loss\/kl|mismatch\/(kl|logprob_abs_mean|logprob_abs_max)|sync_check\/logprob_abs_mean)$/],
    ["Ratio and clipping", /^(policy\/clip_fraction|policy\/ratio_mean|mismatch\/weight_mean)$/],
    ["Loss", /^loss\/(total|policy|mtp|value|sft)$/],
    ["Gradient norm", /^learner\/grad_norm$/],
    ["Tokens per forward", /^(draft|eval)\/tokens_per_forward$/],
    ["Drafts accepted, by depth", /^draft\/acceptance_depth_\d+$/],
    ["Experts: load, 1 is even", /^moe\/load_(min|max)$/],
    ["Seconds of a step", /^time\/(rollout|reward|wait|learn|sync|evaluate|checkpoint)$/, "stack"],
    ["Tokens per second", /^speed\/completion_tokens_per_second$/],
    ["Memory, GiB", /^memory\/.*gib$/],
    ["Faults", /^(faults\/.*|reward\/(errors|abstained)|run\/(interruptions|failures)|rollout\/restarts|log\/not_finite)$/],
  ];
  // What a curve is called; its metric is named beside the title of the card. Others are called by the end of their metric.
  const NAMES = { "reward/mean": "all rewards", "eval/accuracy": "sampled", "eval/accuracy_greedy": "greedy", "eval/reward_mean": "sampled",
    "eval/reward_mean_greedy": "greedy", "mismatch/kl": "KL to the sampler", "loss/kl": "KL to the reference", "sync_check/logprob_abs_mean": "sync check, mean" };
  const nameOf = (metric) => NAMES[metric] ?? metric.split("/").slice(1).join(" ").replaceAll("_", " ");

  // Metrics of one chart that would have the same name are called in full: "draft/tokens_per_forward".
  const namesOf = (metrics) => {
    const short = metrics.map(nameOf);
    const isUnique = (name) => short.filter((other) => other === name).length === 1;
    return new Map(metrics.map((metric, m) => [metric, isUnique(short[m]) ? short[m] : metric]));
  };
  // Ratios of two equal things are 1, up to rounding: without drafts, and on-policy. Everything else is 0 if nothing happens.
  const RATIOS = /^(policy\/ratio_mean|mismatch\/weight_mean|(draft|eval)\/tokens_per_forward)$/;
  const neutral = (metric) => (RATIOS.test(metric) ? 1 : 0);
  const isNeutral = (metric, value) => (RATIOS.test(metric) ? Math.abs(value - 1) < 1e-6 : value === 0);
  const metricsOf = (traces) => [...new Set(traces.map(({ metric }) => metric).filter(Boolean))];
  const isIdle = ({ traces, kind }) => kind !== "result" && traces.filter(({ metric }) => metric).every(({ idle }) => idle);
  const inWords = ({ title, traces }) => `${title} (${[...new Set(metricsOf(traces).map(neutral))].sort().join(" and ")})`;
  const settings = { smooth: 0, log: false, chosen: null };

  const smoothed = (values, share) => {
    if (!share) return values;
    let sum = 0, weight = 0;
    return values.map((value) => {
      if (value == null) return null;
      sum = share * sum + (1 - share) * value;
      weight = share * weight + (1 - share);
      return sum / weight;
    });
  };

  // A batch that is sampled ahead costs a step only the wait for it, which time/learn contains.
  const valueOf = (row, metric) => metric === "time/learn" ? Math.max(0, row[metric] - (row["time/wait"] ?? 0)) : row[metric];

  // Names that would draw a curve twice are left out: a single part is the reward, an accuracy the mean of its marks.
  const telling = (names) => {
    const parts = names.filter((name) => name.startsWith("reward/part/"));
    return names.filter((name) => !(parts.length === 1 && name === parts[0]) && !(names.includes("eval/accuracy") && name.startsWith("eval/reward_mean"))
      && !(names.includes("time/wait") && ["time/rollout", "time/reward"].includes(name)));
  };

  const lines = (runs, pattern, kind) => {
    const traces = [];
    runs.forEach(({ name, rows }, r) => {
      const measured = rows.flatMap((row) => Object.keys(row).filter((key) => row[key] != null));
      const names = telling([...new Set(measured)].filter((key) => pattern.test(key)).sort());
      const called = namesOf(names);
      names.forEach((metric, m) => {
        const there = rows.filter((row) => row[metric] != null);
        const color = COLORS[(runs.length > 1 ? r : m) % COLORS.length];
        const common = { x: there.map((row) => row.step), legendgroup: `${r}${metric}`, mode: there.length < 40 ? "lines+markers" : "lines" };
        const low = there.filter((row) => row[`${metric}/low`] != null);
        if (low.length) {
          traces.push({ x: [...low, ...[...low].reverse()].map((row) => row.step), hoverinfo: "skip", showlegend: false, legendgroup: common.legendgroup,
            y: [...low.map((row) => row[`${metric}/low`]), ...[...low].reverse().map((row) => row[`${metric}/high`])],
            fill: "toself", line: { width: 0 }, fillcolor: `${color}22`, mode: "lines" });
        }
        const values = there.map((row) => valueOf(row, metric));
        const idle = values.every((value) => isNeutral(metric, value));
        traces.push({ ...common, y: smoothed(values, kind === "stack" ? 0 : settings.smooth), metric, idle, name: runs.length > 1 ? `${name}, ${called.get(metric)}` : called.get(metric),
          line: { color, width: 1.8, dash: runs.length > 1 ? ["solid", "dot", "dash", "dashdot"][m % 4] : "solid" }, marker: { size: 4 },
          ...(kind === "stack" && runs.length === 1 ? { stackgroup: "one", mode: "lines" } : {}),
          hovertemplate: `step %{x}: %{y:.4g}<extra>${called.get(metric).replace(/[<>&%{}]/g, "")}</extra>` });
      });
    });
    return traces;
  };

  view.draw = (box, traces, extra = {}) => {
    const ink = view.style("--ink"), line = view.style("--line");
    const axis = { gridcolor: line, zerolinecolor: line, automargin: true };
    Plotly.react(box, traces, { margin: { l: 8, r: 8, t: 6, b: extra.x ? 38 : 26 }, paper_bgcolor: "transparent", plot_bgcolor: "transparent",
      font: { color: ink, size: 11 }, showlegend: traces.length > 1, legend: { orientation: "h", y: 1.02, yanchor: "bottom", font: { size: 10 } },
      xaxis: { ...axis, title: { text: extra.x ?? "" } }, yaxis: { ...axis, type: settings.log ? "log" : "linear", rangemode: "normal" }, hovermode: "closest" },
    // Without a pointer that hovers, Plotly's bar would stay over the newest values.
    { displaylogo: false, responsive: true, displayModeBar: matchMedia("(hover: hover)").matches ? "hover" : false, modeBarButtonsToRemove: ["lasso2d", "select2d"] });
  };

  view.pages.overview = async (run) => {
    const all = view.runs.map((name, index) => ({ name, index }));
    const shown = settings.chosen ?? new Set([run]);
    shown.add(run);
    settings.chosen = shown;
    const found = () => Promise.all([run, ...[...shown].filter((index) => index !== run).sort()].map((index) => view.ask(`${index}/overview`)));
    let runs = await found();
    const cards = view.make("div", { class: "cards" });
    const facts = view.make("p", { class: "soft" });
    const learned = view.make("div");
    const constant = view.make("p", { class: "soft" });
    const redraw = () => {
      const last = runs[0].rows.at(-1);
      const ended = runs[0].ended;
      facts.textContent = last ? `step ${last.step}` + (ended?.event === "end" ? `, ${ended.how}${ended.error ? `: ${ended.error}` : ""}` : ", running or cut off") : "nothing was measured yet";
      learned.replaceChildren(...runs.flatMap(({ name, headline }) => headline.map((sentence) =>
        view.make("p", { class: "headline" }, runs.length > 1 ? `${name}: ${sentence}` : sentence))));
      const measured = CHARTS.map(([title, pattern, kind]) => ({ title, kind, traces: lines(runs, pattern, kind) })).filter(({ traces }) => traces.length);
      const idle = measured.filter(isIdle);
      const wanted = measured.filter((chart) => !idle.includes(chart));
      const control = view.controlChart(runs);
      if (control) wanted.splice(wanted.filter(({ kind }) => kind === "result").length, 0, control);
      constant.textContent = idle.length ? `Constant in all steps, so not drawn: ${idle.map(inWords).join("; ")}.` : "";
      const old = new Map([...cards.children].map((card) => [card.dataset.title, card]));
      cards.replaceChildren(...wanted.map(({ title, traces, x, content, below }) => {
        const card = old.get(title) ?? view.make("div", { class: below ? "card wide" : "card", "data-title": title }, view.make("h2", {}, title, " ", view.make("code", { class: "soft" })),
          view.make("div", { class: "chart" }), view.make("div", { class: "below" }));
        const [heading, chart, text] = card.children;
        heading.lastChild.textContent = metricsOf(traces).join(" ");
        if (below && text.dataset.content !== content) { // a table that has not changed keeps its order
          text.dataset.content = content;
          text.replaceChildren(...below());
        }
        queueMicrotask(() => {
          view.draw(chart, traces, { x });
          if (!chart.dataset.bound) {
            chart.dataset.bound = "1";
            chart.on("plotly_click", ({ points }) => {
              const isStep = x == null; // else it is a number of seconds
              if (isStep && runs.length === 1 && runs[0].recorded.includes(points[0].x)) location.hash = view.link(run, "step", points[0].x);
            });
          }
        });
        return card;
      }));
    };
    const tools = view.make("div", { class: "tools" },
      view.make("label", {}, "smoothing", view.make("input", { type: "range", min: 0, max: 0.98, step: 0.02, value: settings.smooth,
        oninput: (event) => { settings.smooth = +event.target.value; redraw(); } })),
      view.make("label", {}, view.make("input", { type: "checkbox", checked: settings.log, onchange: (event) => { settings.log = event.target.checked; redraw(); } }), "log scale"),
      all.length > 1 ? all.map(({ name, index }) => view.make("label", {}, view.make("input", { type: "checkbox", checked: shown.has(index), disabled: index === run,
        onchange: async (event) => { event.target.checked ? shown.add(index) : shown.delete(index); runs = await found(); redraw(); } }), name)) : "",
      runs[0].recorded.length ? view.make("a", { href: view.link(run, "step", runs[0].recorded.at(-1)) }, "rollouts of the newest step") : "");
    const config = view.make("details", {}, view.make("summary", {}, "configuration"), view.make("pre", { class: "text" }, runs[0].config));
    const meanings = view.make("details", {}, view.make("summary", {}, "what the metrics mean, and their last values"),
      view.table([["metric", ([name]) => name], ["last", ([name]) => runs[0].rows.findLast((row) => row[name] != null)?.[name]], ["meaning", ([, meaning]) => meaning]], Object.entries(runs[0].meanings)));
    return { title: "overview", nodes: [learned, facts, tools, cards, constant, view.make("p", { class: "soft" }, runs[0].machine), config, meanings], ready: redraw, live: async () => { runs = await found(); redraw(); } };
  };
}
