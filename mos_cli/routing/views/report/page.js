// The page: what is looked at (`state`), how it is shown, and what keys and pointers do.

const data = JSON.parse(document.getElementById("data").textContent);
const traces = data.traces, total = traces[0].times.length, two = traces.length > 1;
const sides = two ? ["first", "second"] : [""];
const state = {
  step: total - 1, branch: Object.keys(data.rows)[0], view: two ? "both" : 0, pin: null, block: null, span: "step",
};
const $ = (id) => document.getElementById(id);
const calm = matchMedia("(prefers-reduced-motion: reduce)");
let branches = [], timer = null, charts = [], due = null, accent = [0, 0, 0];

/** Steps of the first trace by time: where the other one was nearest to it. */
const nearest = traces.map((trace) =>
  traces[0].times.map((time) => trace.times.reduce((best, other, step) =>
    Math.abs(other - time) < Math.abs(trace.times[best] - time) ? step : best, 0)));

const rows = () => data.rows[state.branch];
const name = (row) => row.text + (row.nth > 1 ? ` (${row.nth})` : "");
const branchOf = (side) => branches[side]?.[state.branch];
const columnOf = (side, step) => branchOf(side)?.column(nearest[side][step]) ?? -1;
const shown = () => (state.view === "both" ? [0, 1] : [state.view]).filter((side) => branchOf(side));
const reads = (side, row) => branchOf(side)?.rows[row] != null;
const common = (row) => reads(0, row) && reads(1, row);
const side = () => (state.view === "both" ? 0 : state.view);

/** How far two traces are apart at a row and a step, block by block; null where they do not meet. */
function distances(row, step) {
  const columns = [columnOf(0, step), columnOf(1, step)];
  if (!common(row) || columns.includes(-1)) return null;
  const [a, b] = columns.map((column, at) => branchOf(at).byBlock(row, column));
  return a.map((use, j) => apart(use, b[j]));
}

const meanOf = (values) => (values ? values.reduce((sum, value) => sum + value, 0) / values.length : NaN);

function setUp() {
  $("pictures").append(...traces.map(figureOf));
  $("pictures").classList.toggle("two", two);
  $("step").max = total - 1;
  document.title = `Routes: ${traces[0].recipe.prompt}`;
  $("made").textContent = facts();
  $("unread").textContent = unread();
  $("unread").hidden = !$("unread").textContent;
  segments($("branches"), Object.keys(data.rows), "branch");
  $("branches").hidden = Object.keys(data.rows).length < 2;
  if (two) segments($("views"), ["both", 0, 1], "view", ["differences", ...sides]);
  $("views").hidden = !two;
  for (const button of $("spans").children) button.addEventListener("click", () => set({ span: button.dataset.span }));
}

/** What was drawn and how, in a line; of a second picture only what is other. */
function facts() {
  const [first, second] = traces.map(({ recipe: r, edit, layers, blocks, adapter }) => [
    `${edit ? "edited" : "drawn"} by ${r.model}`, `seed ${r.seed}`, `${r.steps} step${r.steps === 1 ? "" : "s"}`, `cfg ${r.cfg}`,
    `${r.width} × ${r.height}`, r.precision, `${layers.length} layers into ${blocks} blocks`,
    ...(adapter ? [adapter] : []),
  ]);
  const other = second?.filter((fact) => !first.includes(fact)) ?? [];
  return first.join(" · ") + (other.length ? ` — second: ${other.join(" · ")}` : "");
}

/** What feature caching left unread, by the picture; nothing where all steps were computed. */
function unread() {
  const note = "the blocks were computed at some of the steps only; choices of the others were made, not read";
  return traces.flatMap(({ feature_cache: every }, at) =>
    (every > 1 ? [sentence(`${two ? `${sides[at]} picture, ` : ""}feature cache ${every}: ${note}`)] : [])).join(" ");
}

function segments(box, values, key, labels = values) {
  values.forEach((value, at) => {
    const button = make("button", { type: "button", "data-value": value }, labels[at]);
    button.addEventListener("click", () => set({ [key]: value }));
    box.append(button);
  });
}

