// Words: the prompts in the colours of their layers, what the routes say in a sentence, and the rules and weights.

const strong = (text) => make("strong", {}, text);
const sentence = (text) => text.charAt(0).toUpperCase() + text.slice(1) + (/[.\s]$/.test(text) ? "" : ".");
const LONG = 90; // words; more are not worth a colour each

function showPrompts() {
  $("prompts").replaceChildren(...traces.map((trace, at) => {
    const title = make(at ? "p" : "h1", { class: "prompt" }), branch = branchOf(at);
    title.classList.toggle("long", trace.recipe.prompt.length > 160);
    if (two) title.append(make("span", { class: "side" }, sides[at]), " ");
    if (branch?.prompt !== trace.recipe.prompt || rows().length > LONG) {
      title.append(trace.recipe.prompt);
      return title;
    }
    const words = [...rows().keys()].filter((row) => rows()[row].kind === "word" && reads(at, row));
    let end = 0;
    for (const row of words.sort((a, b) => branch.rows[a][0] - branch.rows[b][0])) {
      const text = rows()[row].texts[at], start = branch.prompt.indexOf(text, end);
      const word = make("span", { class: "inked", "data-row": row, "data-side": at }, text);
      word.addEventListener("click", () => pin(row));
      title.append(branch.prompt.slice(end, start), word);
      end = start + text.length;
    }
    title.append(branch.prompt.slice(end));
    return title;
  }));
}

function showStory() {
  const at = side(), branch = branchOf(at), { pin: pinned } = state;
  let parts = [];
  if (state.view === "both") parts = pinned === null ? [sentence(data.agreement)] : shared(pinned);
  else if (branch && pinned !== null && !reads(at, pinned)) parts = ["The word is not in this prompt."];
  else if (branch) parts = [...readings(branch, pinned), ...turn(branch, pinned)];
  $("story").replaceChildren(...parts);
}

/** How much two traces agree about a word. */
function shared(row) {
  const values = [...Array(total).keys()].map((step) => distances(row, step)).filter(Boolean).map(meanOf);
  if (!values.length) return [strong(`“${name(rows()[row])}”`), " is in one of the two prompts only."];
  const what = ` gives ${percent(1 - meanOf(values))} of its weight to the same layers in both.`;
  return [strong(`“${name(rows()[row])}”`), what];
}

/** The layers that are read most, over all steps and blocks. */
function readings(branch, pinned) {
  const use = branch.overall(pinned);
  const [most, ...next] = ranked(use), { layers, recipe } = branch.trace;
  const own = branch.prompt.trim() ? `“${branch.prompt.trim()}”` : "the empty prompt";
  const text = branch.prompt === recipe.prompt ? "the prompt" : own;
  const where = branch.name === "positive" ? "" : `in the ${branch.name} branch, `;
  const subject = pinned === null ? text : `“${name(rows()[pinned])}”`;
  const others = next.slice(0, 2).map((m) => `${layers[m]} (${percent(use[m])})`).join(" and ");
  const share = ` (${percent(use[most])} of the weight)`;
  const rest = others ? `, then ${others}. ` : ". ";
  return [sentence(`${where}${subject} reads `), strong(`${layers[most]} most`), share, rest];
}

/** The word that goes to other layers most as the steps go on, or what the pinned one does. */
function turn(branch, pinned) {
  const requested = (row) => (pinned === null ? rows()[row].kind === "word" : row === pinned);
  const words = [...rows().keys()].filter((row) => branch.rows[row] && requested(row));
  if (!words.length || branch.S < 2) return [];
  const moves = words.map((row) => ({ row, from: branch.level(row, 0), to: branch.level(row, branch.S - 1) }));
  const { row, from, to } = moves.reduce((a, b) => (Math.abs(b.to - b.from) > Math.abs(a.to - a.from) ? b : a));
  const quiet = Math.abs(to - from) < 0.04 * branch.M;
  if (quiet && pinned === null) return ["No word changes its depth by much over the steps."];
  if (quiet) return [`It stays near layer ${level(to)}.`];
  const way = strong(to > from ? "deeper" : "shallower");
  return [pinned === null ? strong(`“${name(rows()[row])}”`) : "It", " turns ", way, pinned === null ? " most" : "",
    ` over the steps: from layer ${level(from)} to ${level(to)} on average.`];
}

/** The words of the prompt that have weights. */
function weights(at) {
  const branch = branchOf(at);
  const words = [...rows().keys()].filter((row) => branch && reads(at, row) && branch.scale(row));
  if (!words.length) return [];
  const list = make("ul");
  list.append(...words.map((row) =>
    make("li", {}, make("code", {}, name(rows()[row])), ` routed context × ${branch.scale(row)}`)));
  return [make("h2", {}, two ? `Weights in the prompt, ${sides[at]}` : "Weights in the prompt"), list];
}

function showRules() {
  const blocks = traces.flatMap((trace, at) => {
    if (!trace.rules.length) return weights(at);
    const held = branches[at][state.branch], list = make("ul");
    for (const rule of trace.rules) {
      const done = held?.steered.find((one) => one.rule === rule);
      const what = done ? ` ${done.decisions} decisions` : " nothing in this branch";
      list.append(make("li", {}, make("code", {}, rule), what));
    }
    const changed = held?.changed == null ? [] : [make("p", { class: "note" },
      `${held.changed} of ${held.S * held.J * held.T} decisions are not the router’s own.`)];
    return [make("h2", {}, two ? `Steered, ${sides[at]}` : "Steered"), list, ...changed, ...weights(at)];
  });
  $("rules").hidden = !blocks.length;
  $("rules").replaceChildren(...blocks);
}
