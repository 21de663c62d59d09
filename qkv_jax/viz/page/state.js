"use strict";
// One page of attention weights: its state, its data, small helpers. Text from the data is only ever
// put into the page as text.

const CHUNK = 16; // tokens of a fold
const UNFOLDED = 64; // tokens of a text that is not folded
const FAINT = 0.02; // a weight below has no line, unless its token is looked at
const THUMB = 48; // pixels of a small map's side, at most
const LABELLED = 64; // tokens of a map with labels
const $ = (id) => document.getElementById(id);
const data = JSON.parse($("data").textContent);

const state = {
  first: { view: 0, layer: 0, head: 0 }, second: null, // the heads shown; the second where compared
  token: 0, key: 0, // chosen, by place
  incoming: false, // Text: who looks at the chosen token, instead of what it looks at
  tab: "lines",
  unfolded: new Set(),
};

// --- data -----------------------------------------------------------------------------------------

async function unpack(text, Type) {
  const letters = atob(text), bytes = new Uint8Array(letters.length);
  for (let i = 0; i < letters.length; i++) bytes[i] = letters.charCodeAt(i);
  const stream = new Blob([bytes]).stream().pipeThrough(new DecompressionStream("deflate"));
  return new Type(await new Response(stream).arrayBuffer());
}

// A head's weights: integers n that stand for (n / levels) ** 2.
const head = ({ view, layer, head }) => {
  const v = data.views[view], [L, N, T, S] = v.shape;
  const from = (layer * N + head) * T * S;
  return { T, S, levels: v.levels, cells: v.cells.subarray(from, from + T * S), of: v };
};
const weight = (h, t, s) => (h.cells[t * h.S + s] / h.levels) ** 2;

// A view's queries or keys, unpacked when they are first looked at: of a vector, integers and what
// they are multiples of.
async function unpackVectors(view) {
  for (const x of [view.q, view.k]) {
    x.integers = await unpack(x.integers, Int8Array);
    x.scales = await unpack(x.scales, Float32Array);
  }
  view.unpacked = true;
}
function vector(x, width, i) {
  const scale = x.scales[i];
  return { scale, values: Float32Array.from(x.integers.subarray(i * width, (i + 1) * width), (n) => n * scale) };
}

const percent = (w, h) => {
  const step = (2 * Math.sqrt(w) + 1 / h.levels) / (2 * h.levels) * 100; // half of a level
  return (100 * w).toFixed(step > 0.3 ? 0 : step > 0.03 ? 1 : 2) + " %";
};
const digits = (x, error) => // of a number, those that an error leaves
  x.toFixed(Math.max(0, Math.min(-Math.floor(Math.log10(error || 1e-4)), 8)));
const chosen = (h) => [Math.min(state.token, h.T - 1), Math.min(state.key, h.S - 1)]; // in a text of its own
const label = (h) => {
  const several = data.views.length > 1 ? data.views[h.view].name + ", " : "";
  return `${several}layer ${h.layer + 1}, head ${h.head + 1}`;
};

// What a font cannot draw becomes an escape, as in Python; marks that turn the direction of a text
// would turn what stands beside it. Joiners stay between the letters that they join.
const escaped = (c) => {
  const code = c.codePointAt(0), digits = code < 0x100 ? 2 : code < 0x10000 ? 4 : 8;
  return "\\" + { 2: "x", 4: "u", 8: "U" }[digits] + code.toString(16).padStart(digits, "0");
};
const legible = (text) =>
  text.replace(/(?!(?<=\S)[\u200c\u200d](?=\S))[\p{C}\p{Zl}\p{Zp}]/gu, (c) => "\n\t".includes(c) ? c : escaped(c));
const RTL = "[\\p{Script=Hebrew}\\p{Script=Arabic}]", WORDS_RTL = new RegExp(`${RTL}(?:(?:${RTL}|[\\p{M} ])*${RTL})?`, "gu");
const apart = (text) => text.replace(WORDS_RTL, "\u2068$&\u2069"); // so that a number beside it keeps its place
const shown = (token) => apart(legible(token).replace(/ /g, "␣").replace(/\n/g, "⏎").replace(/\t/g, "⇥")
  .replace(/\p{Zs}/gu, escaped)) || "∅";

// --- small helpers --------------------------------------------------------------------------------

function make(tag, attributes = {}, ...children) {
  const element = document.createElement(tag);
  for (const [name, value] of Object.entries(attributes)) {
    if (name.startsWith("on")) element.addEventListener(name.slice(2), value);
    else if (name === "class") element.className = value;
    else element.setAttribute(name, value);
  }
  element.append(...children);
  return element;
}
const heat = () => getComputedStyle(document.documentElement).getPropertyValue("--heat");
const shade = (w) => `rgba(${heat()}, ${Math.sqrt(Math.min(w, 1)) * 0.85})`;

function lay(element, w) { // a weight behind a token, which stays readable on it
  element.style.background = w ? shade(w) : "";
  element.style.color = w > 0.4 ? "var(--paper)" : "";
}

function paint(canvas, width, height, value) {
  canvas.width = width; canvas.height = height;
  const context = canvas.getContext("2d"), image = context.createImageData(width, height);
  const [r, g, b] = heat().split(",").map(Number);
  for (let i = 0, at = 0; i < width * height; i++) {
    image.data[at++] = r; image.data[at++] = g; image.data[at++] = b;
    image.data[at++] = 255 * value(Math.floor(i / width), i % width);
  }
  context.putImageData(image, 0, 0);
}

function tip(event, text) {
  const box = $("tip");
  box.hidden = !text;
  if (!text) return;
  box.textContent = text;
  const { width, height } = box.getBoundingClientRect();
  box.style.left = Math.max(4, Math.min(event.clientX + 14, innerWidth - width - 8)) + "px";
  box.style.top = Math.max(4, Math.min(event.clientY + 14, innerHeight - height - 8)) + "px";
}
