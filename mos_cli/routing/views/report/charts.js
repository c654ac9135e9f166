// Drawing: colours, the grid's cells, layers over the steps, the flow. Colour stands for a layer everywhere.

const VIRIDIS = [
  [68, 1, 84], [71, 44, 122], [59, 81, 139], [44, 113, 142], [33, 144, 141], [39, 173, 129], [92, 200, 99],
  [170, 220, 50], [253, 231, 37],
];

/** Red, green, blue of a fraction from 0 to 1. */
function viridis(fraction) {
  const place = Math.min(Math.max(fraction, 0), 1) * (VIRIDIS.length - 1);
  const below = Math.min(Math.floor(place), VIRIDIS.length - 2);
  return VIRIDIS[below].map((low, i) => Math.round(low + (place - below) * (VIRIDIS[below + 1][i] - low)));
}
const layerColour = (layer, M) => `rgb(${viridis(layer / (M - 1)).join()})`;

/** An HTML element; text is set as text, never as markup. */
function make(tag, attributes = {}, ...children) {
  const element = document.createElement(tag);
  for (const [name, value] of Object.entries(attributes)) element.setAttribute(name, value);
  element.append(...children);
  return element;
}

function drawn(tag, attributes, parent, text = "") {
  const element = document.createElementNS("http://www.w3.org/2000/svg", tag);
  for (const [name, value] of Object.entries(attributes)) element.setAttribute(name, value);
  if (text) element.textContent = text;
  parent.append(element);
  return element;
}

/** Paints a small canvas, a pixel a value: colours(x, y) gives [r, g, b, alpha 0 to 255], or null for nothing. */
function paint(canvas, width, height, colours) {
  if (canvas.width !== width || canvas.height !== height) Object.assign(canvas, { width, height });
  const context = canvas.getContext("2d"), image = context.createImageData(width, height);
  for (let y = 0, at = 0; y < height; y++) {
    for (let x = 0; x < width; x++, at += 4) image.data.set(colours(x, y) ?? [0, 0, 0, 0], at);
  }
  context.putImageData(image, 0, 0);
}

/** What a cell of the grid looks like, for one trace: the layer read on average. */
function layerCell(value, M) {
  return Number.isNaN(value) ? null : [...viridis(value / (M - 1)), 255];
}

/** Numbers along an axis of `count` bins, as many as fit. */
function ticks(parent, count, most) {
  const every = [1, 2, 5, 10, 20, 50, 100, 200].find((step) => count / step <= most) ?? count;
  parent.replaceChildren();
  for (let at = 0; at < count; at += every) {
    const tick = make("span", {}, String(at));
    tick.style.left = `${(100 * (at + 0.5)) / count}%`;
    parent.append(tick);
  }
}

/** Stacked shares of the layers over the steps of the run, layer 0 on top. `column` maps a step to the branch's own. */
function timeChart(box, branch, row, total, column, label) {
  const width = box.clientWidth, height = box.clientHeight, foot = 18, right = 76, W = width - right, H = height - foot;
  const svg = drawn("svg", { viewBox: `0 0 ${width} ${height}`, role: "img", "aria-label": label }, box);
  const steps = [...Array(total).keys()].filter((step) => column(step) >= 0);
  const use = steps.map((step) => branch.atStep(row, column(step)));
  const x = (step) => ((step + 0.5) / total) * W;
  const first = (steps[0] / total) * W, last = ((steps.at(-1) + 1) / total) * W;
  let above = use.map(() => 0);
  for (let m = 0; m < branch.M; m++) {
    const below = above.map((share, i) => share + use[i][m]);
    if (use.some((shares) => shares[m] > 0)) {
      const edge = (shares) => [[first, shares[0]], ...steps.map((s, i) => [x(s), shares[i]]), [last, shares.at(-1)]];
      const points = [...edge(above), ...edge(below).reverse()];
      const path = points.map(([px, share]) => `${px.toFixed(1)},${(share * H).toFixed(1)}`).join("L");
      drawn("path", { d: `M${path}Z`, fill: layerColour(m, branch.M), class: "area" }, svg);
    }
    const end = use.at(-1)[m];
    if (end * H >= 13) {
      const y = ((above.at(-1) + below.at(-1)) / 2) * H;
      drawn("text", { x: W + 8, y: y + 4, class: "label" }, svg, branch.trace.layers[m]);
    }
    above = below;
  }
  const every = [1, 2, 5, 10, 20, 50, 100, 200].find((step) => total / step <= W / 34) ?? total;
  for (let step = 0; step < total; step += every) {
    drawn("text", { x: x(step), y: height - 3, class: "tick", "text-anchor": "middle" }, svg, String(step));
  }
  drawn("line", { y1: 0, y2: H + 4, class: "marker" }, svg);
  return {
    place(step) {
      const marker = svg.querySelector(".marker");
      marker.setAttribute("x1", x(step));
      marker.setAttribute("x2", x(step));
    },
    /** The step under the pointer, and the layer and its share there. */
    at(event) {
      const bounds = svg.getBoundingClientRect();
      const step = Math.min(Math.max(Math.floor(((event.clientX - bounds.left) / W) * total), 0), total - 1);
      const index = steps.indexOf(step);
      if (index < 0) return { step };
      let sum = 0;
      const place = (event.clientY - bounds.top) / H;
      const layer = use[index].findIndex((share) => (sum += share) >= place);
      return layer < 0 ? { step } : { step, layer, share: use[index][layer] };
    },
  };
}

