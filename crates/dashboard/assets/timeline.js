// Where time goes: what every worker did, step by step and second by second. Gaps in a lane are bubbles.

import { el, svg, get, replace, say, byName, number, seconds } from "./dom.js";
import { chart, swatch } from "./chart.js";

const STEPS = 30;
/** Lanes of a role that are drawn; the others are summed up in words. */
const MOST_LANES = 64;
/** Workers from which on lanes are low. */
const MANY = 24;
/** A bar is drawn up to so many times the length that nine of ten steps have at most. */
const CUT = 1.5;
const WIDE = 1000;
const ROLES = ["rollout", "verifier", "learner"];
const STATES = [
  ["working", "working"],
  ["moving", "loading, saving, receiving weights"],
  ["waiting", "waiting: a bubble"],
  ["silent", "silent: no heartbeat for 5 s"],
];
/** Phases by colour; their names are written into the lane where there is room. */
const PHASES = { sampling: 4, training: 0, evaluating: 2, saving: 5, committing: 5, preparing: 3, assembling: 3, paused: 6 };
const PARTS = [
  ["wait", "waiting for samples", 4],
  ["verify", "of which after the last sample: verification", 1],
  ["train", "training", 0],
  ["stall", "standing still for a checkpoint", 5],
];

function patterns() {
  const pattern = (id, size, ...shapes) =>
    svg("pattern", { id, width: size, height: size, patternUnits: "userSpaceOnUse" }, shapes);
  const style = (node, values) => Object.assign(node.style, values) && node;
  const stroke = (d, colour, width) => style(svg("path", { d, fill: "none", "stroke-width": width }), { stroke: colour });
  return svg("svg", { class: "defs", "aria-hidden": "true" }, svg("defs", {},
    pattern("p-waiting", 6, stroke("M0 6L6 0M-1 1L1 -1M5 7L7 5", "var(--soft)", 0.7)),
    pattern("p-moving", 5,
      style(svg("rect", { width: 5, height: 5, "fill-opacity": 0.35 }), { fill: "var(--c2)" }),
      style(svg("circle", { cx: 2.5, cy: 2.5, r: 1.3 }), { fill: "var(--c2)" })),
    pattern("p-silent", 6,
      style(svg("rect", { width: 6, height: 6, "fill-opacity": 0.25 }), { fill: "var(--alarm)" }),
      stroke("M0 0L6 6M6 0L0 6", "var(--alarm)", 1.4))));
}

/** One lane: a path per state, however many segments it has. */
function lane(segments, from, to, name) {
  const scale = WIDE / Math.max(1, to - from);
  const paths = new Map();
  const sums = new Map();
  for (const [begin, end, state] of segments) {
    const left = (begin - from) * scale;
    const wide = Math.max(0.8, (end - begin) * scale);
    paths.set(state, `${paths.get(state) ?? ""}M${left.toFixed(1)} 0h${wide.toFixed(1)}v15h${(-wide).toFixed(1)}z`);
    sums.set(state, (sums.get(state) ?? 0) + end - begin);
  }
  const total = [...sums.values()].reduce((sum, part) => sum + part, 0);
  const share = (state) => (total > 0 ? (sums.get(state) ?? 0) / total : 0);
  const words = STATES.filter(([state]) => share(state) > 0.005).map(([state]) => `${state} ${Math.round(100 * share(state))} %`);
  const picture = svg("svg", { viewBox: `0 0 ${WIDE} 15`, preserveAspectRatio: "none", role: "img", "aria-label": `${name}: ${words.join(", ") || "no data"}` },
    [...paths].map(([state, d]) => svg("path", { d, class: state })));
  return { name, picture, working: share("working"), silent: segments.at(-1)?.[2] === "silent" };
}

function phaseLane(segments, from, to) {
  const scale = WIDE / Math.max(1, to - from);
  const picture = svg("svg", { viewBox: `0 0 ${WIDE} 15`, preserveAspectRatio: "none", role: "img" });
  const sums = new Map();
  for (const [begin, end, phase] of segments) {
    sums.set(phase, (sums.get(phase) ?? 0) + end - begin);
    picture.append(svg("rect", { x: ((begin - from) * scale).toFixed(1), y: 0, height: 15, width: Math.max(0.8, (end - begin) * scale).toFixed(1), class: `area s${PHASES[phase] ?? 6}` },
      svg("title", {}, `${phase}: ${seconds(end - begin)}`)));
  }
  const total = [...sums.values()].reduce((sum, part) => sum + part, 0) || 1;
  const shares = [...sums].sort((a, b) => b[1] - a[1]).map(([phase, sum]) => [phase, Math.round((100 * sum) / total)]);
  const words = shares.map(([phase, share]) => `${phase} ${share} %`);
  picture.setAttribute("aria-label", `Phases of the run: ${words.join(", ")}`);
  return { picture, shares };
}

