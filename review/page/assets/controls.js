"use strict";
// GRPO and its controls (`quartet control`): held-out accuracy by seconds of training, and the same problems in a table.
{
  const POLICIES = { grpo: "#0072B2", supervised: "#D55E00", rejection: "#009E73" }; // those that were trained, with their colours
  const DASHES = ["solid", "dot", "dash", "dashdot"];

  const intervals = (answers, color) => {
    if (answers.some(({ low }) => low == null)) return {};
    const above = answers.map(({ value, high }) => high - value);
    const below = answers.map(({ value, low }) => value - low);
    return { error_y: { type: "data", symmetric: false, array: above, arrayminus: below, color, thickness: 1, width: 3 } };
  };

  const curve = (policy, color, dash, name) => {
    const answers = policy.curve.map(({ sampled }) => sampled);
    return {
      name,
      x: policy.curve.map(({ seconds }) => seconds),
      y: answers.map(({ value }) => value),
      ...intervals(answers, color),
      mode: "lines+markers",
      line: { color, width: 1.8, dash },
      marker: { size: 5 },
      text: policy.curve.map(({ step }) => `step ${step}`),
      hovertemplate: "%{x:.0f} s, %{text}: %{y:.3f}<extra></extra>",
    };
  };

  const curves = (runs, called) => runs.flatMap((run, r) => {
    const drawn = Object.keys(POLICIES).filter((kind) => run.control.policies[kind]?.curve.length);
    return drawn.map((kind) => {
      const policy = run.control.policies[kind];
      return curve(policy, POLICIES[kind], DASHES[r % DASHES.length], called(run, policy));
    });
  });

  const plain = (value) => value.toFixed(3);
  const signed = (value) => (value < 0 ? "" : "+") + plain(value);
  const words = (measured, show) => {
    if (!measured) return "–";
    const { value, low, high } = measured;
    return low == null ? show(value) : `${show(value)} (${show(low)} to ${show(high)})`;
  };

  const table = (runs, called) => {
    const rows = runs.flatMap((run) => Object.values(run.control.policies).map((policy) => ({ policy, name: called(run, policy) })));
    const way = rows.some(({ policy }) => policy.results.sampled) ? "sampled" : "greedy";
    const column = (title, of, show) => [title, ({ policy }) => of(policy)?.value, ({ policy }) => words(of(policy), show)];
    return view.table([
      ["policy", ({ name }) => name],
      ["seconds", ({ policy }) => Math.round(policy.seconds)],
      column("sampled", ({ results }) => results.sampled, plain),
      column("greedy", ({ results }) => results.greedy, plain),
      column(`GRPO minus it, ${way}`, ({ grpo_minus }) => grpo_minus[way], signed),
    ], rows);
  };

  const note = (runs, shown) => {
    const problems = [...new Set(runs.map(({ control }) => control.problems.toLocaleString("en")))].join(" or ");
    const trained = runs.map((run) => {
      const controls = Object.values(run.control.policies).filter((policy) => policy.words);
      return `Controls${shown.length > 1 ? ` of ${run.name}` : ""}: ${controls.map((policy) => policy.words).join("; ")}.`;
    });
    const sentence = `All policies of a run answer the same ${problems} held-out problems; intervals are of 95 %.`;
    return view.make("p", { class: "soft" }, [sentence, ...trained].join(" "));
  };

  // The chart of those of the runs that have controls, or null if none has.
  view.controlChart = (shown) => {
    const runs = shown.filter(({ control }) => control);
    const called = (run, policy) => (shown.length > 1 ? `${run.name}, ${policy.name}` : policy.name);
    const traces = curves(runs, called);
    if (!traces.length) return null;
    const measure = runs.every(({ control }) => control.is_accuracy) ? "accuracy" : "reward";
    const since = runs.some(({ control }) => control.has_sft_stage) ? " after the SFT stage" : "";
    return {
      title: `Held-out ${measure} by seconds: GRPO and its controls`,
      traces,
      x: `seconds of training${since}`,
      content: JSON.stringify(runs.map(({ name, control }) => [name, control])),
      below: () => [table(runs, called), note(runs, shown)],
    };
  };
}
