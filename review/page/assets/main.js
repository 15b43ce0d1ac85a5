"use strict";
// Which page an address means, the bar above it, the keyboard, and light or dark.
{
  const PAGES = { o: "overview", s: "step", e: "events" };
  const KEYS = [["o", "overview"], ["s", "newest step"], ["e", "events"], ["← →", "the step or group before and after"], ["c", "the next colouring of tokens"], ["t", "light or dark"], ["?", "this list"]];
  let here = {}, shown = 0;

  const theme = (name) => {
    document.documentElement.dataset.theme = name;
    try { localStorage.setItem("theme", name); } catch { /* private mode keeps nothing */ }
  };
  const initial = () => {
    try { return localStorage.getItem("theme"); } catch { return null; }
  };
  theme(initial() ?? (matchMedia("(prefers-color-scheme: dark)").matches ? "dark" : "light"));

  const parts = () => {
    const found = location.hash.replace(/^#\/?/, "").split("/").filter(Boolean).map(decodeURIComponent);
    return { run: Math.min(Math.max(+found[0] || 0, 0), view.runs.length - 1), page: view.pages[found[1]] ? found[1] : "overview", rest: found.slice(2) };
  };

  const bar = ({ run, page }) => {
    document.getElementById("bar").replaceChildren(
      view.runs.length > 1 ? view.make("select", { onchange: (event) => { location.hash = view.link(event.target.value, page === "overview" ? "overview" : page); } },
        view.runs.map((name, i) => view.make("option", { value: i, selected: i === run }, name))) : view.make("b", {}, view.runs[run] ?? ""),
      ...Object.values(PAGES).map((name) => view.make("a", { href: view.link(run, name), "aria-current": name === page && "page" }, name)),
      view.make("span", { class: "right" }, view.make("button", { onclick: flip, title: "light or dark" }, "◐"), " ", view.make("button", { onclick: help }, "?")));
  };

  const flip = () => {
    theme(document.documentElement.dataset.theme === "dark" ? "light" : "dark");
    here.ready?.();
  };
  const help = () => {
    const dialog = view.make("dialog", { onclick: () => dialog.close(), onclose: () => dialog.remove() }, view.make("h1", {}, "keys"), KEYS.map(([key, what]) => view.make("p", {}, view.make("kbd", {}, key), ` ${what}`)));
    document.body.append(dialog);
    dialog.showModal();
  };

  const open = async () => {
    const asked = parts(), mine = ++shown, box = document.getElementById("page");
    view.tip(null);
    bar(asked);
    let made;
    try {
      made = await view.pages[asked.page](asked.run, ...asked.rest);
    } catch (error) {
      made = { title: "not found", nodes: [view.make("p", { class: "fault" }, error.message)] };
    }
    if (mine !== shown) return; // another page was asked for meanwhile
    here = made;
    document.title = `${made.title} – ${view.runs[asked.run] ?? "quartet"}`;
    box.replaceChildren(view.make("h1", {}, made.title), ...made.nodes.flat(9));
    made.ready?.();
    scrollTo(0, 0);
  };

  addEventListener("keydown", (event) => {
    if (event.ctrlKey || event.metaKey || event.altKey || event.target.closest?.("input, select, textarea, dialog")) return;
    const { run } = parts(), key = event.key;
    const acts = { ArrowLeft: here.previous, ArrowRight: here.next, c: here.cycle, t: flip, "?": help };
    const act = acts[key] ?? (PAGES[key] && (() => { location.hash = view.link(run, PAGES[key]); }));
    if (!act) return;
    event.preventDefault();
    act();
  });

  const start = async () => {
    try {
      view.runs = await view.ask("runs");
    } catch (error) {
      document.getElementById("page").replaceChildren(view.make("p", { class: "fault" }, error.message));
      return;
    }
    addEventListener("hashchange", open);
    await open();
    let asks = false; // one answer at a time, however long a run's files are
    const live = async () => {
      if (document.hidden || asks) return;
      asks = true;
      try { await here.live?.(); } catch { /* the next one may answer */ } finally { asks = false; }
    };
    if (!view.recorded) setInterval(live, 2000);
  };
  start();
}
