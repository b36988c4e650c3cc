// Mathematics of answers as MathML, which browsers draw themselves. The subset of LaTeX that models use for answers; what is
// not understood stays as its source.

import { el } from "./dom.js";

const NS = "http://www.w3.org/1998/Math/MathML";
/** Bounds of one formula: its source, and how deep it may nest. */
const MOST_CHARACTERS = 3000;
const MOST_DEPTH = 40;

const node = (tag, ...children) => {
  const made = document.createElementNS(NS, tag);
  made.append(...children);
  return made;
};
const word = (tag, text) => node(tag, document.createTextNode(text));

const LETTERS = {
  alpha: "α", beta: "β", gamma: "γ", delta: "δ", epsilon: "ϵ", varepsilon: "ε", zeta: "ζ", eta: "η", theta: "θ", vartheta: "ϑ",
  iota: "ι", kappa: "κ", lambda: "λ", mu: "μ", nu: "ν", xi: "ξ", pi: "π", rho: "ρ", sigma: "σ", tau: "τ", upsilon: "υ", phi: "ϕ",
  varphi: "φ", chi: "χ", psi: "ψ", omega: "ω", Gamma: "Γ", Delta: "Δ", Theta: "Θ", Lambda: "Λ", Xi: "Ξ", Pi: "Π", Sigma: "Σ",
  Upsilon: "Υ", Phi: "Φ", Psi: "Ψ", Omega: "Ω", infty: "∞", ell: "ℓ", emptyset: "∅", varnothing: "∅", partial: "∂", nabla: "∇",
  hbar: "ℏ", Re: "ℜ", Im: "ℑ", aleph: "ℵ",
};
const OPERATORS = {
  cdot: "⋅", times: "×", div: "÷", pm: "±", mp: "∓", ast: "∗", star: "⋆", circ: "∘", bullet: "∙", le: "≤", leq: "≤", leqslant: "≤",
  ge: "≥", geq: "≥", geqslant: "≥", ne: "≠", neq: "≠", lt: "<", gt: ">", approx: "≈", equiv: "≡", sim: "∼", cong: "≅", propto: "∝",
  to: "→", rightarrow: "→", leftarrow: "←", Rightarrow: "⇒", Leftarrow: "⇐", implies: "⟹", iff: "⟺", Leftrightarrow: "⇔",
  leftrightarrow: "↔", mapsto: "↦", in: "∈", notin: "∉", ni: "∋", subset: "⊂", subseteq: "⊆", supset: "⊃", supseteq: "⊇", cup: "∪",
  cap: "∩", setminus: "∖", land: "∧", wedge: "∧", lor: "∨", vee: "∨", neg: "¬", lnot: "¬", forall: "∀", exists: "∃", mid: "∣",
  nmid: "∤", parallel: "∥", perp: "⊥", angle: "∠", triangle: "△", degree: "°", prime: "′", dots: "…", ldots: "…", cdots: "⋯",
  vdots: "⋮", ddots: "⋱", oplus: "⊕", otimes: "⊗", therefore: "∴", because: "∵", colon: ":", lfloor: "⌊", rfloor: "⌋", lceil: "⌈",
  rceil: "⌉", langle: "⟨", rangle: "⟩", lvert: "|", rvert: "|", vert: "|", lVert: "‖", rVert: "‖", Vert: "‖", "{": "{", "}": "}",
  "%": "%", $: "$", "#": "#", "&": "&", _: "_", "|": "‖",
};
const LARGE = { sum: "∑", prod: "∏", int: "∫", iint: "∬", oint: "∮", bigcup: "⋃", bigcap: "⋂" };
const NAMES = new Set(["sin", "cos", "tan", "cot", "sec", "csc", "arcsin", "arccos", "arctan", "sinh", "cosh", "tanh", "log", "ln", "lg",
  "exp", "lim", "max", "min", "sup", "inf", "gcd", "lcm", "det", "dim", "ker", "deg", "arg", "Pr"]);
const SPACES = { ",": "0.17em", ":": "0.22em", ";": "0.28em", " ": "0.3em", quad: "1em", qquad: "2em", "!": "0" };
const FONTS = { mathrm: "normal", mathbf: "bold", mathbb: "double-struck", mathcal: "script", mathit: "italic", mathsf: "sans-serif",
  boldsymbol: "bold", operatorname: "normal" };
const ACCENTS = { overline: "¯", bar: "¯", hat: "^", widehat: "^", vec: "→", overrightarrow: "→", tilde: "~", widetilde: "~", dot: "˙" };
const FENCES = { pmatrix: "()", bmatrix: "[]", vmatrix: "||", Bmatrix: "{}", matrix: "", cases: "{", array: "", aligned: "", align: "",
  "align*": "", gathered: "", smallmatrix: "" };
const DOUBLE = { N: "ℕ", Z: "ℤ", Q: "ℚ", R: "ℝ", C: "ℂ", P: "ℙ", F: "𝔽", E: "𝔼" };
const IGNORED = new Set(["displaystyle", "textstyle", "limits", "nolimits", "big", "Big", "bigg", "Bigg", "bigl", "bigr", "Bigl", "Bigr", "hline", "notag"]);

