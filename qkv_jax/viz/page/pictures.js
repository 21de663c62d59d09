// What is drawn of heads: the grid of all, and four pictures of one.

// --- all heads ------------------------------------------------------------------------------------

function drawGrid() {
  const { view } = state.first, [L, N] = data.views[view].shape;
  const grid = $("grid");
  grid.style.gridTemplateColumns = `1.6em repeat(${N}, minmax(20px, 90px))`;
  grid.replaceChildren(make("span"));
  for (let n = 0; n < N; n++) grid.append(make("span", { class: "name" }, String(n + 1)));
  for (let layer = 0; layer < L; layer++) {
    grid.append(make("span", { class: "name" }, String(layer + 1)));
    for (let n = 0; n < N; n++) {
      const where = { view, layer, head: n };
      const button = make("button", {
        "aria-label": `layer ${layer + 1}, head ${n + 1}`, "data-at": `${layer}.${n}`,
        onclick: () => choose(where), onmousemove: (e) => tip(e, told(where)), onmouseleave: tip,
      }, make("canvas"));
      grid.append(button);
    }
  }
  drawThumbs();
}

function drawThumbs() { // a row of heads a frame, so that the page answers meanwhile
  const { view } = state.first, buttons = [...$("grid").querySelectorAll("button")];
  const N = data.views[view].shape[1];
  const row = (from) => {
    if (state.first.view !== view || from >= buttons.length) return;
    for (const button of buttons.slice(from, from + N)) {
      const [layer, n] = button.dataset.at.split(".").map(Number);
      thumb(button.firstChild, head({ view, layer, head: n }));
    }
    requestAnimationFrame(() => row(from + N));
  };
  row(0);
}

function thumb(canvas, h) { // the largest of the weights under each pixel, by the map's largest
  const rows = Math.min(h.T, THUMB), columns = Math.min(h.S, THUMB);
  const most = new Uint8Array(rows * columns);
  let top = 1;
  for (let t = 0; t < h.T; t++) {
    const r = Math.floor(t * rows / h.T) * columns;
    for (let s = 0; s < h.S; s++) {
      const value = h.cells[t * h.S + s], at = r + Math.floor(s * columns / h.S);
      if (value > most[at]) { most[at] = value; if (value > top) top = value; }
    }
  }
  paint(canvas, columns, rows, (r, c) => most[r * columns + c] / top);
}

function told(where) {
  const measures = data.views[where.view].measures;
  const values = Object.entries(measures).map(([name, m]) => `${name}  ${number(m[where.layer][where.head])}`);
  return [label(where), ...values].join("\n");
}
const number = (x) => x === null ? "–" : Math.abs(x) >= 100 || x === 0 ? x.toFixed(0) : x.toPrecision(3);

function drawMeasures() {
  const heads = [state.first, state.second].filter(Boolean);
  const names = [...new Set(heads.flatMap((h) => Object.keys(data.views[h.view].measures)))];
  const table = $("measures");
  table.replaceChildren();
  if (!names.length) return;
  table.append(make("tr", {}, make("th", {}, "measure"), ...heads.map((h) => make("th", {}, label(h))),
    make("th", {}, "all heads")));
  for (const name of names) {
    const all = data.views[state.first.view].measures[name].flat().filter((x) => x !== null);
    const range = all.length ? `${number(Math.min(...all))} … ${number(Math.max(...all))}` : "–";
    const cells = heads.map((h) => {
      const found = data.views[h.view].measures[name];
      return make("td", {}, found ? number(found[h.layer][h.head]) : "–");
    });
    table.append(make("tr", {}, make("td", {}, name), ...cells, make("td", {}, range)));
  }
}

// --- one head -------------------------------------------------------------------------------------

const PICTURES = { lines: drawLines, map: drawMap, text: drawText, product: drawProduct };

function drawPanels() {
  const panels = $("panels");
  panels.replaceChildren();
  for (const [name, at] of [["first", state.first], ["second", state.second]]) {
    if (!at) continue;
    const box = make("div", { class: "panel", "data-panel": name }, make("h2", { class: name }, label(at)));
    panels.append(box);
    PICTURES[state.tab](box, head(at), at);
  }
}

// The places of a column: one token each, or a fold of several.
function items(length) {
  const found = [];
  for (let from = 0; from < length; from += CHUNK) {
    const to = Math.min(from + CHUNK, length);
    if (length > UNFOLDED && !state.unfolded.has(from)) found.push({ from, to });
    else for (let i = from; i < to; i++) found.push({ from: i, to: i + 1 });
  }
  return found;
}

