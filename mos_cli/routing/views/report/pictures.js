// Pictures: the finished one, what was expected at each step, and what the patches attended to.

const THUMBS = two ? 4 : 8;

/** A picture, its frames by the step, the map of the pinned word over it, and a strip of frames below. */
function figureOf(trace, at) {
  const { prompt, width, height } = trace.recipe, { previews } = trace;
  const figure = make("figure"), frame = make("div", { class: "frame" });
  frame.style.aspectRatio = `${width} / ${height}`;
  if (trace.picture) frame.append(make("img", { src: trace.picture, alt: prompt }));
  else frame.append(make("p", { class: "note" }, "The picture is not beside its trace."));
  if (previews) frame.append(sprite(previews, "sprite"));
  frame.append(make("canvas", { class: "heat", hidden: "", "aria-hidden": "true" }));
  frame.addEventListener("pointermove", (event) => overPatch(event, frame, at));
  frame.addEventListener("pointerleave", hideTip);
  figure.append(frame);
  if (previews) {
    const strip = make("div", { class: "film", "aria-hidden": "true" });
    for (let thumb = 0; thumb < Math.min(THUMBS, total); thumb++) {
      const step = Math.round((thumb * (total - 1)) / (Math.min(THUMBS, total) - 1 || 1));
      const image = sprite(previews, "thumb");
      image.style.aspectRatio = `${width} / ${height}`;
      image.dataset.step = step;
      showFrame(image, previews, nearest[at][step]);
      image.addEventListener("click", () => go(step));
      strip.append(image);
    }
    figure.append(strip);
  }
  if (two) figure.append(make("figcaption", {}, sides[at]));
  return figure;
}

function sprite({ sheet, columns, rows }, kind) {
  const element = make("div", { class: kind, role: "img" });
  element.style.backgroundImage = `url(${sheet})`;
  element.style.backgroundSize = `${columns * 100}% ${rows * 100}%`;
  return element;
}

function showFrame(element, { columns, rows, count }, step) {
  const number = Math.min(step, count - 1);
  const x = (number % columns) / Math.max(columns - 1, 1), y = Math.floor(number / columns) / Math.max(rows - 1, 1);
  element.style.backgroundPosition = `${100 * x}% ${100 * y}%`;
  element.dataset.frame = number;
}

function showPictures() {
  const last = state.step === total - 1, notes = [];
  [...$("pictures").children].forEach((figure, at) => {
    const { previews, picture } = traces[at];
    if (previews) {
      const shown = figure.querySelector(".sprite");
      showFrame(shown, previews, nearest[at][state.step]);
      shown.setAttribute("aria-label", `what was expected at step ${shown.dataset.frame}`);
      shown.hidden = last && picture !== null;
      const thumbs = [...figure.querySelectorAll(".thumb")], off = (thumb) => Math.abs(thumb.dataset.step - state.step);
      const closest = thumbs.reduce((best, thumb) => (off(thumb) < off(best) ? thumb : best));
      thumbs.forEach((thumb) => thumb.classList.toggle("now", thumb === closest));
    }
    notes.push(...showHeat(figure.querySelector(".heat"), at));
  });
  if (!notes.length) {
    const without = sides.filter((_, at) => !traces[at].previews), all = without.length === traces.length;
    const which = !two ? "" : all ? "both " : `the ${without[0]} `;
    notes.push(last || all ? "The finished picture." : "What the model expected at this step.");
    if (without.length) notes.push(`Draw ${which}with --preview-steps to see ${two && all ? "them" : "it"} at every step.`);
    if (traces.some((_, at) => branchOf(at)?.regions)) notes.push("Pin a word to see where it was read.");
  }
  $("seen").textContent = notes.map(sentence).join(" ");
}

/** Where the picture attended to the pinned word: bright where most, dark where least. Returns what to say of it. */
function showHeat(canvas, at) {
  const regions = branchOf(at)?.regions;
  canvas.hidden = !regions || state.pin === null || !reads(at, state.pin);
  if (canvas.hidden) return [];
  const { rows: high, columns, parts } = regions, count = high * columns;
  const own = parts.subarray(state.pin * count, (state.pin + 1) * count);
  const least = own.reduce((a, b) => Math.min(a, b)), span = 255 - least || 1;
  paint(canvas, columns, high, (x, y) => [12, 12, 20, (215 * (255 - own[y * columns + x])) / span]);
  const peak = regions.peaks[state.pin], word = name(rows()[state.pin]), side = two ? `${sides[at]}: ` : "";
  return [`${side}bright patches give “${word}” up to ${percent(peak)} of their attention, dark ones ` +
    `${percent((least / 255) * peak)}; mean of all steps and blocks.`];
}

function overPatch(event, frame, at) {
  const branch = branchOf(at), regions = branch?.regions;
  if (!regions) return;
  const bounds = frame.getBoundingClientRect();
  const place = (part, count) => Math.min(Math.max(Math.floor(part * count), 0), count - 1);
  const y = place((event.clientY - bounds.top) / bounds.height, regions.rows);
  const x = place((event.clientX - bounds.left) / bounds.width, regions.columns);
  const words = rows().flatMap((row, index) => (row.kind === "special" || !reads(at, index) ? [] :
    [{ row, share: branch.attention(index, y * regions.columns + x) }]));
  words.sort((a, b) => b.share - a.share);
  const most = words.slice(0, 3).map(({ row, share }) => `${name(row)} ${percent(share)}`);
  tip(event, `patch ${y},${x} attends to ${most.join(", ")}`);
}