class NotUnderstood extends Error {}

/** Commands, numbers, and single characters. */
const tokens = (source) => source.match(/\\[A-Za-z]+\*?|\\[\s\S]|\d+(?:[.,]\d+)*|\s+|[\s\S]/gu) ?? [];

class Parser {
  constructor(source) {
    this.tokens = tokens(source);
    this.at = 0;
    this.depth = 0;
  }

  peek() {
    while (/^\s+$/.test(this.tokens[this.at] ?? "")) this.at += 1;
    return this.tokens[this.at];
  }

  next() {
    const token = this.peek();
    if (token === undefined) throw new NotUnderstood("ends early");
    this.at += 1;
    return token;
  }

  expect(token) {
    if (this.next() !== token) throw new NotUnderstood(`no ${token}`);
  }

  row(isEnd) {
    if ((this.depth += 1) > MOST_DEPTH) throw new NotUnderstood("too deep");
    const row = node("mrow");
    while (this.peek() !== undefined && !isEnd(this.peek())) {
      const part = this.scripted();
      if (part) row.append(part);
    }
    this.depth -= 1;
    return row;
  }

  /** An argument: a group in braces, or one token. */
  argument() {
    const token = this.peek();
    // Without braces one digit is the argument.
    if (/^\d./.test(token ?? "")) {
      this.tokens[this.at] = token.slice(1);
      return word("mn", token[0]);
    }
    if (token !== "{") return this.atom() ?? node("mrow");
    this.next();
    const row = this.row((token) => token === "}");
    this.expect("}");
    return row;
  }

  /** The text of a group in braces, spaces included. */
  raw() {
    this.expect("{");
    let [text, open] = ["", 1];
    for (;;) {
      const token = this.tokens[this.at];
      if (token === undefined) throw new NotUnderstood("ends early");
      this.at += 1;
      if (token === "{") open += 1;
      if (token === "}" && (open -= 1) === 0) return text;
      text += token;
    }
  }

  scripted() {
    const base = this.atom();
    let [below, above] = [null, null];
    for (;;) {
      const token = this.peek();
      if (token === "_" && !below) {
        this.next();
        below = this.argument();
      } else if (token === "^" && !above) {
        this.next();
        above = this.argument();
      } else if (token === "'" && !above) {
        this.next();
        above = word("mo", "′");
      } else break;
    }
    if (!below && !above) return base;
    const from = base ?? node("mrow");
    const isLarge = base?.dataset?.large === "yes";
    if (below && above) return node(isLarge ? "munderover" : "msubsup", from, below, above);
    if (below) return node(isLarge ? "munder" : "msub", from, below);
    return node(isLarge ? "mover" : "msup", from, above);
  }

  atom() {
    const token = this.next();
    if (token === "{") {
      const row = this.row((next) => next === "}");
      this.expect("}");
      return row;
    }
    if (token === "}" || token === "&" || token === "_" || token === "^") throw new NotUnderstood(`stray ${token}`);
    if (token.startsWith("\\")) return this.command(token.slice(1));
    if (/^\d/.test(token)) return word("mn", token);
    if (/^\p{L}$/u.test(token)) return word("mi", token);
    if (token === "~") return this.space("0.3em");
    if (token === "-") return word("mo", "−");
    const made = word("mo", token);
    // Only \left and \right make fences as high as what is between them.
    if ("()[]|".includes(token)) made.setAttribute("stretchy", "false");
    return made;
  }

  space(width) {
    const made = node("mspace");
    made.setAttribute("width", width);
    return made;
  }

  fence(token) {
    if (token === ".") return null;
    const text = token.startsWith("\\") ? OPERATORS[token.slice(1)] : token;
    if (!text || [...text].length !== 1) throw new NotUnderstood(`fence ${token}`);
    const made = word("mo", text);
    made.setAttribute("stretchy", "true");
    made.setAttribute("fence", "true");
    return made;
  }

