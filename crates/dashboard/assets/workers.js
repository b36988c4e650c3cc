// The members of the run, its verifiers, and what was counted and decided.

import { el, replace, number, seconds, short, clock } from "./dom.js";

function table(label, heads, rows) {
  if (!rows.length) return null;
  const head = heads.map(([name, kind]) => el("th", { scope: "col", class: kind ?? null }, name));
  const body = rows.map((row) => el("tr", {}, row.map((cell, place) => el("td", { class: heads[place][1] ?? null }, cell))));
  return el("div", { class: "scroll", tabindex: 0, role: "region", "aria-label": label },
    el("table", {}, el("thead", {}, el("tr", {}, head)), el("tbody", {}, body)));
}

const part = (title, content) => content && el("section", {}, el("h2", {}, title), content);

export function workers() {
  const node = el("div", {});
  let shown = "";
  return {
    node,
    async update({ status }) {
      if (!status) {
        replace(node, el("p", { class: "soft" }, "The run is over: it has no workers."));
        return;
      }
      // A table that is scrolled or read is only drawn again when it changes.
      const now = JSON.stringify([status.workers, status.verifiers, status.counters, status.actions, status.quarantined, status.left_out]);
      if (now === shown) return;
      shown = now;
      const scrolled = [...node.querySelectorAll(".scroll")].map((one) => one.scrollLeft);
      const members = table("Workers", [["name"], ["role"], ["does", "wide"], ["for", "num"], ["leases", "num"], ["heard", "num"], ["host"]],
        status.workers.map((worker) => [
          worker.name,
          worker.role + (worker.rank === null ? "" : ` ${worker.rank}`),
          (worker.draining ? "draining; " : "") + worker.activity,
          seconds(worker.activity_seconds),
          number(worker.leases),
          worker.silent_seconds > 5 ? `silent ${seconds(worker.silent_seconds)}` : `${seconds(worker.silent_seconds)} ago`,
          worker.host,
        ]));
      const verifiers = table("Verifiers", [["worker"], ["verifier"], ["right", "num"], ["wrong", "num"], ["unreadable", "num"], ["failed", "num"], ["timed out", "num"], ["last verdict", "num"], ["median", "num"], ["p99", "num"], ["cached", "num"]],
        status.verifiers.map((one) => [
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
      replace(node,
        part(`Workers (${status.workers.length})`, members ?? el("p", { class: "soft" }, "No worker has joined yet.")),
        left.length > 0 && el("p", { class: "soft" }, `Not shown: ${left.join(", ")}.`),
        part("Verifiers", verifiers), part("Counted since the start", counters),
        part("Operator actions", actions), part("Quarantined groups", quarantined));
      [...node.querySelectorAll(".scroll")].forEach((one, place) => { one.scrollLeft = scrolled[place] ?? 0; });
    },
  };
}
