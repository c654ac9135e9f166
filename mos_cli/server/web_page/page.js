"use strict";
const $ = (id) => document.getElementById(id);
const all = (selector) => [...document.querySelectorAll(selector)];
const state = {
  mode: "draw", about: null, pictures: [], shown: null, slots: [null, null], slot: 0,
  word: null, rules: [], preset: null, running: null, opened: null, brush: "paint",
  texts: { draw: "", edit: "", compare: "" },
};
let token = decodeURIComponent(location.hash.match(/token=([^&]*)/)?.[1] ?? "") || sessionStorage.token || "";
if (location.hash) history.replaceState(null, "", location.pathname);

/* Requests */
async function ask(path, options = {}) {
  const headers = { ...options.headers, ...(token ? { Authorization: `Bearer ${token}` } : {}) };
  const answer = await fetch(path, { ...options, headers });
  if (answer.status === 401) { await askToken(); return ask(path, options); }
  if (!answer.ok) throw new Error((await answer.json()).error.message);
  return answer;
}
const askJson = async (path) => (await ask(path)).json();

function askToken() {
  $("ask").showModal();
  return new Promise((done) => $("ask").addEventListener("close", () => {
    token = sessionStorage.token = $("token").value.trim();
    done();
  }, { once: true }));
}

async function* events(answer) {
  const reader = answer.body.pipeThrough(new TextDecoderStream()).getReader();
  let rest = "";
  for (;;) {
    const { value, done } = await reader.read();
    if (done) return;
    const parts = (rest + value).split("\n\n");
    rest = parts.pop();
    for (const part of parts) {
      const data = part.split("\n").find((line) => line.startsWith("data: "));
      if (data) yield JSON.parse(data.slice(6));
    }
  }
}

/* Drawing */
const number = (id) => ($(id).value === "" ? undefined : Number($(id).value));

function settings() {
  const chosen = {
    prompt: $("prompt").value, steps: number("steps"), cfg: number("cfg"), preset: state.preset ?? undefined,
    routes: state.rules.length ? state.rules : undefined, stream: true,
  };
  // A seed above 2^53 would lose digits as a number: it is sent as text.
  const seed = $("seed").value.trim() || seedShown();
  if (seed) chosen.seed = seed;
  return chosen;
}

/* What steers a picture should change it alone: with rules, its seed stays. */
function seedShown() {
  const shown = state.shown;
  const steers = state.rules.length && shown && state.mode === "draw" && shown.recipe.prompt === $("prompt").value.trim();
  return steers ? String(shown.seed) : "";
}

async function go() {
  if (state.running || state.mode === "compare") return;
  $("error").textContent = "";
  const abort = state.running = new AbortController();
  show();
  say("sending");
  try {
    const answer = state.mode === "edit" ? await sendEdit(abort) : await ask("/v1/images/generations", {
      method: "POST", signal: abort.signal, headers: { "Content-Type": "application/json" },
      body: JSON.stringify({ ...settings(), size: $("size").value || undefined }),
    });
    for await (const event of events(answer)) {
      if (event.type === "queued") say(event.position ? `waiting, ${event.position} before it` : "waiting");
      if (event.type === "drawing") say("reading the prompt");
      if (event.type === "step") say(`step ${event.step} of ${event.steps}`, event.step / event.steps);
      if (event.type === "failed" || event.type === "cancelled") throw new Error(event.error);
      if (event.b64_json) await add(event.job);
    }
  } catch (error) {
    if (error.name !== "AbortError") $("error").textContent = error.message;
  }
  state.running = null;
  show();
  status().catch((error) => { $("error").textContent ||= error.message; });
}

function say(text, part = 0) {
  $("said").textContent = text;
  $("bar").firstElementChild.style.width = `${100 * part}%`;
}

async function add(job) {
  const [info, file] = await Promise.all([askJson(`/v1/jobs/${job}`), ask(`/v1/jobs/${job}/picture`)]);
  const blob = await file.blob();
  const routing = await askJson(`/v1/jobs/${job}/routing`).catch(() => null);
  const picture = { job, blob, url: URL.createObjectURL(blob), recipe: info.recipe, seed: info.seed, routing };
  state.pictures.unshift(picture);
  choose(picture);
}