  command(name) {
    if (name in LETTERS) return word("mi", LETTERS[name]);
    if (name in SPACES) return this.space(SPACES[name]);
    if (name in OPERATORS) return word("mo", OPERATORS[name]);
    if (name in LARGE) {
      const made = word("mo", LARGE[name]);
      made.setAttribute("largeop", "true");
      if (!name.endsWith("int")) made.dataset.large = "yes";
      return made;
    }
    if (NAMES.has(name)) {
      const made = word("mi", name);
      made.setAttribute("mathvariant", "normal");
      if (["lim", "max", "min", "sup", "inf", "gcd"].includes(name)) made.dataset.large = "yes";
      return made;
    }
    if (IGNORED.has(name)) return null;
    if (name in FONTS) {
      const text = this.raw();
      if (name === "mathbb" && text in DOUBLE) return word("mi", DOUBLE[text]);
      if (!/^[\p{L}\d\s]*$/u.test(text)) throw new NotUnderstood(name);
      const made = word("mi", text);
      made.setAttribute("mathvariant", FONTS[name] === "normal" ? "normal" : "");
      if (FONTS[name] === "bold") made.style.fontWeight = "bold";
      return made;
    }
    if (name in ACCENTS) {
      const base = this.argument();
      if (name === "overline") {
        const made = node("mrow", base);
        made.style.borderTop = "1px solid currentColor";
        return made;
      }
      const mark = word("mo", ACCENTS[name]);
      mark.setAttribute("stretchy", String(name.startsWith("over") || name.startsWith("wide")));
      const made = node("mover", base, mark);
      made.setAttribute("accent", "true");
      return made;
    }
    switch (name) {
      case "frac": case "dfrac": case "tfrac": case "cfrac": {
        const [above, below] = [this.argument(), this.argument()];
        return node("mfrac", above, below);
      }
      case "binom": case "dbinom": {
        const made = node("mfrac", this.argument(), this.argument());
        made.setAttribute("linethickness", "0");
        return node("mrow", word("mo", "("), made, word("mo", ")"));
      }
      case "sqrt": {
        if (this.peek() !== "[") return node("msqrt", this.argument());
        this.next();
        const degree = this.row((token) => token === "]");
        this.expect("]");
        return node("mroot", this.argument(), degree);
      }
      case "boxed": case "fbox": {
        const made = node("mrow", this.argument());
        made.style.border = "1.5px solid currentColor";
        made.style.padding = "0.15em 0.3em";
        return made;
      }
      case "text": case "textbf": case "textit": case "mbox": case "textrm":
        return word("mtext", this.raw().replaceAll(" ", "\u00a0"));
      case "pmod":
        return node("mrow", this.space("0.6em"), word("mo", "("), word("mi", "mod"), this.space("0.3em"), this.argument(), word("mo", ")"));
      case "bmod": case "mod":
        return node("mrow", this.space("0.2em"), word("mi", "mod"), this.space("0.2em"));
      case "underline": {
        const made = node("munder", this.argument(), word("mo", "_"));
        return made;
      }
      case "left": {
        const open = this.fence(this.next());
        const inner = this.row((token) => token === "\\right");
        this.expect("\\right");
        return node("mrow", ...[open, inner, this.fence(this.next())].filter(Boolean));
      }
      case "begin":
        return this.environment(this.raw());
      default:
        throw new NotUnderstood(name);
    }
  }

  environment(kind) {
    if (!(kind in FENCES)) throw new NotUnderstood(kind);
    if (kind === "array") this.raw();
    const table = node("mtable");
    let cells = [];
    const close = () => {
      if (cells.length > 1 || cells[0]?.hasChildNodes()) table.append(node("mtr", ...cells.map((cell) => node("mtd", cell))));
      cells = [];
    };
    for (;;) {
      cells.push(this.row((token) => token === "&" || token === "\\\\" || token === "\\end"));
      const token = this.next();
      if (token === "\\\\") close();
      else if (token === "\\end") break;
    }
    close();
    if (this.raw() !== kind) throw new NotUnderstood("ends another environment");
    const fences = [...FENCES[kind]].map((fence) => this.fence(fence));
    return node("mrow", ...[fences[0], table, fences[1]].filter(Boolean));
  }
}

/** A formula as MathML; null if it is not understood. */
export function formula(source, isBlock) {
  if (source.length > MOST_CHARACTERS) return null;
  try {
    const parser = new Parser(source);
    const row = parser.row(() => false);
    const made = node("math", row);
    if (isBlock) made.setAttribute("display", "block");
    made.setAttribute("aria-label", source);
    return made;
  } catch (error) {
    if (error instanceof NotUnderstood) return null;
    throw error;
  }
}

/** Formulas in a text: $…$, $$…$$, \(…\), \[…\], and a box that stands alone. */
const PLACES = /\$\$([^$]+)\$\$|\$([^$\n]+)\$|\\\(([\s\S]+?)\\\)|\\\[([\s\S]+?)\\\]|(\\boxed\{(?:[^{}]|\{(?:[^{}]|\{[^{}]*\})*\})*\})/g;

/** Whether what stands between two dollar signs is mathematics, and not the text between two prices. */
const isProse = (inner) => /^\s|\s$/.test(inner) || /[A-Za-z]{3,} [A-Za-z]{2,}/.test(inner.replace(/\\text\{[^}]*\}/g, ""));

/** A text with its formulas drawn. */
export function maths(text) {
  const made = document.createDocumentFragment();
  let done = 0;
  for (const match of text.matchAll(PLACES)) {
    const [whole, block, inline, round, square, box] = match;
    if (inline !== undefined && isProse(inline)) continue;
    if (match.index < done) continue;
    made.append(document.createTextNode(text.slice(done, match.index)));
    const drawn = formula(block ?? inline ?? round ?? square ?? box, block !== undefined || square !== undefined);
    made.append(drawn ?? el("code", { class: "source" }, whole));
    done = match.index + whole.length;
  }
  made.append(document.createTextNode(text.slice(done)));
  return made;
}
