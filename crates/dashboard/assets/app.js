// Start, navigation and polling. One view is drawn at a time, and only what it needs is asked for.

import { el, get, replace, say, commands, seconds, clock, percent, number, SignedOut } from "./dom.js";
import { curves } from "./curves.js";
import { timeline } from "./timeline.js";
import { workers } from "./workers.js";
import { samples } from "./samples.js";

const EVERY = 2000;
/** Events that are asked for and kept in the list. */
const MOST_EVENTS = 300;
const $ = (id) => document.getElementById(id);

function events() {
  const list = el("ol", { class: "events" });
  const only = el("select", { id: "kind" }, [["", "all"], ["trouble", "waiting, notes, lost workers"], ["operator", "operator actions"], ["evaluation", "evaluations"], ["saved", "checkpoints"]].map(([value, name]) => el("option", { value }, name)));
  const node = el("div", {}, el("form", { class: "filter", onsubmit: (event) => event.preventDefault() }, el("label", { for: "kind" }, "Show", only)), list);
  let context = null;
  let shown = null;
  let newest = 0;
  only.addEventListener("change", () => context && view.update(context));
  const words = {
    step: ({ step, total_steps, metrics: m }) => `step ${number(step)} of ${number(total_steps)}: reward ${number(m.reward_mean)}, pass rate ${percent(m.pass_rate)}, ${seconds(m.total_seconds)}`,
    evaluation: ({ step, set, metrics }) => `evaluation${set && set !== "evaluation" ? ` of ${set}` : ""} after ${step} steps: pass@1 ${percent(metrics.pass_at_1)}`,
    operator: ({ operator, action }) => `${operator} ${action}`,
    saved: (fields) => `checkpoint of step ${fields.step} saved in ${seconds(fields.seconds)}`,
    worker_gone: (fields) => (fields.drained ? `worker ${fields.name} was drained` : `worker ${fields.name} is gone: ${fields.reason}`),
    learners_ready: (fields) => `learners are ready at step ${fields.step}: ${fields.learners.join(", ")}`,
    waiting: (fields) => fields.sentence,
    note: (fields) => fields.text,
    run_over: (fields) => `the run is over: ${fields.how}${fields.reason ? `: ${fields.reason}` : ""}`,
    lost: (fields) => `${fields.events} events were lost`,
  };
  const isWanted = (event) => {
    const kind = only.value;
    if (kind === "trouble") return !["step", "evaluation", "saved", "learners_ready", "operator"].includes(event.event);
    return !kind || event.event === kind;
  };
  const view = {
    node,
    async update(next) {
      context = next;
      if (!next.runs[next.current].live) {
        shown = null;
        replace(list, el("li", {}, "Events are kept while a coordinator serves. Of a run that is over, pacs logs shows them."));
        return;
      }
      const data = await get(`${next.current}/events`, { past: MOST_EVENTS });
      const wanted = data.events.filter((event) => words[event.event] && isWanted(event)).reverse();
      const row = (event) => el("li", {}, el("time", { class: "num soft" }, clock(event.time)), el("span", { class: "soft" }, event.event.replaceAll("_", " ")), el("span", {}, words[event.event](event.fields)));
      const now = `${next.current} ${only.value}`;
      const last = wanted[0]?.number ?? 0;
      // New events come on top of the others, so that a selection stays. Numbers begin anew with the coordinator.
      if (shown === now && newest > 0 && last >= newest) {
        list.prepend(...wanted.filter((event) => event.number > newest).map(row));
        while (list.childElementCount > MOST_EVENTS) list.lastElementChild.remove();
      } else {
        replace(list, wanted.length ? wanted.map(row) : el("li", {}, "No such event yet."));
      }
      [shown, newest] = [now, last];
    },
  };
  return view;
}

function settings() {
  const node = el("div", {});
  let drawn = null;
  return {
    node,
    async update({ current, runs }) {
      if (drawn === current) return;
      const data = await get(`${current}/settings`);
      const facts = Object.entries(data.facts);
      replace(node, facts.length > 0 && el("dl", { class: "tiles facts" }, facts.map(([name, value]) => el("div", { class: "tile" }, el("dt", {}, name), el("dd", { class: "mono" }, value)))),
        el("h2", {}, `Job spec of ${runs[current].name}`), el("pre", { class: "toml", tabindex: 0, role: "region", "aria-label": "Job spec" }, data.toml));
      drawn = current;
    },
  };
}

const VIEWS = [
  ["curves", "Curves", curves],
  ["timeline", "Timeline", timeline],
  ["workers", "Workers", workers],
  ["samples", "Samples", samples],
  ["events", "Events", events],
  ["settings", "Settings", settings],
];

const state = { runs: [], shown: [], current: 0, status: null };
const made = new Map();
/** Views that have shown something. */
const drawn = new Set();
let view = null;
let timer = null;
let turn = 0;
/** When the run answered last, in milliseconds. */
let heard = null;

function problem(text) {
  $("problem").hidden = !text;
  say($("problem"), text ?? "");
}

/** Exchanges the token of the address for a cookie, and takes it out of the address and the history. */
async function signIn() {
  const token = new URLSearchParams(location.hash.slice(1)).get("token");
  if (!token) return;
  history.replaceState(null, "", "#curves");
  const response = await fetch("/api/login", { method: "POST", body: token, credentials: "same-origin" });
  if (!response.ok) throw new SignedOut(await response.text());
}

