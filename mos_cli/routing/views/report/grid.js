// The grid: a row a word, its cells the blocks at this step, and beside them the means of all steps.

const NONE = [128, 128, 128, 40];

/** The rows that can be seen, or soon: of five hundred words only these are painted. */
const inSight = new Set();
const watcher = new IntersectionObserver((entries) => {
  for (const { target, isIntersecting } of entries) {
    if (!isIntersecting) inSight.delete(target);
    else if (target.isConnected) {
      inSight.add(target);
      paintStrip(target, +target.dataset.row);
      paintCells(target);
    }
  }
}, { rootMargin: "200px" });

/** The rows' elements anew: a branch or a view has its own words. */
function buildRows() {
  const thin = 8, tall = rows().length > 60 ? 18 : 25;
  $("rows").replaceChildren(...rows().map((row, index) => {
    const height = Math.max(tall, thin * depth(index));
    const label = make("button", { type: "button", class: "name", tabindex: -1 }, row.text);
    if (row.nth > 1) label.append(make("sub", {}, row.nth));
    const cells = make("div", { class: "cells" }, make("canvas", { "aria-hidden": "true" }));
    const strip = make("div", { class: "strip" }, make("canvas", { "aria-hidden": "true" }));
    const mean = make("span", { class: "mean" });
    const element = make("div", { class: `row ${row.kind}`, "data-row": index }, label, cells, mean, strip);
    element.style.setProperty("--height", `${height}px`);
    return element;
  }));
  $("grid").style.setProperty("--blocks", traces[0].blocks);
  inSight.clear();
  watcher.disconnect();
  for (const element of $("rows").children) watcher.observe(element);
  showLegend();
}

function showAxes() {
  for (const [id, count, space] of [["blocks-axis", traces[0].blocks, 22], ["steps-axis", total, 36]]) {
    ticks($(id), count, Math.max($(id).clientWidth / space, 2));
  }
}

/** How many lines a row has: one a token, but in a comparison, where words may have different tokens. */
const depth = (row) => (state.view === "both" || !reads(side(), row) ? 1 : branchOf(side()).rows[row].length);

const differing = (value) => (Number.isNaN(value) ? NONE : [...accent, 255 * value]);

function paintStrip(element, row) {
  const canvas = element.querySelector(".strip canvas");
  if (state.view === "both") {
    paint(canvas, total, 1, (x) => differing(meanOf(distances(row, x))));
    return;
  }
  if (!reads(side(), row)) return;
  const branch = branchOf(side()), means = branch.levels(), tokens = branch.rows[row];
  paint(canvas, total, tokens.length, (x, y) => {
    const column = columnOf(side(), x);
    return column < 0 ? NONE : layerCell(means[tokens[y] * branch.S + column], branch.M);
  });
}

/** What is pinned, and the cells of the rows in sight. */
function showCells() {
  for (const element of $("rows").children) {
    const row = +element.dataset.row, pinned = state.pin === row;
    element.firstChild.setAttribute("aria-pressed", String(pinned));
    element.firstChild.tabIndex = row === (state.pin ?? 0) ? 0 : -1;
    element.classList.toggle("pinned", pinned);
  }
  inSight.forEach(paintCells);
  const grid = $("grid");
  grid.classList.toggle("pinning", state.pin !== null);
  grid.classList.toggle("walking", state.pin !== null && state.block !== null);
  grid.style.setProperty("--block", state.block ?? 0);
  for (const word of document.querySelectorAll(".inked")) {
    const row = +word.dataset.row, at = +word.dataset.side, own = columnOf(at, state.step), { M } = branchOf(at);
    word.style.setProperty("--ink", own < 0 ? "transparent" : layerColour(branchOf(at).level(row, own), M));
    word.classList.toggle("pinned", row === state.pin);
  }
}

