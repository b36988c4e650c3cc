// Line and stacked charts as SVG. Lines differ by colour and dash; a chart is a slider for keyboards and screen readers,
// which reads the values of one step at a time.

import { el, svg, replace, say, number } from "./dom.js";

const HEIGHT = 150;
const LEFT = 44;
const RIGHT = 8;
const TOP = 6;
const BOTTOM = 18;
const DASHES = ["", "6 3", "2 3", "9 3 2 3", "14 4", "6 2 1 2 1 2"];

export function swatch(colour, dash, isArea) {
  const mark = isArea
    ? svg("rect", { x: 2, y: 0, width: 22, height: 10, class: "area" })
    : svg("path", { d: "M0 5H26", class: "line", "stroke-dasharray": DASHES[dash % DASHES.length] || null });
  return svg("svg", { viewBox: "0 0 26 10", "aria-hidden": "true", class: `s${colour % 7}` }, mark);
}

/** Round numbers within the range: about `count`, and at least three. */
function ticks(low, high, count) {
  const found = rounded(low, high, count);
  return found.length < 3 ? rounded(low, high, 2 * count) : found;
}

function rounded(low, high, count) {
  const rough = (high - low) / count;
  if (!(rough > 0) || !Number.isFinite(rough)) return [];
  const magnitude = 10 ** Math.floor(Math.log10(rough));
  const step = [1, 2, 5, 10].map((of) => of * magnitude).find((of) => of >= rough * 0.999) ?? 10 * magnitude;
  const found = [];
  for (let index = Math.ceil(low / step - 1e-9); index * step <= high + step * 1e-9; index += 1) found.push(index * step);
  return found;
}

function range(values, fixed, log) {
  let [low, high] = [Infinity, -Infinity];
  for (const value of values) {
    if (!Number.isFinite(value) || (log && value <= 0)) continue;
    if (value < low) low = value;
    if (value > high) high = value;
  }
  if (fixed) return fixed;
  if (low > high) return [0, 1];
  if (log) return [10 ** Math.floor(Math.log10(low)), 10 ** Math.ceil(Math.log10(high) + 1e-9)];
  if (low === high && low === 0) return [0, 1];
  if (low === high) return [low - Math.max(0.5, Math.abs(low) / 10), high + Math.max(0.5, Math.abs(high) / 10)];
  const room = (high - low) * 0.06;
  return [low >= 0 && low - room < 0 ? 0 : low - room, high + room];
}

/** Index of the point nearest to `x`; steps ascend. */
function nearest(steps, x) {
  let [low, high] = [0, steps.length - 1];
  while (low < high) {
    const middle = (low + high) >> 1;
    if (steps[middle] < x) low = middle + 1;
    else high = middle;
  }
  return low > 0 && x - steps[low - 1] < steps[low] - x ? low - 1 : low;
}

/**
 * A chart: `node` to show, `update(series)` to draw.
 *
 * `spec`: title, unit, about, fixed (range of the vertical axis), log, mark (a horizontal line), stacked, across (what the
 * horizontal axis counts). A series: name, colour, dash, steps, means, and lows and highs where a point covers several steps.
 */
