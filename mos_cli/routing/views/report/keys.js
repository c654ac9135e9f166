// Hands: keys and pointers, and the beginning.

const tipBox = make("div", { class: "tip", "aria-hidden": "true", hidden: "" });

function tip({ clientX, clientY }, text) {
  tipBox.textContent = text;
  tipBox.hidden = false;
  const { width, height } = tipBox.getBoundingClientRect();
  tipBox.style.left = `${Math.min(clientX + 14, innerWidth - width - 8)}px`;
  tipBox.style.top = `${Math.max(clientY - height - 12, 8)}px`;
}
function hideTip() {
  tipBox.hidden = true;
}

/** Selects the word of a row everywhere; null clears the selection. */
function pin(row) {
  set({ pin: row === state.pin ? null : row, block: null });
}

function play(on = !timer) {
  clearInterval(timer);
  timer = null;
  if (on) {
    if (state.step === total - 1) set({ step: 0 });
    const advance = () => {
      set({ step: Math.min(state.step + 1, total - 1) });
      if (state.step === total - 1) play(false);
    };
    timer = setInterval(advance, calm.matches ? 900 : 170);
  }
  $("play").textContent = on ? "❚❚" : "▶";
  $("play").setAttribute("aria-label", on ? "Pause" : "Play");
  $("play").setAttribute("aria-pressed", String(on));
}

function go(step) {
  play(false);
  set({ step: Math.min(Math.max(step, 0), total - 1) });
}

/** The next of `count` places, round and round; from null to the first or the last. */
function around(place, way, count) {
  if (place === null) return way > 0 ? 0 : count - 1;
  return (place + way + count) % count;
}

function walk(way) {
  const next = around(state.pin, way, rows().length);
  set({ pin: next });
  const label = $("rows").children[next].firstChild;
  label.tabIndex = 0;
  label.focus({ preventScroll: true });
  label.scrollIntoView({ block: "nearest" });
}

function walkBlocks(way) {
  if (state.pin !== null) set({ block: around(state.block, way, traces[0].blocks) });
}

const next = (values, value) => values[(values.indexOf(value) + 1) % values.length];

function toggleTheme() {
  const root = document.documentElement;
  root.dataset.theme = root.classList.contains("dark") ? "light" : "dark";
  readTheme();
  set({ theme: root.dataset.theme });
}

function readTheme() {
  const root = document.documentElement;
  const dark = root.dataset.theme ? root.dataset.theme === "dark" : matchMedia("(prefers-color-scheme: dark)").matches;
  $("theme").setAttribute("aria-pressed", String(dark));
  root.classList.toggle("dark", dark);
  accent = getComputedStyle($("probe")).color.match(/\d+/g).slice(0, 3).map(Number);
}

function toggleKeys(open = $("keys").hidden) {
  $("keys").hidden = !open;
  $("help").setAttribute("aria-expanded", String(open));
}

const KEYS = {
  ArrowLeft: () => go(state.step - 1),
  ArrowRight: () => go(state.step + 1),
  Home: () => go(0),
  End: () => go(total - 1),
  ArrowUp: () => walk(-1),
  ArrowDown: () => walk(1),
  Escape: () => ($("keys").hidden ? pin(null) : toggleKeys(false)),
  " ": () => play(),
  ",": () => walkBlocks(-1),
  ".": () => walkBlocks(1),
  b: () => set({ branch: next(Object.keys(data.rows), state.branch) }),
  f: () => set({ span: next(["step", "all"], state.span) }),
  v: () => two && set({ view: next(["both", 0, 1], state.view) }),
  t: toggleTheme,
  "?": () => toggleKeys(),
};

function listen() {
  document.addEventListener("keydown", (event) => {
    const pressing = event.key === " " && event.target.closest("button");
    if (event.ctrlKey || event.metaKey || event.altKey || pressing || !Object.hasOwn(KEYS, event.key)) return;
    event.preventDefault();
    KEYS[event.key]();
  });
  $("step").addEventListener("input", (event) => go(+event.target.value));
  $("play").addEventListener("click", () => play());
  $("theme").addEventListener("click", toggleTheme);
  $("help").addEventListener("click", () => toggleKeys());
  $("rows").addEventListener("click", (event) => {
    const spot = spotOf(event);
    if (!spot) return;
    if (event.target.closest(".name")) pin(spot.row);
    else if (event.target.closest(".strip")) go(spot.step);
    else set({ pin: spot.row, block: spot.block });
  });
  $("rows").addEventListener("pointermove", (event) => showInspector(spotOf(event)));
  $("rows").addEventListener("pointerleave", () => showInspector());
  matchMedia("(prefers-color-scheme: dark)").addEventListener("change", () => {
    readTheme();
    set({ theme: "system" });
  });
  let width = 0;
  new ResizeObserver(([entry]) => {
    if (entry.contentRect.width !== width) set({ width: (width = entry.contentRect.width) });
  }).observe(document.querySelector("main"));
}

async function start() {
  branches = await Promise.all(traces.map(async (trace, at) => {
    const read = Object.entries(trace.branches).map(async ([name, held]) =>
      [name, await Branch.read(name, held, trace, data.rows[name], at)]);
    return Object.fromEntries(await Promise.all(read));
  }));
  document.body.append(tipBox, make("span", { id: "probe", hidden: "" }));
  readTheme();
  setUp();
  listen();
  buildRows();
  set({ branch: state.branch });
  document.documentElement.dataset.ready = "";
}
start();