/** A step as a bar; one that is longer than the lane is cut off, and marked. */
function stepRow(step, scale) {
  const bar = svg("svg", { viewBox: `0 0 ${WIDE} 15`, preserveAspectRatio: "none", role: "img" });
  let at = 0;
  const said = [];
  for (const [part, label, colour] of PARTS) {
    const length = step[part];
    if (!(length > 0)) continue;
    said.push(`${label} ${seconds(length)}`);
    bar.append(svg("rect", { x: (at * scale).toFixed(1), y: 0, height: 15, width: Math.max(0.8, length * scale).toFixed(1), class: `area s${colour}` },
      svg("title", {}, `${label}: ${seconds(length)}`)));
    at += length;
  }
  bar.setAttribute("aria-label", `step ${step.step}: ${said.join(", ")}`);
  return [el("span", { class: "name num" }, `step ${number(step.step)}`), bar, el("span", { class: "share" }, seconds(at), at * scale > WIDE * 1.001 && " ▸")];
}

export function timeline() {
  const span = el("select", { id: "span" }, [[120, "2 minutes"], [600, "10 minutes"], [1800, "30 minutes"]].map(([value, name]) =>
    el("option", { value, selected: value === 600 }, name)));
  const lanes = el("div", { class: "lanes" });
  const laneNote = el("p", { class: "soft" });
  const phaseKey = el("ul", { class: "legend" });
  const steps = el("div", { class: "lanes" });
  const stepNote = el("p", { class: "soft" });
  const queues = chart({ title: "Queues", unit: "groups, samples", across: "seconds ago", real: true, tick: (value) => (value === 0 ? "now" : `${number(value)} s`) });
  const key = el("ul", { class: "key" }, STATES.map(([state, name]) =>
    el("li", {}, svg("svg", { viewBox: "0 0 22 12", "aria-hidden": "true" }, svg("rect", { width: 22, height: 12, class: state })), name)));
  const stepKey = el("ul", { class: "legend" }, PARTS.map(([, label, colour]) => el("li", {}, swatch(colour, 0, true), label)));
  const live = el("section", {},
    el("h2", {}, "Workers"),
    el("form", { class: "filter", onsubmit: (event) => event.preventDefault() }, el("label", { for: "span" }, "Time", span)),
    key, lanes, phaseKey, laneNote,
    el("div", { class: "charts wide" }, queues.node));
  const node = el("div", {}, patterns(), live, el("section", {}, el("h2", {}, "Steps"), stepKey, steps, stepNote));
  let context = null;
  let drawn = null;
  span.addEventListener("change", () => context && view.update(context));

  function showLanes(data) {
    const { to } = data;
    // A young run is drawn from its beginning.
    const begins = [...data.phases, ...data.workers.flatMap((worker) => worker.segments)].map(([begin]) => begin);
    const from = Math.max(data.from, begins.length ? Math.min(...begins) : data.from);
    const phases = phaseLane(data.phases, from, to);
    const rows = [el("span", { class: "name" }, "run"), phases.picture, el("span", { class: "share" })];
    // Where there is one worker a role, its name says the role.
    const hasRoles = data.workers.length > ROLES.length;
    for (const role of ROLES) {
      const own = data.workers.filter((worker) => worker.role === role).sort((a, b) => byName(a.name, b.name));
      const members = own.map((worker) => lane(worker.segments, from, to, worker.name));
      if (!members.length) continue;
      const silent = members.filter((member) => member.silent).length;
      const working = members.reduce((sum, member) => sum + member.working, 0) / members.length;
      const isShort = members.length > MOST_LANES;
      if (hasRoles) rows.push(el("span", { class: "role" }, el("b", {}, role), [
        ` ${number(members.length)} ${members.length === 1 ? "worker" : "workers"}`,
        `working ${Math.round(100 * working)} % of the time`,
        silent > 0 && `${number(silent)} silent`,
        isShort && `${MOST_LANES} drawn, silent ones before others`,
      ].filter(Boolean).join(" · ")));
      // Sorting keeps the order of names among the silent and among the others.
      const chosen = isShort ? [...members].sort((a, b) => b.silent - a.silent).slice(0, MOST_LANES).sort((a, b) => byName(a.name, b.name)) : members;
      for (const member of chosen) {
        rows.push(el("span", { class: "name", title: member.name }, member.name), member.picture,
          el("span", { class: member.silent ? "share bad" : "share" }, member.silent ? "silent" : `${Math.round(100 * member.working)} %`));
      }
    }
    lanes.classList.toggle("many", data.workers.length > MANY);
    const axis = svg("svg", { class: "axis-row", "aria-hidden": "true" },
      svg("text", { x: "0", y: 12 }, `${seconds(to - from)} ago`), svg("text", { x: "100%", y: 12, "text-anchor": "end" }, "now"));
    rows.push(el("span"), axis, el("span"));
    replace(lanes, rows);
    const more = data.without_lane ? ` ${number(data.without_lane)} more workers have no lane.` : "";
    replace(phaseKey, el("li", {}, "Phases of the run:"), phases.shares.map(([phase, share]) => el("li", {}, swatch(PHASES[phase] ?? 6, 0, true), `${phase} `, el("b", {}, `${share} %`))));
    say(laneNote, `The share on the right is time spent working.${more}`);
    queues.update(data.queue_names.map((name, place) => ({
      name: name.replaceAll("_", " "),
      colour: place,
      dash: place,
      steps: data.queues.map(([time]) => Math.round((time - to) * 10) / 10),
      means: data.queues.map(([, depths]) => depths[place]),
    })));
  }

  /** The newest steps one by one, or nothing where the same ones are drawn already. */
  async function askSteps({ current, status, runs }) {
    const now = JSON.stringify([current, status?.step, runs[current].live]);
    if (now === drawn) return null;
    const newest = async () => (await get(`${current}/metrics`, { set: "train", names: "total_seconds", points: 1 })).series[0]?.steps.at(-1) ?? 0;
    const last = status?.step ?? await newest();
    const names = "sampling_seconds,verifying_seconds,training_seconds,checkpoint_stall_seconds,total_seconds";
    const answer = await get(`${current}/metrics`, { set: "train", names, points: 2000, first: Math.max(1, last - STEPS + 1) });
    return { answer, last, now };
  }

  function showSteps({ answer, last, now }) {
    const series = new Map(answer.series.map((one) => [one.name, one]));
    const total = series.get("total_seconds");
    const rows = (total?.steps ?? []).slice(-STEPS).map((step) => {
      const value = (name) => {
        const one = series.get(name);
        return one?.means[one.steps.indexOf(step)] ?? 0;
      };
      const sampling = value("sampling_seconds");
      const verify = Math.min(sampling, value("verifying_seconds"));
      return { step, wait: sampling - verify, verify, train: value("training_seconds"), stall: value("checkpoint_stall_seconds") };
    });
    // A step in which the run was paused must not make all others too short to read.
    const lengths = rows.map((row) => row.wait + row.verify + row.train + row.stall).sort((a, b) => a - b);
    const longest = lengths.at(-1) ?? 0;
    const usual = lengths[Math.floor(0.9 * (lengths.length - 1))] ?? 0;
    const whole = Math.max(Math.min(longest, CUT * usual), 1e-9);
    replace(steps, rows.reverse().map((row) => stepRow(row, WIDE / whole)));
    say(stepNote, rows.length
      ? `The newest step is on top.${longest > whole * 1.001 ? " ▸ marks a bar that is longer than drawn." : ""} Learners stand still in all but the training part; with max_lag above 0 rollout workers run ahead in it.`
      : "No step has ended yet.");
    // A step may have ended whose metrics are not in the file yet.
    drawn = (total?.steps.at(-1) ?? 0) >= last ? now : null;
  }

  const view = {
    node,
    async update(next) {
      context = next;
      live.hidden = !next.runs[next.current].live;
      // Both are drawn at once, because lanes that come later would push the steps down.
      const [lanesOf, stepsOf] = await Promise.all([live.hidden ? null : get(`${next.current}/lanes`, { seconds: span.value }), askSteps(next)]);
      if (lanesOf) showLanes(lanesOf);
      if (stepsOf) showSteps(stepsOf);
    },
  };
  return view;
}