export function chart(spec) {
  const legend = el("ul", { class: "legend" });
  const picture = svg("svg", {
    role: "slider",
    tabindex: 0,
    "aria-label": `${spec.title}${spec.unit ? `, ${spec.unit}` : ""}: values by ${spec.across ?? "step"}`,
    "aria-valuemin": 0,
    "aria-valuemax": 0,
    "aria-valuenow": 0,
    "aria-valuetext": "no data yet",
  });
  const caption = el("figcaption", {}, el("h3", {}, spec.title), el("span", { class: "soft" }, spec.unit ?? ""));
  const node = el("figure", {}, caption, legend, picture, (spec.about || spec.stacked) && el("p", { class: "about" }, spec.about ?? "From bottom to top in the order of the names."));

  let series = [];
  let axis = [];
  let place = null;
  let width = 320;
  let values = [];
  let frame = null;

  const bounds = () => {
    const steps = series.flatMap((one) => (one.steps.length ? [one.steps[0], one.steps.at(-1)] : []));
    const low = Math.min(...steps);
    const high = Math.max(...steps);
    return steps.length ? [low, high > low ? high : low + 1] : [0, 1];
  };
  const x = (step) => LEFT + ((step - frame.left) / (frame.right - frame.left)) * (width - LEFT - RIGHT);
  const y = (value) => {
    const [low, high] = [frame.bottom, frame.top];
    const part = spec.log
      ? (Math.log10(Math.max(value, low)) - Math.log10(low)) / (Math.log10(high) - Math.log10(low))
      : (value - low) / (high - low);
    return HEIGHT - BOTTOM - Math.min(1, Math.max(0, part)) * (HEIGHT - TOP - BOTTOM);
  };

  function at(one) {
    if (!one.steps.length) return null;
    return place === null ? one.steps.length - 1 : nearest(one.steps, place);
  }

  function words() {
    const shown = series.filter((one) => one.steps.length);
    for (const [index, one] of shown.entries()) {
      if (values[index]) say(values[index], number(one.means[at(one)]));
    }
    const step = place ?? axis.at(-1) ?? 0;
    picture.setAttribute("aria-valuenow", String(step));
    const said = shown.map((one) => `${one.name} ${number(one.means[at(one)])}`).join(", ");
    picture.setAttribute("aria-valuetext", shown.length ? `${spec.across ?? "step"} ${number(step)}: ${said}` : "no data yet");
    const cross = picture.querySelector(".cross");
    const label = picture.querySelector(".cross-label");
    if (!cross || !frame) return;
    const isShown = place !== null;
    cross.toggleAttribute("hidden", !isShown);
    label.textContent = isShown ? number(place) : "";
    if (!isShown) return;
    const position = x(place);
    cross.setAttribute("d", `M${position.toFixed(1)} ${TOP}V${HEIGHT - BOTTOM}`);
    label.setAttribute("x", position.toFixed(1));
    label.setAttribute("text-anchor", position > width - 60 ? "end" : position < LEFT + 30 ? "start" : "middle");
  }

  function path(steps, heights) {
    let text = "";
    let isDrawing = false;
    for (let index = 0; index < steps.length; index += 1) {
      const value = heights[index];
      const isFine = value !== null && Number.isFinite(value) && !(spec.log && value <= 0);
      if (isFine) text += `${isDrawing ? "L" : "M"}${x(steps[index]).toFixed(1)} ${y(value).toFixed(1)}`;
      isDrawing = isFine;
    }
    return text;
  }

  function band(steps, lows, highs) {
    const points = steps.map((step, index) => [step, lows[index], highs[index]]).filter((point) => point[1] !== null && point[2] !== null);
    if (points.length < 2) return "";
    const upper = points.map(([step, , high]) => `${x(step).toFixed(1)} ${y(high).toFixed(1)}`);
    const lower = points.reverse().map(([step, low]) => `${x(step).toFixed(1)} ${y(low).toFixed(1)}`);
    return `M${[...upper, ...lower].join("L")}Z`;
  }

  function draw() {
    const [left, right] = bounds();
    let shapes = [];
    if (spec.stacked) {
      const steps = series.find((one) => one.steps.length)?.steps ?? [];
      let below = steps.map(() => 0);
      const layers = series.map((one) => {
        const known = new Map(one.steps.map((step, index) => [step, one.means[index] ?? 0]));
        const above = steps.map((step, index) => below[index] + Math.max(0, known.get(step) ?? 0));
        const layer = { one, below, above };
        below = above;
        return layer;
      });
      const [bottom, top] = range([0, ...below], spec.fixed);
      frame = { left, right, bottom: Math.min(0, bottom), top };
      shapes = layers.map((layer) =>
        svg("path", { class: `area s${layer.one.colour % 7}`, d: band(steps, layer.below, layer.above) }));
    } else {
      const heights = series.flatMap((one) => [...one.means, ...(one.lows ?? []), ...(one.highs ?? [])]);
      if (spec.mark !== undefined) heights.push(spec.mark);
      const [bottom, top] = range(heights, spec.fixed, spec.log);
      frame = { left, right, bottom, top };
      for (const one of series) {
        const group = svg("g", { class: `s${one.colour % 7}` });
        if (one.lows) group.append(svg("path", { class: "band", d: band(one.steps, one.lows, one.highs) }));
        const dash = DASHES[one.dash % DASHES.length] || null;
        group.append(svg("path", { class: "line", d: path(one.steps, one.means), "stroke-dasharray": dash }));
        if (one.steps.length <= 24) {
          one.steps.forEach((step, index) => {
            const value = one.means[index];
            if (value === null || (spec.log && value <= 0)) return;
            group.append(svg("circle", { class: "dot", cx: x(step).toFixed(1), cy: y(value).toFixed(1), r: 2.4 }));
          });
        }
        shapes.push(group);
      }
    }
    const grid = [];
    const heights = spec.log
      ? ticks(Math.log10(frame.bottom), Math.log10(frame.top), 3).filter(Number.isInteger).map((power) => 10 ** power)
      : ticks(frame.bottom, frame.top, 4);
    for (const value of heights) {
      const height = y(value).toFixed(1);
      grid.push(svg("path", { class: "grid", d: `M${LEFT} ${height}H${width - RIGHT}` }));
      grid.push(svg("text", { x: LEFT - 5, y: Number(height) + 4, "text-anchor": "end" }, spec.log ? value.toExponential(0) : number(value)));
    }
    for (const value of ticks(frame.left, frame.right, Math.max(2, Math.floor(width / 110)))) {
      if (!spec.real && !Number.isInteger(value)) continue;
      const label = spec.tick ? spec.tick(value) : number(value);
      const position = x(value);
      const anchor = position > width - 24 ? "end" : position < LEFT + 12 ? "start" : "middle";
      grid.push(svg("text", { x: position.toFixed(1), y: HEIGHT - 5, "text-anchor": anchor }, label));
    }
    if (spec.mark !== undefined) grid.push(svg("path", { class: "mark", d: `M${LEFT} ${y(spec.mark).toFixed(1)}H${width - RIGHT}` }));
    picture.setAttribute("viewBox", `0 0 ${width} ${HEIGHT}`);
    replace(picture, grid, shapes, svg("path", { class: "cross", d: "M0 0", hidden: true }), svg("text", { class: "cross-label", y: TOP + 6 }));
    words();
  }

  function move(to) {
    place = to;
    words();
  }

  picture.addEventListener("pointermove", (event) => {
    if (!axis.length || !frame) return;
    const box = picture.getBoundingClientRect();
    const part = (event.clientX - box.left - LEFT) / (box.width - LEFT - RIGHT);
    move(axis[nearest(axis, frame.left + part * (frame.right - frame.left))]);
  });
  picture.addEventListener("pointerleave", () => move(null));
  picture.addEventListener("blur", () => move(null));
  picture.addEventListener("keydown", (event) => {
    if (!axis.length) return;
    const now = place === null ? axis.length - 1 : nearest(axis, place);
    const ways = { ArrowLeft: -1, ArrowDown: -1, ArrowRight: 1, ArrowUp: 1, PageDown: -10, PageUp: 10, Home: -axis.length, End: axis.length };
    const way = ways[event.key];
    if (way === undefined) return;
    event.preventDefault();
    move(axis[Math.min(axis.length - 1, Math.max(0, now + way))]);
  });

  // The figure and not the picture, whose size some browsers report in units of its own view box.
  new ResizeObserver((entries) => {
    // A view that is left has no size.
    const wide = Math.round(entries[0].contentRect.width);
    if (wide < 100 || wide === width) return;
    width = wide;
    // Outside of the observer's turn, because drawing may change the height of what it observes.
    if (series.length) requestAnimationFrame(draw);
  }).observe(node);

  let names = null;
  return {
    node,
    update(next) {
      series = next;
      axis = [...new Set(next.flatMap((one) => one.steps))].sort((a, b) => a - b);
      picture.setAttribute("aria-valuemin", String(axis[0] ?? 0));
      picture.setAttribute("aria-valuemax", String(axis.at(-1) ?? 0));
      const shown = next.filter((one) => one.steps.length);
      const now = shown.map((one) => `${one.name} ${one.colour} ${one.dash}`).join("|");
      if (now !== names) {
        names = now;
        values = shown.map(() => el("b", {}));
        replace(legend, shown.map((one, index) => el("li", {}, swatch(one.colour, one.dash, spec.stacked), one.name, " ", values[index])));
      }
      draw();
    },
  };
}