function choose(picture) {
  if (state.mode === "compare") state.slots[state.slot] = picture;
  state.shown = picture;
  state.opened = null;
  if (state.mode !== "compare") wipeMask();
  const words = picture.routing?.words ?? [];
  if (!words.some((word) => word.text === state.word)) state.word = words.findLast((word) => !word.picture)?.text ?? null;
  show();
}

/* Showing */
function show() {
  const comparing = state.mode === "compare";
  const [a, b] = comparing ? state.slots : [state.shown, null];
  const source = state.mode === "edit" && state.opened;
  for (const part of all("[data-for]")) part.hidden = !part.dataset.for.split(" ").includes(state.mode);
  for (const button of all("[data-mode]")) button.setAttribute("aria-pressed", button.dataset.mode === state.mode);
  for (const button of all("[data-slot]")) button.setAttribute("aria-pressed", Number(button.dataset.slot) === state.slot);
  for (const button of all("[data-brush]")) button.setAttribute("aria-pressed", button.dataset.brush === state.brush);
  const defaults = (state.mode === "edit" && state.about?.edits) || state.about;
  for (const name of ["steps", "cfg"]) $(name).placeholder = defaults?.[name] ?? "";
  $("prompt-label").textContent = state.mode === "edit" ? "What to change" : "Prompt";
  $("prompt").placeholder = state.mode === "edit" ? "make the cat blue" : "a cat and a dog";
  $("go-label").textContent = state.mode === "edit" ? "Edit" : seedShown() ? "Draw with these rules" : "Draw";
  $("seed").placeholder = seedShown() ? `${seedShown()}, as shown` : "random";
  $("keep").disabled = !state.shown;
  $("go").disabled = Boolean(state.running);
  $("stage").classList.toggle("drawing", Boolean(state.running));
  $("progress").hidden = !state.running;
  image($("first"), source ? source.url : a?.url, source ? "the picture to edit" : a?.recipe.prompt);
  image($("second"), b?.url, b?.recipe.prompt);
  $("empty").hidden = Boolean(source || a || b);
  $("frame").style.setProperty("--shape", shape(source || a || b));
  for (const part of [$("divider"), $("wipe"), ...all(".side")]) part.hidden = !(a && b);
  $("mask").hidden = state.mode !== "edit" || !(source || a);
  caption(source ? null : comparing ? b ?? a : a);
  strip();
  rules();
  routes(a, b);
  differences(a, b);
}

function image(element, url, alt) {
  element.hidden = !url;
  if (url && element.src !== url) element.src = url;
  element.alt = alt ?? "";
}

/* Width by height; an opened file has none before it is read. */
function shape(picture) {
  const { width = 1, height = 1 } = picture?.recipe ?? picture ?? {};
  return width / height;
}

function caption(picture) {
  $("caption").hidden = !picture;
  if (!picture) return;
  const { recipe } = picture;
  $("title").textContent = recipe.prompt;
  $("facts").textContent = [
    recipe.edit ? "an edit" : "", `seed ${picture.seed}`, `${recipe.steps} step${recipe.steps === 1 ? "" : "s"}`, `guidance ${recipe.cfg}`,
    `${recipe.width} \u00d7 ${recipe.height}`, (recipe.routes ?? []).join(", "),
  ].filter(Boolean).join(" \u00b7 ");
  $("again").hidden = !state.about.edits || state.mode === "edit";
  $("save").href = picture.url;
  $("save").download = `${recipe.prompt.replace(/[^\p{L}\p{N}]+/gu, "-").slice(0, 40) || "picture"}_s${picture.seed}.png`;
  $("report").hidden = !picture.routing;
  const [a, b] = state.slots;
  $("report").href = state.mode === "compare" && a && b ? `/v1/jobs/${a.job}/report?with=${b.job}` : `/v1/jobs/${picture.job}/report`;
}

