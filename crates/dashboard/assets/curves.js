// Whether the run learns, and how fast: the metrics of the steps.

import { el, get, replace, number, percent, seconds } from "./dom.js";
import { chart } from "./chart.js";

/** Points per curve: about one for each two pixels of a wide chart. */
const POINTS = 300;
/** Evaluation sets that are drawn. */
const MOST_SETS = 6;
const SHARE = [0, 1];
const GROUPS = [
  {
    name: "Does it learn?",
    charts: [
      { title: "Reward", metrics: { reward_mean: "mean" } },
      { title: "Pass rate", metrics: { pass_rate: "training" }, fixed: SHARE },
      { title: "Held-out problems", set: "evaluation", metrics: { pass_at_1: "pass@1", pass_at_k: "pass@k" }, fixed: SHARE },
      { title: "Mixed groups", metrics: { mixed_share: "share" }, fixed: SHARE, about: "Only groups with right and wrong answers carry gradient." },
      {
        title: "Groups by pass rate",
        stacked: true,
        fixed: SHARE,
        metrics: {
          pass_rate_share_0: "none right",
          pass_rate_share_1_to_25: "to 25 %",
          pass_rate_share_26_to_50: "to 50 %",
          pass_rate_share_51_to_75: "to 75 %",
          pass_rate_share_76_to_99: "to 99 %",
          pass_rate_share_100: "all right",
        },
      },
    ],
  },
  {
    name: "Is the policy healthy?",
    charts: [
      { title: "Entropy", unit: "nats per token", metrics: { entropy: "rollout", learner_entropy: "learner" } },
      { title: "Score calibration", unit: "AUC of scores against labels", metrics: { score_auc: "AUC" }, fixed: SHARE, mark: 0.5, about: "Below one half the policy moves away from right answers." },
      { title: "Score size", unit: "nats", metrics: { score_abs_mean: "score", log_ratio_abs_mean: "log-ratio" } },
      { title: "Log-prob mismatch", unit: "nats, rollout against learner", metrics: { logprob_mismatch_mean: "mean", logprob_mismatch_max: "largest" }, log: true },
      { title: "Answer length", unit: "tokens", metrics: { answer_tokens_mean: "all", answer_tokens_correct_mean: "right", answer_tokens_wrong_mean: "wrong" } },
      { title: "Cut off, unreadable", metrics: { truncated_share: "cut off", unparsable_share: "no answer found" }, fixed: SHARE },
      { title: "Gradient norm", metrics: { grad_norm: "before clipping" } },
      { title: "Divergence", unit: "nats per token", metrics: { policy_kl_k3: "old policy", reference_kl: "reference" } },
    ],
  },
  {
    name: "What does it cost?",
    charts: [
      { title: "Throughput", unit: "tokens per second", metrics: { tokens_per_second: "generated, whole step", trained_tokens_per_second: "trained, update" } },
      { title: "Time of a step", unit: "seconds", stacked: true, colours: [4, 0, 5], metrics: { sampling_seconds: "waiting for samples", training_seconds: "training", checkpoint_stall_seconds: "checkpoints" } },
      { title: "Verification after the last sample", unit: "seconds", metrics: { verifying_seconds: "tail" } },
      { title: "Lag", unit: "versions", metrics: { lag: "oldest token" } },
      { title: "Failures", unit: "per step", metrics: { failed_verdicts: "verifications", replaced_samples: "replaced samples", dropped_groups: "dropped groups", skipped_updates: "skipped updates" } },
      { title: "Exchange between ranks", unit: "seconds", metrics: { seconds_communication: "all", seconds_communication_wait: "waited for" } },
    ],
  },
];

const namesOf = (set) =>
  GROUPS.flatMap((group) => group.charts)
    .filter((spec) => (spec.set ?? "train") === set)
    .flatMap((spec) => Object.keys(spec.metrics))
    .join(",");

const TILES = [
  ["reward_mean", "Reward", (value) => number(value)],
  ["pass_rate", "Pass rate", percent],
  ["mixed_share", "Mixed groups", percent],
  ["entropy", "Entropy", (value) => `${number(value)} nats`],
  ["tokens_per_second", "Throughput", (value) => `${number(value)} tok/s`],
  ["total_seconds", "Last step", seconds],
];