/** A row's cells at this step, and their mean beside them. */
function paintCells(element) {
  const row = +element.dataset.row, canvas = element.querySelector(".cells canvas"), compared = state.view === "both";
  const there = compared ? common(row) : reads(side(), row), column = columnOf(side(), state.step);
  const elsewhere = compared ? `only in ${sides[reads(0, row) ? 0 : 1]}` : "not in this prompt";
  canvas.parentElement.dataset.why = there ? "" : elsewhere;
  element.classList.toggle("away", !there);
  let mean = NaN;
  if (compared) {
    const values = distances(row, state.step);
    mean = meanOf(values);
    paint(canvas, traces[0].blocks, 1, (x) => (values ? differing(values[x]) : NONE));
  } else if (there && column >= 0) {
    const branch = branchOf(side()), tokens = branch.rows[row];
    mean = branch.level(row, column);
    paint(canvas, branch.J, tokens.length, (x, y) => layerCell(branch.mean(column, x, tokens[y]), branch.M));
  } else paint(canvas, traces[0].blocks, 1, () => NONE);
  const said = compared ? percent(mean) : level(mean);
  element.querySelector(".mean").textContent = Number.isNaN(mean) ? "–" : said;
}

function showLegend() {
  const { layers } = traces[0], M = layers.length, compared = state.view === "both";
  const bar = make("span", { class: compared ? "ramp difference" : "ramp" });
  if (!compared) {
    const colours = Array.from({ length: M }, (_, m) => layerColour(m, M));
    bar.style.background = M > 16 ? `linear-gradient(90deg, ${colours})` :
      `linear-gradient(90deg, ${colours.map((colour, m) => `${colour} ${(100 * m) / M}% ${(100 * (m + 1)) / M}%`)})`;
  }
  const ends = compared ? ["same layers", "other layers"] : [layers[0], layers[M - 1]];
  $("legend").replaceChildren(ends[0], bar, ends[1]);
}

/** The layers of one decision (a token of a word, its `line`, in a block), or of a word over several, in text. */
function describe(row, step, block, line = 0) {
  const weight = state.view === "both" || !reads(side(), row) ? "" : branchOf(side()).scale(row);
  const where = `${name(rows()[row])}${weight ? ` × ${weight}` : ""} · step ${step}` +
    (block === null ? "" : ` · block ${block}`);
  const parts = shown().map((at) => {
    const branch = branchOf(at), column = columnOf(at, step), mark = shown().length > 1 ? `${sides[at]}: ` : "";
    if (!reads(at, row)) return `${mark}not in this prompt`;
    if (column < 0) return `${mark}not computed`;
    const tokens = branch.rows[row];
    if (block !== null && tokens.length === 1) return mark + list(branch, branch.kept(column, block, tokens[0]));
    if (block !== null && state.view !== "both") {
      return `${branch.tokens[tokens[line]]}: ${list(branch, branch.kept(column, block, tokens[line]))}`;
    }
    const use = block === null ? branch.atStep(row, column) : branch.byBlock(row, column)[block];
    return mark + list(branch, ranked(use).slice(0, 4).map((m) => [m, use[m]]));
  });
  return { where, parts };
}
const list = (branch, kept) => kept.map(([m, weight]) => `${branch.trace.layers[m]} ${percent(weight)}`).join(", ");

function showInspector(spot = null) {
  const row = spot?.row ?? state.pin;
  if (row === null || row === undefined) {
    $("inspector").replaceChildren("Point at a cell to see the layers it reads; click a word to follow it everywhere.");
    return;
  }
  const { where, parts } = describe(row, spot?.step ?? state.step, spot ? spot.block : state.block, spot?.line);
  const release = () => make("button", { type: "button", class: "quiet", id: "unpin" }, "let go (Esc)");
  const extra = spot || state.pin === null ? [] : [release()];
  $("inspector").replaceChildren(strong(where), "\u2002", parts.join(" — "), ...extra);
  $("unpin")?.addEventListener("click", () => pin(null));
}

/** What of the grid lies under the pointer: the row, and a block of this step, or a step. */
function spotOf(event) {
  const element = event.target.closest(".row"), box = event.target.closest(".cells, .strip");
  if (!element) return null;
  const row = +element.dataset.row;
  if (!box) return { row, block: null, step: state.step };
  const bounds = box.getBoundingClientRect(), part = (event.clientX - bounds.left) / bounds.width;
  const of = (count, fraction) => Math.min(Math.max(Math.floor(fraction * count), 0), count - 1);
  if (box.className === "strip") return { row, block: null, step: of(total, part) };
  const line = of(depth(row), (event.clientY - bounds.top) / bounds.height);
  return { row, block: of(traces[0].blocks, part), step: state.step, line };
}