function drawLines(box, h, at) {
  const queries = items(h.T), keys = items(h.S), sums = new Float64Array(queries.length * keys.length);
  queries.forEach((q, i) => keys.forEach((k, j) => { // what a query of the one gives to all of the other
    let sum = 0;
    for (let t = q.from; t < q.to; t++) for (let s = k.from; s < k.to; s++) sum += weight(h, t, s);
    sums[i * keys.length + j] = sum / (q.to - q.from);
  }));
  const rows = Math.max(queries.length, keys.length);
  const svg = document.createElementNS("http://www.w3.org/2000/svg", "svg");
  const area = make("div", { class: "lines", style: `height:${rows * 20}px` }, svg);
  const line = (i, j, w) => {
    const element = document.createElementNS("http://www.w3.org/2000/svg", "line");
    const set = { x1: "35%", y1: i * 20 + 10, x2: "65%", y2: j * 20 + 10, opacity: Math.sqrt(Math.min(w, 1)) };
    for (const name in set) element.setAttribute(name, set[name]);
    return element;
  };
  const draw = (side, place) => { // the lines of one place, or of all
    const found = [];
    queries.forEach((_, i) => keys.forEach((_, j) => {
      const w = sums[i * keys.length + j];
      const seen = side === null ? w >= FAINT : (side === 0 ? i : j) === place && w > 0;
      if (seen) found.push(line(i, j, w));
    }));
    svg.replaceChildren(...found);
    for (const [which, column] of columns.entries()) {
      [...column.children].forEach((row, other) => {
        let w = 0;
        if (side !== null && which !== side) w = side === 0 ? sums[place * keys.length + other] : sums[other * keys.length + place];
        lay(row, w);
      });
    }
  };
  const words = [at.view, at.view].map((v) => data.views[v]).map((v, side) => side ? v.keys : v.queries);
  const columns = [queries, keys].map((places, side) => make("div", { class: "column " + (side ? "keys" : "queries") },
    ...places.map((place, i) => {
      const one = place.to - place.from === 1;
      const text = one ? shown(words[side][place.from]) : `▸ ${place.from + 1}–${place.to}`;
      const is = one && chosen(h)[side] === place.from;
      const row = make("button", {
        class: `row token${one ? "" : " fold"}${is ? " chosen" : ""}`,
        onmouseenter: () => draw(side, i), onmouseleave: () => { tip(); draw(null); },
        onfocus: () => draw(side, i), onblur: () => draw(null),
        onmousemove: (e) => tip(e, strongest(h, words, side, place)),
        onclick: () => {
          if (one) return side ? pick(state.token, place.from) : pick(place.from, state.key);
          state.unfolded.add(place.from); drawPanels();
        },
      }, text);
      return row;
    })));
  area.append(...columns);
  box.append(make("div", { class: "ends" }, make("span", {}, "looks"), make("span", {}, "is looked at")), area);
  draw(null);
}

function strongest(h, words, side, place) { // of a place, in words
  const length = side ? h.T : h.S, sums = [];
  for (let other = 0; other < length; other++) {
    let sum = 0;
    for (let i = place.from; i < place.to; i++) sum += side ? weight(h, other, i) : weight(h, i, other);
    sums.push([sum / (side ? 1 : place.to - place.from), other]);
  }
  sums.sort((a, b) => b[0] - a[0]);
  const name = place.to - place.from === 1 ? `${shown(words[side][place.from])} (${place.from + 1})` : `${place.from + 1}–${place.to}`;
  const top = sums.slice(0, 5).filter(([w]) => w > 0).map(([w, i]) => `${percent(w, h)}  ${shown(words[1 - side][i])} (${i + 1})`);
  return [`${name} ${side ? "is looked at by" : "looks at"}`, ...top].join("\n");
}

function drawMap(box, h, at) {
  const { queries, keys } = data.views[at.view];
  const canvas = make("canvas");
  let top = 1;
  for (const cell of h.cells) if (cell > top) top = cell;
  paint(canvas, h.S, h.T, (t, s) => h.cells[t * h.S + s] / top);
  const labelled = Math.max(h.T, h.S) <= LABELLED;
  const size = labelled ? Math.max(11, Math.min(26, Math.floor(620 / Math.max(h.T, h.S)))) : Math.max(1, Math.floor(640 / Math.max(h.T, h.S)));
  canvas.style.width = h.S * size + "px";
  canvas.style.aspectRatio = `${h.S} / ${h.T}`;
  const side = make("div", { class: "side" }), foot = make("div", { class: "foot" });
  if (labelled) {
    side.append(...queries.map((w) => make("span", { class: "token" }, shown(w))));
    foot.append(...keys.map((w) => make("span", { class: "token" }, shown(w))));
  }
  const place = (event) => {
    const r = canvas.getBoundingClientRect();
    const t = Math.floor((event.clientY - r.top) / r.height * h.T), s = Math.floor((event.clientX - r.left) / r.width * h.S);
    return [Math.max(0, Math.min(t, h.T - 1)), Math.max(0, Math.min(s, h.S - 1))];
  };
  const mark = (t, s) => {
    [...side.children].forEach((e, i) => e.classList.toggle("from", i === t));
    [...foot.children].forEach((e, i) => e.classList.toggle("from", i === s));
  };
  canvas.addEventListener("mousemove", (event) => {
    const [t, s] = place(event);
    mark(t, s);
    tip(event, `${shown(queries[t])} (${t + 1}) → ${shown(keys[s])} (${s + 1})\n${percent(weight(h, t, s), h)}`);
  });
  canvas.addEventListener("mouseleave", () => { tip(); mark(-1, -1); });
  canvas.addEventListener("click", (event) => pick(...place(event)));
  box.append(make("p", { class: "quiet" }, "A row looks at the columns. Colours by the map's largest weight, on a square-root scale."),
    make("div", { class: "map" }, side, canvas, make("span"), foot));
  const cell = canvas.clientWidth / h.S;
  for (const labels of [side, foot]) {
    labels.style.setProperty("--label", Math.min(11, 0.9 * cell) + "px");
    if (cell < 10) labels.replaceChildren(); // too close
  }
}

