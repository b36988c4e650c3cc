// What the model says: groups side by side, and one answer token by token.

import { el, get, replace, number } from "./dom.js";
import { maths } from "./maths.js";

const PAGE = 32;
/** Surprise (negative log-prob, nats) from which a token has the next level. */
const LEVELS = [0.35, 1.2, 2.3, 4.6];
const BADGES = { correct: ["✓", "right", "correct"], wrong: ["✗", "wrong", "wrong"], unparsable: ["?", "no answer found", "other"] };

function badge(sample) {
  const [mark, word, kind] = BADGES[sample.outcome] ?? ["…", sample.outcome?.replaceAll("_", " ") ?? "no verdict yet", "other"];
  return el("span", { class: `badge ${kind}` }, `${mark} ${word}`);
}

/** What the last update made of an answer: its score, and the weight of its log-prob, whose sign says where it was pushed. */
function signal(sample) {
  const way = sample.coefficient > 0 ? "↑ pushed up " : sample.coefficient < 0 ? "↓ pushed down " : "not pushed ";
  return [
    sample.score !== null && `score ${number(sample.score)}`,
    sample.coefficient !== null && `${way}(coefficient ${number(sample.coefficient)})`,
  ];
}

const where = (sample) =>
  `${sample.set === "evaluation" ? "evaluation" : "training"}${sample.step === null ? ", in flight" : `, step ${sample.step}`}`;

/** A model's text, with its mathematics drawn where that is wanted and understood. */
function prose(text, drawsMaths) {
  return drawsMaths ? maths(text) : document.createTextNode(text);
}