function strip() {
  const compared = state.mode === "compare";
  $("strip").replaceChildren(...state.pictures.map((picture) => {
    const button = make("button", { type: "button" });
    const chosen = compared ? state.slots.includes(picture) : picture === state.shown;
    button.setAttribute("aria-pressed", chosen);
    button.setAttribute("aria-label", `${picture.recipe.prompt}, seed ${picture.seed}`);
    button.append(make("img", { src: picture.url, alt: "" }));
    const sides = ["A", "B"].filter((_, side) => state.slots[side] === picture).join(" ");
    if (compared && sides) button.append(make("span", { textContent: sides }));
    button.addEventListener("click", () => {
      choose(picture);
      if (compared && state.slots[1 - state.slot] === null) { state.slot = 1 - state.slot; show(); }
    });
    return button;
  }));
}

function make(tag, properties) {
  return Object.assign(document.createElement(tag), properties);
}

/* Rules */
function rules() {
  $("rules").replaceChildren(...state.rules.map((rule) => {
    const chip = make("button", { type: "button", className: "chip rule", textContent: rule, title: "Remove" });
    chip.setAttribute("aria-label", `Remove the rule ${rule}`);
    chip.addEventListener("click", () => { state.rules = state.rules.filter((other) => other !== rule); show(); });
    return chip;
  }));
  $("rules").hidden = !state.rules.length;
  $("rules").style.marginBottom = state.rules.length ? "8px" : "0";
}

function target(word) {
  const bare = word.replace(/^[^\p{L}\p{N}]+|[^\p{L}\p{N}]+$/gu, "") || word;
  return /^[\p{L}\p{N}]+$/u.test(bare) ? bare : `"${bare}"`;
}

/* The layers of the rules that were clicked together: word=1,3 or word!=0. */
function ruled(word, operator) {
  const rule = state.rules.find((one) => one.startsWith(`${target(word)}${operator}`) && /[=][\d,]+$/.test(one));
  return rule ? rule.slice(target(word).length + operator.length).split(",").map(Number) : [];
}

function toggle(word, layer, operator) {
  const layers = ruled(word, operator);
  const changed = layers.includes(layer) ? layers.filter((other) => other !== layer) : [...layers, layer].sort((x, y) => x - y);
  const prefix = `${target(word)}${operator}`;
  state.rules = state.rules.filter((one) => !(one.startsWith(prefix) && /[=][\d,]+$/.test(one)));
  if (changed.length) state.rules.push(`${prefix}${changed.join(",")}`);
  // The rule is for a word of the picture that is shown.
  if (!$("prompt").value.split(/\s+/).includes(word)) $("prompt").value = state.shown.recipe.prompt;
  show();
}

/* Routes */
function routes(a, b) {
  const traced = [a, b].filter((picture) => picture?.routing);
  $("routing").hidden = !traced.length;
  if (!traced.length) return;
  const words = [...new Set(traced.flatMap((picture) => picture.routing.words.map((word) => word.text)))];
  if (!words.includes(state.word)) state.word = words.at(-1);
  $("words").replaceChildren(...words.map((text) => {
    const chip = make("button", { type: "button", className: "chip", textContent: text });
    chip.setAttribute("aria-pressed", text === state.word);
    chip.addEventListener("click", () => { state.word = text; show(); [...$("words").children][words.indexOf(text)].focus(); });
    return chip;
  }));
  const focused = document.activeElement?.dataset?.layer;
  const pair = state.mode === "compare" && traced.length > 1;
  $("grids").className = pair ? "pair" : "grids";
  const steers = state.mode === "draw" && !traced[0].recipe.edit;
  $("grids").replaceChildren(...traced.map((picture, side) => grid(picture.routing, pair ? "AB"[side] : "", steers)));
  if (focused !== undefined) $("grids").querySelector(`[data-layer="${focused}"]`)?.focus();
  $("hint").textContent = pair ? agreement(traced) :
    `Rows are layers of the language model, columns blocks of the image model: the stronger the colour, the more ` +
    `\u201c${state.word}\u201d reads there.${steers ? " Click layers, and in the next picture the word reads these alone; with Shift, it never does." : ""}`;
}