export function curves() {
  const tiles = el("dl", { class: "tiles" });
  const missing = el("p", { class: "soft" });
  const sections = GROUPS.map((group) => {
    const charts = group.charts.map((spec) => ({ spec, ...chart(spec) }));
    const node = el("section", {}, el("h2", {}, group.name), el("div", { class: "charts" }, charts.map((one) => one.node)));
    return { node, charts };
  });
  const empty = el("p", { class: "soft" }, "No step has ended yet. The curves begin with the first one.");
  const note = el("p", { class: "soft" });
  const node = el("div", {}, tiles, note, empty, sections.map((section) => section.node), missing);
  let drawn = null;

  async function seriesOf(index, status) {
    const ask = (set, problems) => get(`${index}/metrics`, { set, problems, names: namesOf(set), points: POINTS });
    const [train, first] = await Promise.all([ask("train"), ask("evaluation")]);
    // The first answer is that of the unnamed set, or of the first by name.
    const names = first.sets.includes("evaluation") ? ["evaluation", ...first.sets.filter((set) => set !== "evaluation")] : first.sets;
    const others = await Promise.all(names.slice(1, MOST_SETS).map((set) => ask("evaluation", set)));
    const byName = (answer) => new Map(answer.series.map((series) => [series.name, series]));
    const evaluations = [first, ...others].map((answer, place) => ({ set: names[place], series: byName(answer) }));
    return { train: byName(train), evaluations, width: train.steps_per_point, status };
  }

  return {
    node,
    async update({ runs, shown, current, status }) {
      // A run that is over stays as it is, and the current one until its step or phase changes; of the others nothing is known.
      const now = JSON.stringify([current, shown.map((index) => [index, !runs[index].live || (index === current ? [status.step, status.phase] : Date.now())])]);
      if (now === drawn) return;
      const loaded = await Promise.all(shown.map(async (index) => ({ index, ...(await seriesOf(index)) })));
      const own = loaded.find((run) => run.index === current) ?? loaded[0];
      if (!own) return;
      const newest = (name) => status?.metrics?.[name] ?? own.train.get(name)?.means.at(-1);
      replace(tiles, TILES.filter(([name]) => newest(name) !== undefined).map(([name, title, format]) =>
        el("div", { class: "tile" }, el("dt", {}, title), el("dd", {}, format(newest(name))))));
      const absent = [];
      let some = false;
      for (const section of sections) {
        let any = false;
        for (const { spec, node: figure, update } of section.charts) {
          const wanted = Object.entries(spec.metrics);
          const series = loaded.flatMap((run, order) =>
            wanted.flatMap(([name, label], place) => {
              const several = loaded.length > 1;
              const sets = spec.set === "evaluation" ? run.evaluations : [{ set: null, series: run.train }];
              return sets.flatMap(({ set, series: known }, number) => {
                const found = known.get(name);
                if (!found) return [];
                const words = [several && runs[run.index].name, sets.length > 1 && set, (wanted.length > 1 || (!several && sets.length < 2)) && label];
                const colour = several && !spec.stacked ? order : sets.length > 1 ? number : place;
                return [{ ...found, name: words.filter(Boolean).join(", "), colour, dash: place }];
              });
            }));
          // Areas of several runs cannot lie on top of each other: the current run's are drawn.
          const drawn = spec.stacked ? wanted.flatMap(([name, label], place) => {
            const found = own.train.get(name);
            return found ? [{ ...found, lows: undefined, highs: undefined, name: label, colour: spec.colours?.[place] ?? place, dash: 0 }] : [];
          }) : series;
          figure.hidden = drawn.length === 0;
          if (drawn.length) update(drawn);
          else absent.push(spec.title);
          any ||= drawn.length > 0;
        }
        section.node.hidden = !any;
        some ||= any;
      }
      empty.hidden = some;
      missing.textContent = some && absent.length ? `This job writes nothing for: ${absent.join(", ")}.` : "";
      note.textContent = own.width > 1 ? `Each point covers up to ${own.width} steps: its mean, with the range from the smallest to the largest value shaded.` : "";
      // A step may have ended whose metrics are not in the file yet.
      const last = own.train.get("reward_mean")?.steps.at(-1) ?? 0;
      drawn = !status || last >= status.step ? now : null;
    },
  };
}
