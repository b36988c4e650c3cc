// The members of the run, its verifiers, and what was counted and decided.

import { el, replace, say, byName, number, seconds, short, clock } from "./dom.js";

/** Silence from which a worker counts as silent, in seconds; as in the timeline. */
const SILENT = 5;
const ROLES = ["learner", "rollout", "verifier"];

const isSilent = (worker) => worker.silent_seconds > SILENT;

/** `troubled`: whether a row stands out. */
function table(label, heads, rows, troubled = () => false) {
  if (!rows.length) return null;
  const head = heads.map(([name, kind]) => el("th", { scope: "col", class: kind ?? null }, name));
  const body = rows.map((row, line) => el("tr", { class: troubled(line) ? "trouble" : null }, row.map((cell, place) => el("td", { class: heads[place][1] ?? null }, cell))));
  return el("div", { class: "scroll", tabindex: 0, role: "region", "aria-label": label },
    el("table", {}, el("thead", {}, el("tr", {}, head)), el("tbody", {}, body)));
}

const part = (title, content) => content && el("section", {}, el("h2", {}, title), content);

export function workers() {
  const node = el("div", {});
  let shown = "";
  const texts = (of) => of.querySelectorAll("h2, p, td");
  return {
    node,
    async update({ status }) {
      if (!status) {
        replace(node, el("p", { class: "soft" }, "The run is over: it has no workers."));
        return;
      }
      // Those that are silent come first, then by role and name.
      const order = (worker) => ROLES.indexOf(worker.role);
      const all = status.workers.toSorted((a, b) => isSilent(b) - isSilent(a) || order(a) - order(b) || byName(a.name, b.name));
      const draining = all.filter((worker) => worker.draining).length;
      const silent = all.filter(isSilent).length;
      const sums = [
        ...ROLES.map((role) => [all.filter((worker) => worker.role === role).length, role]),
        [draining, "draining"], [silent, "silent"],
      ].filter(([count]) => count > 0).map(([count, what]) => `${number(count)} ${what}`);
      const members = table("Workers", [["name"], ["role"], ["does", "wide"], ["for", "num"], ["leases", "num"], ["heard", "num"], ["host"]],
        all.map((worker) => [
          worker.name,
          worker.role + (worker.rank === null ? "" : ` ${worker.rank}`),
          (worker.draining ? "draining; " : "") + worker.activity,
          seconds(worker.activity_seconds),
          number(worker.leases),
          isSilent(worker) ? `silent ${seconds(worker.silent_seconds)}` : `${seconds(worker.silent_seconds)} ago`,
          worker.host,
        ]), (line) => isSilent(all[line]));
      const own = status.verifiers.toSorted((a, b) => byName(a.worker, b.worker) || byName(a.verifier, b.verifier));
      const verifiers = table("Verifiers", [["worker"], ["verifier"], ["right", "num"], ["wrong", "num"], ["unreadable", "num"], ["failed", "num"], ["timed out", "num"], ["last verdict", "num"], ["median", "num"], ["p99", "num"], ["cached", "num"]],
        own.map((one) => [
          one.worker, one.verifier,
          ...["correct", "wrong", "unparsable", "failed", "timed_out"].map((outcome) => number(one.outcomes[outcome] ?? 0)),
          one.seconds_since_verdict === null ? "none" : `${seconds(one.seconds_since_verdict)} ago`,
          short(one.p50_seconds), short(one.p99_seconds), number(one.cache_hits),
        ]));
      const counted = Object.entries(status.counters).filter(([, count]) => count > 0).sort();
      const counters = counted.length
        ? table("Counters", [["event"], ["count", "num"]], counted.map(([name, count]) => [name.replaceAll("_", " "), number(count)]))
        : el("p", { class: "soft" }, "Nothing went wrong so far.");
      const actions = table("Operator actions", [["time"], ["operator"], ["action", "wide"]],
        status.actions.toReversed().map((one) => [clock(one.time), one.operator, one.action]));
      const quarantined = table("Quarantined groups", [["group", "num"], ["question", "wide"], ["why", "wide"]],
        status.quarantined.map((one) => [String(one.group), one.question, one.reason]));
      const left = Object.entries(status.left_out).map(([name, count]) => `${count} more ${name.replaceAll("_", " ")}`);
      const fresh = el("div", {},
        part(`Workers (${number(all.length)})`, members ? [el("p", { class: "soft" }, sums.join(" · ")), members] : el("p", { class: "soft" }, "No worker is a member.")),
        left.length > 0 && el("p", { class: "soft" }, `Not shown: ${left.join(", ")}.`),
        part("Verifiers", verifiers), part("Counted since the start", counters),
        part("Operator actions", actions), part("Quarantined groups", quarantined));
      // Where rows are the same only texts change, so that a selection and the place in a table stay.
      const now = JSON.stringify([all.map((worker) => [worker.name, worker.role, isSilent(worker)]), own.map((one) => [one.worker, one.verifier]),
        counted.map(([name]) => name), status.actions.length, status.quarantined.map((one) => one.group), left.length]);
      if (now === shown) {
        const next = texts(fresh);
        texts(node).forEach((one, place) => say(one, next[place].textContent));
        return;
      }
      shown = now;
      const scrolled = [...node.querySelectorAll(".scroll")].map((one) => [one.scrollLeft, one.scrollTop]);
      replace(node, ...fresh.childNodes);
      node.querySelectorAll(".scroll").forEach((one, place) => { [one.scrollLeft, one.scrollTop] = scrolled[place] ?? [0, 0]; });
    },
  };
}