function grid(routing, name, steers) {
  const word = routing.words.find((one) => one.text === state.word);
  const box = make("div", { className: "grid" });
  if (name) box.append(make("span", { className: "label", textContent: name }));
  if (!word) {
    box.append(make("p", { className: "note", textContent: "This word is not in its prompt." }));
    return box;
  }
  const pinned = ruled(word.text, "="), banned = ruled(word.text, "!=");
  for (let layer = routing.layers.length - 1; layer >= 0; layer -= 1) {
    const share = word.shares.reduce((sum, row) => sum + row[layer], 0) / word.shares.length;
    const row = make(steers ? "button" : "div", { className: "layer" });
    row.dataset.layer = layer;
    row.append(make("span", { textContent: name ? layer : layer ? `layer ${layer}` : "embedding" }));
    const cells = make("span", { className: "cells" });
    for (const block of word.shares) {
      const cell = make("i", {});
      cell.style.setProperty("--part", block[layer]);
      cells.append(cell);
    }
    row.append(cells, make("span", { className: "share", textContent: `${Math.round(100 * share)}\u202f%` }));
    if (steers) {
      row.type = "button";
      row.setAttribute("aria-pressed", pinned.includes(layer));
      row.classList.toggle("banned", banned.includes(layer));
      row.setAttribute("aria-label", `layer ${layer}, ${Math.round(100 * share)} %${banned.includes(layer) ? ", never read" : ""}`);
      row.addEventListener("click", (event) => toggle(word.text, layer, event.shiftKey ? "!=" : "="));
    }
    box.append(row);
  }
  const axis = make("div", { className: "axis" });
  const ends = make("span", {});
  ends.append(make("span", { textContent: "block 0" }), make("span", { textContent: routing.blocks - 1 }));
  axis.append(make("span", {}), ends, make("span", {}));
  box.append(axis);
  return box;
}

function agreement(traced) {
  const [a, b] = traced.map((picture) => picture.routing.words.find((one) => one.text === state.word));
  if (!a || !b || a.shares.length !== b.shares.length) return "";
  const shared = a.shares.map((row, block) => row.reduce((sum, share, layer) => sum + Math.min(share, b.shares[block][layer]), 0));
  const part = shared.reduce((sum, one) => sum + one, 0) / shared.length;
  return `\u201c${state.word}\u201d reads ${Math.round(100 * part)}\u202f% of its weight from the same layers in both.`;
}

function differences(a, b) {
  const rows = [];
  if (a && b && state.mode === "compare") {
    const values = [a, b].map((picture) => ({ ...picture.recipe, seed: picture.seed }));
    for (const name of new Set(values.flatMap(Object.keys))) {
      const [left, right] = values.map((value) => name === "edit" ? (value.edit ? "yes" : "no") : [value[name] ?? "\u2013"].flat().join(", "));
      if (left !== right) rows.push(make("b", { textContent: name }), make("span", { textContent: left }), make("span", { textContent: right }));
    }
    if (!rows.length) rows.push(make("span", { textContent: "Their recipes are the same." }));
    else rows.unshift(make("b", {}), make("b", { textContent: "A" }), make("b", { textContent: "B" }));
  }
  $("differences").replaceChildren(...rows);
}

/* The mask */
const mask = $("mask"), paint = mask.getContext("2d");
let painted = false, pointer = null, cursor = null;

function wipeMask() {
  paint.clearRect(0, 0, mask.width, mask.height);
  painted = false;
}

function fitMask() {
  const { naturalWidth: width, naturalHeight: height } = $("first");
  if (state.opened) Object.assign(state.opened, { width, height });
  if (mask.width !== width || mask.height !== height) { Object.assign(mask, { width, height }); painted = false; }
  if (state.opened) $("frame").style.setProperty("--shape", width / height);
}

const radius = () => (Number($("size-brush").value) / 200) * Math.max(mask.width, mask.height);

function stroke(from, to) {
  paint.globalCompositeOperation = state.brush === "erase" ? "destination-out" : "source-over";
  paint.strokeStyle = getComputedStyle($("go")).backgroundColor;
  paint.lineWidth = 2 * radius();
  paint.lineCap = "round";
  paint.beginPath();
  paint.moveTo(from.x, from.y);
  paint.lineTo(to.x, to.y + 0.01);
  paint.stroke();
  painted = true;
}