function drawText(box, h, at) {
  const view = data.views[at.view], self = view.self, incoming = state.incoming;
  const [token, key] = chosen(h), from = incoming ? key : token;
  const words = incoming ? view.queries : view.keys;
  const area = make("div", { class: "text", dir: "auto" });
  const spans = words.map((word, i) => make("button", {
    class: "word token" + (self && i === from ? " chosen" : ""),
    onmousemove: (e) => { const w = of(i); tip(e, `${shown(word)} (${i + 1})\n${percent(w, h)}`); },
    onmouseleave: tip,
    onclick: () => self ? pick(i, i) : incoming ? pick(i, key) : pick(token, i),
  }, /^\s*$/.test(word) ? shown(word) + (word.includes("\n") ? "\n" : "") : legible(word)));
  const of = (i) => incoming ? weight(h, i, from) : weight(h, from, i);
  spans.forEach((span, i) => lay(span, of(i)));
  area.append(...spans);
  const name = shown((incoming ? view.keys : view.queries)[from]);
  const intro = incoming ? `Who looks at “${name}” (${from + 1})` : `What “${name}” (${from + 1}) looks at`;
  box.append(make("p", { class: "quiet" }, `${intro}: the stronger its colour, the more. ${self ? "Click a token to choose it." : ""}`));
  if (!self) box.append(chooser(incoming ? view.keys : view.queries, from, (i) => incoming ? pick(token, i) : pick(i, key)));
  box.append(area);
}

function chooser(words, chosen, then) {
  const options = words.map((w, i) => make("option", { value: i }, `${i + 1}  ${shown(w)}`));
  const list = make("select", { "aria-label": "token", onchange: (e) => then(Number(e.target.value)) }, ...options);
  list.value = chosen;
  return list;
}

function drawProduct(box, h, at) {
  const view = data.views[at.view], [t, s] = chosen(h);
  box.append(make("p", {}, chooser(view.queries, t, (i) => pick(i, s)), " · ", chooser(view.keys, s, (i) => pick(t, i))));
  if (!view.q) {
    box.append(make("p", { class: "quiet" }, view.why_no_product));
    return;
  }
  if (!view.unpacked) {
    view.unpacking ??= unpackVectors(view).then(drawPanels);
    return;
  }
  const [, N, T, S] = view.shape, H = view.width, K = view.key_heads;
  const q = vector(view.q, H, (at.layer * N + at.head) * T + t);
  const k = vector(view.k, H, (at.layer * K + Math.floor(at.head * K / N)) * S + s);
  const products = q.values.map((x, i) => x * k.values[i]);
  const sum = products.reduce((a, b) => a + b, 0);
  // Twice the standard error: a number rounded to a step is off by step / √12.
  const errors = q.values.map((x, i) => Math.hypot(x * k.scale, k.values[i] * q.scale) / Math.sqrt(3));
  const error = Math.hypot(...errors);
  const strip = make("div", { class: "strip" });
  const most = (values) => Math.max(...values.map(Math.abs)) || 1, unit = Math.max(most(q.values), most(k.values));
  const rows = [
    ["q", q.values, unit, () => q.scale / 2], ["k", k.values, unit, () => k.scale / 2],
    ["q × k", products, most(products), (i) => errors[i]],
  ];
  for (const [name, values, top, off] of rows) {
    const canvas = make("canvas", { onmouseleave: tip, onmousemove: (e) => {
      const i = Math.min(H - 1, Math.floor(e.offsetX / canvas.clientWidth * H));
      tip(e, `${name}, component ${i + 1} of ${H}: ${digits(values[i], off(i))}`);
    } });
    signed(canvas, values, top);
    strip.append(make("span", {}, name), canvas);
  }
  box.append(strip, make("p", {}, `q · k = ${digits(sum, error)} ± ${digits(error, error)}; the weight is ${percent(weight(h, t, s), h)}.`),
    make("p", { class: "quiet" }, "Blue above zero, orange below, the fainter the smaller; queries and keys after their rotation and norm, before the scale. "
      + "They are rounded to 1/127 of their largest component; ± is twice the standard error that this makes."));
}

function signed(canvas, values, top) {
  canvas.width = values.length; canvas.height = 1;
  const context = canvas.getContext("2d");
  values.forEach((x, i) => {
    const a = Math.sqrt(Math.abs(x) / top);
    context.fillStyle = x < 0 ? `rgba(213, 94, 0, ${a})` : `rgba(0, 114, 178, ${a})`;
    context.fillRect(i, 0, 1, 1);
  });
}