const press = (box, key, value) => [...box.children].forEach((button) =>
  button.setAttribute("aria-pressed", String(button.dataset[key] === String(value))));

/** Changes what is looked at. A new branch or view needs new rows; anything but a step needs new charts. */
function set(change) {
  const held = state.pin === null ? null : rows()[state.pin];
  Object.assign(state, change);
  if ("branch" in change) {
    const same = (row) => row.text === held.text && row.nth === held.nth && row.kind === held.kind;
    const at = held ? rows().findIndex(same) : -1;
    state.pin = at >= 0 ? at : null;
  }
  if ("branch" in change || "view" in change || "theme" in change) buildRows();
  if (!due) requestAnimationFrame(render);
  if (due !== "all") due = Object.keys(change).every((key) => key === "step" || key === "block") ? "step" : "all";
}

function render() {
  const all = due === "all";
  due = null;
  if (all) {
    press($("branches"), "value", state.branch);
    press($("views"), "value", state.view);
    press($("spans"), "span", state.span);
    showAxes();
    showPrompts();
    showStory();
    showRules();
    showTime();
  }
  showStep();
  showCells();
  showInspector();
  if (all || state.span === "step") showFlow();
}

function showStep() {
  const { step } = state, time = traces[0].times[step], root = document.documentElement;
  $("step").value = step;
  $("step").setAttribute("aria-valuetext", `step ${step} of ${total - 1}, t ${time.toFixed(2)}`);
  $("now").textContent = `step ${step} of ${total - 1} · t ${time.toFixed(2)}`;
  root.style.setProperty("--at", (step + 0.5) / total);
  charts.forEach((chart) => chart.place(step));
  showPictures();
}

function showTime() {
  const box = document.querySelector("#time .charts"), of = document.querySelector("#time .of");
  charts = perSide(box, of, (pane, at) => {
    const column = (step) => columnOf(at, step);
    const chart = timeChart(pane, branchOf(at), state.pin, total, column, "Share of each layer over the steps");
    pane.addEventListener("pointermove", (event) => {
      const { step, layer, share } = chart.at(event);
      if (event.buttons) set({ step });
      tip(event, `step ${step}` + (layer === undefined ? "" : `: ${traces[at].layers[layer]} ${percent(share)}`));
    });
    pane.addEventListener("pointerdown", (event) => set({ step: chart.at(event).step }));
    pane.addEventListener("pointerleave", hideTip);
    return chart;
  });
}

function showFlow() {
  const box = document.querySelector("#flow .charts"), of = document.querySelector("#flow .of");
  perSide(box, of, (pane, at) => {
    const column = state.span === "all" ? null : columnOf(at, state.step);
    if (column === -1) return pane.append(make("p", { class: "note" }, "This branch was not computed at this step."));
    flowChart(pane, branchOf(at), branchOf(at).byBlock(state.pin, column), "Share of each layer in each block");
    pane.addEventListener("pointermove", ({ target, clientX, clientY }) => {
      const { layer, block, share } = target.dataset ?? {};
      if (layer === undefined) hideTip();
      else tip({ clientX, clientY }, `block ${block} takes ${percent(+share)} from ${traces[at].layers[layer]}`);
    });
    pane.addEventListener("pointerleave", hideTip);
  });
}

/** A pane for each trace that is shown, drawn by `draw` if the pinned word is in it. */
function perSide(box, of, draw) {
  of.textContent = state.pin === null ? "all words" : `“${name(rows()[state.pin])}”`;
  of.classList.toggle("pinned", state.pin !== null);
  box.replaceChildren();
  return shown().flatMap((at) => {
    const pane = make("div", { class: "pane" });
    box.append(pane);
    if (two) box.insertBefore(make("h3", {}, sides[at]), pane);
    if (state.pin === null || reads(at, state.pin)) return draw(pane, at) ?? [];
    pane.append(make("p", { class: "note" }, "The word is not in this prompt."));
    return [];
  });
}