function place(event) {
  const box = mask.getBoundingClientRect();
  const scale = Math.min(box.width / mask.width, box.height / mask.height);
  return {
    x: (event.clientX - box.left - (box.width - mask.width * scale) / 2) / scale,
    y: (event.clientY - box.top - (box.height - mask.height * scale) / 2) / scale,
  };
}

mask.addEventListener("pointerdown", (event) => {
  mask.setPointerCapture(event.pointerId);
  pointer = place(event);
  stroke(pointer, pointer);
});
mask.addEventListener("pointermove", (event) => {
  if (!pointer) return;
  const next = place(event);
  stroke(pointer, next);
  pointer = next;
});
for (const end of ["pointerup", "pointercancel"]) mask.addEventListener(end, () => { pointer = null; });
mask.addEventListener("keydown", (event) => {
  const move = { ArrowLeft: [-1, 0], ArrowRight: [1, 0], ArrowUp: [0, -1], ArrowDown: [0, 1] }[event.key];
  if (!move && event.key !== " ") return;
  event.preventDefault();
  cursor ??= { x: mask.width / 2, y: mask.height / 2 };
  if (move) {
    cursor.x = Math.min(mask.width, Math.max(0, cursor.x + move[0] * radius()));
    cursor.y = Math.min(mask.height, Math.max(0, cursor.y + move[1] * radius()));
    $("hint").textContent = `the brush is at ${Math.round(cursor.x)}, ${Math.round(cursor.y)}`;
  } else stroke(cursor, cursor);
});

/* White where it is painted; null where nothing is. */
async function maskFile() {
  if (!painted) return null;
  const copy = make("canvas", { width: mask.width, height: mask.height }), drawn = copy.getContext("2d");
  const pixels = paint.getImageData(0, 0, mask.width, mask.height);
  let any = false;
  for (let i = 0; i < pixels.data.length; i += 4) {
    const white = pixels.data[i + 3] > 127 ? 255 : 0;
    any ||= white > 0;
    pixels.data.fill(white, i, i + 3);
    pixels.data[i + 3] = 255;
  }
  drawn.putImageData(pixels, 0, 0);
  return any ? new Promise((done) => copy.toBlob(done, "image/png")) : null;
}

async function sendEdit(abort) {
  const picture = state.opened ?? state.shown;
  if (!picture) throw new Error("there is no picture to edit: draw one, or open a file");
  const form = new FormData();
  form.append("image", picture.blob, "picture.png");
  const painting = await maskFile();
  if (painting) form.append("mask", painting, "mask.png");
  const { routes: chosen = [], ...fields } = { ...settings(), strength: number("strength") };
  for (const [name, value] of Object.entries(fields)) if (value !== undefined) form.append(name, value);
  for (const rule of chosen) form.append("routes", rule);
  return ask("/v1/images/edits", { method: "POST", signal: abort.signal, body: form });
}

function openFile(file) {
  if (!file) return;
  if (state.mode !== "edit") setMode("edit");
  state.opened = { blob: file, url: URL.createObjectURL(file) };
  wipeMask();
  show();
}

/* What is clicked and typed */
function setMode(mode) {
  state.texts[state.mode] = $("prompt").value;
  state.mode = mode;
  $("prompt").value = state.texts[mode];
  if (mode === "compare") {
    state.slots = [state.slots[0] ?? state.pictures[1] ?? null, state.slots[1] ?? state.pictures[0] ?? null];
    state.slot = state.slots[0] ? 1 : 0;
  }
  // The words of an instruction are others.
  if (mode === "edit") state.rules = [];
  show();
}