export function samples() {
  const field = (name, label, input) => el("label", {}, label, input);
  const choose = (name, options) => el("select", { name }, options.map(([value, text]) => el("option", { value }, text)));
  const set = choose("set", [["", "all"], ["train", "training"], ["evaluation", "evaluation"]]);
  const outcome = choose("outcome", [["", "any"], ["correct", "right"], ["wrong", "wrong"], ["unparsable", "no answer found"]]);
  const step = el("input", { type: "number", min: 0, name: "step" });
  const group = el("input", { type: "number", min: 0, name: "group" });
  const text = el("input", { type: "search", name: "text", maxlength: 200 });
  const draws = el("input", { type: "checkbox", checked: true });
  const list = el("div", {});
  const more = el("button", { type: "button", hidden: true }, "More");
  const said = el("p", { class: "soft", role: "status" });
  const dialog = el("dialog", { "aria-label": "One answer" });
  const form = el("form", { class: "filter" },
    field("set", "Set", set), field("outcome", "Verdict", outcome), field("step", "Step", step),
    field("group", "Group", group), field("text", "Text", text), el("button", {}, "Show"),
    el("label", { class: "box" }, draws, "draw mathematics"));
  const node = el("div", {}, form, said, list, more, dialog);
  let [page, found, current, isFirst] = ["", [], null, true];

  function answer(sample) {
    const body = el("div", { class: "text", "data-name": `answer ${sample.index} of group ${sample.group}${sample.step === null ? "" : `, step ${sample.step}`}` },
      prose(sample.response, draws.checked), sample.shortened && "…");
    const facts = [
      sample.reward !== null && `reward ${number(sample.reward)}`,
      ...signal(sample),
      sample.extracted !== null && `found “${sample.extracted}”`,
      `${sample.tokens} tokens${sample.finish === "length" ? ", cut off" : ""}`,
      sample.tokens > 0 && `entropy ${number(sample.entropy_sum / sample.tokens)}`,
      sample.rule,
    ].filter(Boolean);
    return el("article", { class: "answer" },
      el("h3", {}, `.${sample.index} `, badge(sample)), body,
      el("p", { class: "facts" }, facts.join(" · ")),
      el("button", { type: "button", onclick: () => open(sample) }, "Tokens"));
  }

  function draw() {
    const groups = new Map();
    for (const sample of found) {
      const key = `${sample.set} ${sample.step} ${sample.group}`;
      groups.set(key, [...(groups.get(key) ?? []), sample]);
    }
    replace(list, [...groups.values()].map((members) => {
      const [first] = members;
      const right = members.filter((sample) => sample.outcome === "correct").length;
      return el("section", { class: "group" },
        el("h2", {}, `Group ${first.group}`, el("span", { class: "soft" }, ` ${where(first)} · ${right} of ${members.length} shown are right`)),
        el("p", { class: "question" }, prose(first.question, draws.checked)),
        first.gold && el("p", {}, "Reference: ", el("b", {}, prose(first.gold, false))),
        el("div", { class: "answers" }, members.sort((a, b) => a.index - b.index).map(answer)));
    }));
    // Long answers scroll, also by keyboard; the others are no stop on the way.
    const long = [...list.querySelectorAll(".text")].filter((text) => text.scrollHeight > text.clientHeight);
    for (const text of long) {
      for (const [name, value] of [["tabindex", "0"], ["role", "region"], ["aria-label", text.dataset.name]]) text.setAttribute(name, value);
    }
  }

  async function load(isNew) {
    if (current === null) return;
    said.textContent = "loading";
    try {
      const query = { set: set.value, outcome: outcome.value, step: step.value, group: group.value, text: text.value, limit: PAGE, page: isNew ? "" : page };
      const data = await get(`${current}/samples`, query);
      found = isNew ? data.samples : [...found, ...data.samples];
      page = data.next_page;
      more.hidden = !page;
      said.textContent = [found.length ? `${found.length} answers, newest first` : "No answer fits.", ...data.notes].join(" · ");
      draw();
    } catch (error) {
      said.textContent = `The answers could not be loaded: ${error.message}`;
    }
  }

  async function open(sample) {
    replace(dialog, el("p", {}, "loading"));
    dialog.showModal();
    try {
      show(sample, await get(`${current}/sample`, { group: sample.group, index: sample.index, step: sample.step }));
    } catch (error) {
      replace(dialog, el("p", {}, error.message), close());
    }
  }

  const close = () => el("button", { type: "button", onclick: () => dialog.close() }, "Close");

  function show(sample, whole) {
    const readout = el("p", { role: "status", class: "num" }, "Arrow keys or the pointer choose a token.");
    const versions = whole.spans.flatMap((span) => Array(Math.min(span.tokens, whole.token_ids.length)).fill(span.version));
    const level = (logprob) => LEVELS.filter((bound) => -logprob >= bound).length;
    const spans = whole.token_ids.map((id, place) =>
      el("span", { class: `l${level(whole.logprobs[place])}` }, whole.pieces[place] ?? `${id} `));
    const strip = el("div", { class: "tokens", tabindex: 0, role: "group", "aria-label": "Tokens of the answer; arrow keys read them one by one" }, spans);
    let at = -1;
    const choose = (to) => {
      spans[at]?.classList.remove("here");
      at = Math.min(spans.length - 1, Math.max(0, to));
      const span = spans[at];
      if (!span) return;
      span.classList.add("here");
      const logprob = whole.logprobs[at];
      readout.textContent = `token ${whole.first_token + at}: ${JSON.stringify(whole.pieces[at] ?? "")} (id ${whole.token_ids[at]}), log-prob ${number(logprob)}, probability ${number(Math.exp(logprob))}${versions[at] === undefined ? "" : `, weights v${versions[at]}`}`;
    };
    strip.addEventListener("pointermove", (event) => {
      const place = spans.indexOf(event.target);
      if (place >= 0) choose(place);
    });
    strip.addEventListener("keydown", (event) => {
      const way = { ArrowRight: 1, ArrowLeft: -1, ArrowDown: 10, ArrowUp: -10, Home: -spans.length, End: spans.length }[event.key];
      if (way === undefined) return;
      event.preventDefault();
      choose(at + way);
      spans[at]?.scrollIntoView({ block: "nearest" });
    });
    const mean = whole.logprobs.reduce((sum, value) => sum + value, 0) / Math.max(1, whole.logprobs.length);
    replace(dialog,
      el("h2", {}, `Group ${sample.group}, answer ${sample.index} `, badge(sample)),
      el("p", { class: "soft" }, [where(sample), `${whole.tokens} tokens`, `mean log-prob ${number(mean)}`, `reward ${number(whole.reward)}`,
        ...signal(whole), whole.rule].filter(Boolean).join(" · ")),
      el("p", { class: "levels" }, [0, 1, 2, 3, 4].map((place) =>
        el("span", { class: `l${place}` }, place === 0 ? `surprise below ${LEVELS[0]} nats` : `from ${LEVELS[place - 1]}`))),
      readout, strip,
      whole.pieces.length === 0 && el("p", { class: "soft" }, "The tokenizer is not at hand here, so tokens are shown by their ids."),
      whole.token_ids.length < whole.tokens && el("p", { class: "soft" }, `The first ${whole.token_ids.length} of ${whole.tokens} tokens; pacs samples --sample shows all.`),
      el("p", {}, close()));
  }

  form.addEventListener("submit", (event) => {
    event.preventDefault();
    load(true);
  });
  draws.addEventListener("change", draw);
  more.addEventListener("click", () => load(false));
  return {
    node,
    async update(context) {
      if (context.current !== current) {
        current = context.current;
        isFirst = true;
      }
      // The list is read, so it changes on request only.
      const isFiltered = [set, outcome, step, group, text].some((input) => input.value !== "");
      if (isFirst || (found.length === 0 && !isFiltered)) {
        isFirst = false;
        await load(true);
      }
    },
  };
}
