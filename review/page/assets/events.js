"use strict";
// The events of the run.
view.pages.events = async (run) => {
  const events = await view.ask(`${run}/events`);
  const rest = ({ time, event, step, ...others }) => JSON.stringify(others);
  return { title: "events", nodes: [view.table([["time", (row) => row.time ?? ""], ["event", (row) => row.event], ["step", (row) => row.step ?? row.after_step], ["what", rest]], events.toReversed(), 2000)] };
};