for (const button of all("[data-mode]")) button.addEventListener("click", () => setMode(button.dataset.mode));
for (const button of all("[data-slot]")) button.addEventListener("click", () => { state.slot = Number(button.dataset.slot); show(); });
for (const button of all("[data-brush]")) button.addEventListener("click", () => { state.brush = button.dataset.brush; show(); });
$("controls").addEventListener("submit", (event) => { event.preventDefault(); go(); });
$("prompt").addEventListener("input", show);
$("keep").addEventListener("click", () => { $("seed").value = state.shown.seed; show(); });
$("seed").addEventListener("input", show);
$("cancel").addEventListener("click", () => state.running?.abort());
$("again").addEventListener("click", () => { setMode("edit"); $("prompt").focus(); });
$("open").addEventListener("click", () => $("file").click());
$("file").addEventListener("change", () => openFile($("file").files[0]));
$("clear").addEventListener("click", wipeMask);
$("all").addEventListener("click", () => {
  paint.globalCompositeOperation = "xor";
  paint.fillStyle = getComputedStyle($("go")).backgroundColor;
  paint.fillRect(0, 0, mask.width, mask.height);
  painted = true;
});
$("first").addEventListener("load", fitMask);
$("wipe").addEventListener("input", () => $("frame").style.setProperty("--wipe", `${$("wipe").value}%`));
$("rule").addEventListener("keydown", (event) => {
  if (event.key !== "Enter" || event.ctrlKey || event.metaKey) return;
  event.preventDefault();
  const rule = $("rule").value.trim();
  if (rule && !state.rules.includes(rule)) state.rules.push(rule);
  $("rule").value = "";
  show();
});
$("report").addEventListener("click", async (event) => {
  if (!token) return;
  // A link sends no token: the report is fetched and saved.
  event.preventDefault();
  const page = await (await ask($("report").getAttribute("href"))).blob();
  make("a", { href: URL.createObjectURL(page), download: "report.html" }).click();
});
for (const kind of ["dragover", "drop"]) $("frame").addEventListener(kind, (event) => {
  event.preventDefault();
  if (kind === "drop" && state.about.edits) openFile(event.dataTransfer.files[0]);
});
const dark = () => (document.documentElement.dataset.theme ?? (matchMedia("(prefers-color-scheme: dark)").matches ? "dark" : "light")) === "dark";
const switchTheme = () => { document.documentElement.dataset.theme = dark() ? "light" : "dark"; };
$("theme").addEventListener("click", switchTheme);
document.addEventListener("keydown", (event) => {
  if (event.key === "Enter" && (event.ctrlKey || event.metaKey)) { event.preventDefault(); go(); }
  if (event.key === "Escape") state.running?.abort();
  if (event.key === "t" && !event.target.closest("input, textarea, select") && !event.ctrlKey && !event.metaKey) switchTheme();
});

/* The beginning */
async function status() {
  const about = state.about = await askJson("/v1/server");
  const busy = about.drawing || about.waiting;
  $("queue").dataset.state = busy ? "busy" : "ready";
  $("queue").textContent = busy ? `drawing, ${about.waiting} waiting` : about.loaded ? "ready" : "ready, loads the model first";
  return about;
}

async function begin() {
  const about = await status();
  $("about").replaceChildren(make("strong", { textContent: about.model }), ` \u2014 ${about.description}`);
  document.title = `mos \u2014 ${about.model}`;
  const [width, height] = about.canvas.native;
  const shapes = [["", `${width} \u00d7 ${height}`], ...["3:2", "2:3", "4:3", "3:4", "16:9"].map((one) => [one, one])];
  $("size").replaceChildren(...shapes.map(([value, textContent]) => make("option", { value, textContent })));
  document.querySelector('[data-mode="edit"]').hidden = !about.edits;
  const presets = [[null, "default"], ...Object.keys(about.presets).map((name) => [name, name])];
  $("presets").replaceChildren(...presets.map(([name, textContent]) => {
    const button = make("button", { type: "button", textContent, title: about.presets[name] ?? "The model's own settings." });
    button.setAttribute("aria-pressed", name === state.preset);
    button.addEventListener("click", () => {
      state.preset = name;
      for (const other of $("presets").children) other.setAttribute("aria-pressed", other === button);
    });
    return button;
  }));
  const examples = ["a cat and a dog", "a rocket, flat style", "a rose on a sky blue background"];
  $("examples").replaceChildren(...examples.map((textContent) => {
    const chip = make("button", { type: "button", className: "chip", textContent });
    chip.addEventListener("click", () => { $("prompt").value = textContent; go(); });
    return chip;
  }));
  const { jobs } = await askJson("/v1/jobs");
  for (const job of jobs.filter((one) => one.status === "done")) await add(job.id).catch(() => null);
  show();
  document.documentElement.dataset.ready = "";
}
begin().catch((error) => { $("error").textContent = error.message; });
