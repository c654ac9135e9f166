// The pictures of a folder: search, and the recipe behind each. Text of recipes is only ever set as text.

const { folder, pictures } = JSON.parse(document.getElementById("data").textContent);
const $ = (id) => document.getElementById(id);
const make = (tag, text) => Object.assign(document.createElement(tag), { textContent: text });
const texts = pictures.map((one) => [one.prompt, one.negative, one.name].join("\n").toLocaleLowerCase());
const cards = pictures.map(card);
let open = 0;

function card(one, at) {
  const button = document.createElement("button"), image = new Image();
  Object.assign(button, { type: "button", className: "picture" });
  // Before the source, or all pictures load at once.
  Object.assign(image, { loading: "lazy", decoding: "async", alt: one.prompt ?? one.name });
  image.src = one.src;
  button.append(image, make("span", one.prompt ?? "no recipe"), make("small", one.name));
  button.addEventListener("click", () => show(at));
  return button;
}

const visible = () => [...cards.keys()].filter((at) => !cards[at].hidden);

function search() {
  const words = $("search").value.toLocaleLowerCase().split(/\s+/).filter(Boolean);
  cards.forEach((element, at) => { element.hidden = !words.every((word) => texts[at].includes(word)); });
  const found = visible().length;
  $("count").textContent = (words.length ? `${found} of ${pictures.length}` : `${pictures.length}`) +
    (pictures.length === 1 ? " picture" : " pictures");
}

function show(at) {
  const one = pictures[at], [width, height] = one.size;
  open = at;
  $("large").src = one.src;
  $("large").alt = one.prompt ?? one.name;
  $("prompt").textContent = one.prompt ?? "no recipe";
  const facts = [["file", one.name], ["size", `${width} × ${height}`], ...(one.negative ? [["negative", one.negative]] : []),
    ...(one.settings ?? [])];
  $("settings").replaceChildren(...facts.map(([name, value]) => {
    const row = document.createElement("div");
    row.append(make("dt", name.replaceAll("_", " ")), make("dd", value));
    return row;
  }));
  if (!$("details").open) $("details").showModal();
}

function walk(by) {
  const there = visible(), next = there[there.indexOf(open) + by];
  if (next !== undefined) show(next);
}

$("folder").textContent = document.title = folder;
$("pictures").append(...cards);
$("search").addEventListener("input", search);
$("close").addEventListener("click", () => $("details").close());
$("details").addEventListener("click", (event) => { if (event.target === $("details")) $("details").close(); });
$("details").addEventListener("close", () => cards[open].focus());
addEventListener("keydown", (event) => {
  if ($("details").open && event.key === "ArrowRight") walk(1);
  else if ($("details").open && event.key === "ArrowLeft") walk(-1);
  else if (event.key === "/" && document.activeElement !== $("search") && !$("details").open) {
    event.preventDefault();
    $("search").focus();
  }
});
search();
document.documentElement.dataset.ready = "";