function head() {
  const { status, runs, current } = state;
  const run = runs[current];
  say($("job"), status?.job ?? run.name);
  document.title = `${status ? `${status.step}/${status.total_steps} ` : ""}${run.name} · PACS`;
  if (!status) {
    replace($("progress"), el("span", { class: "soft" }, "the run is over; this is what its folder holds"));
    $("waiting").hidden = true;
    findings([]);
    return;
  }
  $("waiting").hidden = false;
  const left = status.remaining_seconds === null ? "" : `, ${seconds(status.remaining_seconds)} left`;
  // An evaluation that holds the run says when it ends itself.
  const [ofRun, ofPhase] = status.phase === "evaluating" ? ["", left] : [left, ""];
  say($("progress"), `step ${number(status.step)} of ${number(status.total_steps)}${ofRun} · ${status.paused ? "paused · " : ""}${status.phase} for ${seconds(status.phase_seconds)}${ofPhase} · weights v${status.weight_version}`);
  say($("waiting"), status.waiting_for);
  findings(status.findings);
}

/** What goes wrong: said in full above every view, with a link to the one that shows more. */
function findings(found) {
  const node = $("findings");
  node.hidden = found.length === 0;
  const label = (one) => (one.stops_run ? "stops the run" : "notice");
  const now = JSON.stringify(found.map((one) => [one.name, one.stops_run, one.advice, one.view]));
  // Evidence has ages in it, which change all the time: the text changes in place, and is read out once.
  if (node.dataset.shown !== now) {
    node.dataset.shown = now;
    replace(node, found.map((one) => el("li", { class: one.stops_run ? "stops" : null },
      el("b", {}, `▲ ${label(one)}`), " ", el("span", { class: "evidence" }), " ",
      el("span", { class: "advice" }, el("span", { class: "soft" }, "What to do: "), commands(one.advice), ". ",
        VIEWS.some(([id]) => id === one.view) && el("a", { href: `#${one.view}` }, `See ${one.view}`)))));
    say($("told"), found.map((one) => `${label(one)}: ${one.sentence}.`).join(" "));
  }
  node.querySelectorAll(".evidence").forEach((one, place) => say(one, `${found[place].sentence}.`));
}

function chooser() {
  if (state.runs.length < 2) return;
  const boxes = state.runs.map((run) => {
    const box = el("input", { type: "checkbox", checked: state.shown.includes(run.index) });
    box.addEventListener("change", () => {
      state.shown = box.checked ? [...state.shown, run.index].sort((a, b) => a - b) : state.shown.filter((index) => index !== run.index);
      refresh();
    });
    return el("label", {}, box, ` ${run.name}${run.live ? "" : " (over)"}`);
  });
  const main = el("select", { "aria-label": "Run of the other views" }, state.runs.map((run) => el("option", { value: run.index }, run.name)));
  main.addEventListener("change", () => {
    state.current = Number(main.value);
    refresh();
  });
  replace($("runs"), main, el("fieldset", { class: "runs-list" }, el("legend", {}, "Curves of"), boxes));
}

function go() {
  const name = location.hash.slice(1);
  if (name === "view") return;
  const [id, , make] = VIEWS.find(([id]) => id === name) ?? VIEWS[0];
  if (!made.has(id)) made.set(id, make());
  view = made.get(id);
  for (const link of $("tabs").querySelectorAll("a")) {
    if (link.hash === `#${id}`) link.setAttribute("aria-current", "page");
    else link.removeAttribute("aria-current");
  }
  // What has not been drawn yet takes its place without being seen.
  $("view").setAttribute("aria-busy", String(!drawn.has(view)));
  replace($("view"), view.node);
  refresh();
}

async function refresh() {
  clearTimeout(timer);
  const mine = (turn += 1);
  try {
    const run = state.runs[state.current];
    state.status = run.live ? (await get(`${run.index}/status`)).status : null;
    if (mine !== turn) return;
    head();
    const now = view;
    await now.update(state);
    drawn.add(now);
    if (now === view) $("view").setAttribute("aria-busy", "false");
    heard = Date.now();
    problem(null);
  } catch (error) {
    if (error instanceof SignedOut) {
      signedOut();
      return;
    }
    const since = heard === null ? "" : ` What is shown is of ${clock(heard / 1000)}.`;
    problem(`The run does not answer (${error.message}): it has ended, or the connection is gone.${since} Trying again.`);
  }
  // A hidden page asks for nothing until it is shown again.
  if (mine === turn && !document.hidden) timer = setTimeout(refresh, EVERY);
}

function signedOut() {
  clearTimeout(timer);
  problem("Signed out.");
  say($("waiting"), "");
  $("view").setAttribute("aria-busy", "false");
  replace($("view"), el("p", {}, "This address needs a token of limited life. "), el("p", {}, el("code", {}, "pacs dashboard"), " prints an address with a new one. Open that."));
}

async function start() {
  say($("waiting"), "loading");
  replace($("tabs"), VIEWS.map(([id, name]) => el("li", {}, el("a", { href: `#${id}` }, name))));
  try {
    await signIn();
    state.runs = (await get("runs")).runs;
  } catch (error) {
    if (error instanceof SignedOut) signedOut();
    else {
      problem(`The dashboard does not answer (${error.message}). Trying again.`);
      setTimeout(start, EVERY);
    }
    return;
  }
  state.shown = state.runs.map((run) => run.index).slice(0, 6);
  chooser();
  addEventListener("hashchange", async () => {
    // A new token, pasted into an open page.
    if (location.hash.startsWith("#token=")) {
      try {
        await signIn();
      } catch {
        signedOut();
        return;
      }
    }
    go();
  });
  document.addEventListener("visibilitychange", () => document.hidden || refresh());
  go();
}

start();