/** Bands from layers (left) to blocks (right): a band's width is the share of the block's weight. */
function flowChart(box, branch, blocks, label) {
  const width = box.clientWidth, height = box.clientHeight, left = 118, right = 62, bar = 7;
  const { M, J } = branch, totals = Array.from({ length: M }, (_, m) => blocks.reduce((sum, use) => sum + use[m], 0));
  const used = totals.map((_, m) => m).filter((m) => totals[m] > 0.002);
  const gap = (count) => (count > 20 ? 2 : 6);
  const spaces = [gap(used.length) * (used.length - 1), gap(J) * (J - 1)];
  const scale = (height - Math.max(...spaces)) / J;
  const svg = drawn("svg", { viewBox: `0 0 ${width} ${height}`, role: "img", "aria-label": label }, box);
  const bands = drawn("g", { class: "bands" }, svg), starts = [];
  let y = (height - spaces[1] - J * scale) / 2;
  const every = Math.ceil(13 / (scale + gap(J)));
  for (let j = 0; j < J; j++) {
    starts.push(y);
    drawn("rect", { x: width - right - bar, y, width: bar, height: scale, class: "block" }, svg);
    if (j % every === 0) {
      drawn("text", { x: width - right + 7, y: y + scale / 2 + 4, class: "label" }, svg, `block ${j}`);
    }
    y += scale + gap(J);
  }
  y = (height - spaces[0] - totals.reduce((sum, part) => sum + part, 0) * scale) / 2;
  let lowest = -Infinity;
  const x0 = left + bar, x1 = width - right - bar, middle = (x0 + x1) / 2;
  for (const m of used) {
    const tall = totals[m] * scale, text = Math.max(y + tall / 2 + 4, lowest + 12);
    const fill = layerColour(m, M);
    drawn("rect", { x: left, y, width: bar, height: Math.max(tall, 1), fill }, svg);
    if (text < height + 4 && (tall > 9 || used.length < 16)) {
      drawn("text", { x: left - 44, y: text, class: "label", "text-anchor": "end" }, svg, branch.trace.layers[m]);
      drawn("text", { x: left - 8, y: text, class: "tick", "text-anchor": "end" }, svg, percent(totals[m] / J));
      lowest = text;
    }
    for (let j = 0; j < J; j++) {
      const thick = blocks[j][m] * scale;
      if (blocks[j][m] > 0.002) {
        const a = y, b = starts[j];
        const d = `M${x0},${a}C${middle},${a} ${middle},${b} ${x1},${b}V${b + thick}C${middle},${b + thick} ` +
          `${middle},${a + thick} ${x0},${a + thick}Z`;
        drawn("path", { d, fill, class: "band", "data-layer": m, "data-block": j, "data-share": blocks[j][m] }, bands);
      }
      y += thick;
      starts[j] += thick;
    }
    y += gap(used.length);
  }
}
