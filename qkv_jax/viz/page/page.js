// Tables, and what a person does.

// --- tables ---------------------------------------------------------------------------------------

function drawTables() {
  for (const table of data.tables) {
    const head = make("tr", {}, ...table.columns.map((c) => make("th", {}, c)));
    const rows = table.rows.map((row, i) => {
      const token = table.tokens ? table.tokens[i] : null;
      const open = () => { pick(token, token); state.incoming = false; $("look").scrollIntoView({ block: "start" }); };
      const attributes = token === null ? {} : { class: "opens", tabindex: 0, onclick: open, onkeydown: (e) => { if (e.key === "Enter") open(); } };
      return make("tr", attributes, ...row.map((cell) => make("td", {}, apart(cell))));
    });
    $("tables").append(make("h2", {}, table.title), make("p", { class: "quiet" }, table.note), make("table", {}, head, ...rows));
  }
}

// --- what a person does ---------------------------------------------------------------------------

function pick(token, key) {
  const [, , T, S] = data.views[state.first.view].shape;
  state.token = Math.max(0, Math.min(token, T - 1));
  state.key = Math.max(0, Math.min(key, S - 1));
  state.unfolded.add(state.token - state.token % CHUNK);
  drawPanels();
}

function choose(where) {
  const other = where.view !== state.first.view;
  if (state.second) state.second = where; else state.first = where;
  if (other && !state.second) { drawGrid(); pick(state.token, state.key); }
  draw();
}

function draw() {
  $("chosen").textContent = label(state.first) + (state.second ? ` beside ${label(state.second)}` : "");
  for (const button of $("grid").querySelectorAll("button")) {
    const is = (h) => Boolean(h) && h.view === state.first.view && button.dataset.at === `${h.layer}.${h.head}`;
    button.classList.toggle("first", is(state.first));
    button.classList.toggle("second", is(state.second));
  }
  for (const tab of $("tabs").children) tab.setAttribute("aria-selected", tab.dataset.tab === state.tab);
  $("direction").textContent = state.incoming ? "← who looks at it" : "→ what it looks at";
  $("direction").hidden = state.tab !== "text";
  $("compare").setAttribute("aria-pressed", Boolean(state.second));
  $("view").value = (state.second || state.first).view;
  drawMeasures();
  drawPanels();
}

function move(layers, heads) {
  const at = state.second || state.first, [L, N] = data.views[at.view].shape;
  choose({ view: at.view, layer: (at.layer + layers + L) % L, head: (at.head + heads + N) % N });
}

function compare() {
  state.second = state.second ? null : { ...state.first, head: (state.first.head + 1) % data.views[state.first.view].shape[1] };
  draw();
}

function theme() {
  const root = document.documentElement;
  root.dataset.theme = root.dataset.theme === "dark" ? "light" : "dark";
  drawThumbs();
  drawPanels();
}

const KEYS = {
  ArrowLeft: () => move(0, -1), ArrowRight: () => move(0, 1), ArrowUp: () => move(-1, 0), ArrowDown: () => move(1, 0),
  "[": () => pick(state.token - 1, state.key), "]": () => pick(state.token + 1, state.key),
  d: () => { state.incoming = !state.incoming; draw(); }, c: compare, t: theme,
};
Object.keys(PICTURES).forEach((name, i) => { KEYS[i + 1] = () => { state.tab = name; draw(); }; });

async function start() {
  document.documentElement.dataset.theme = matchMedia("(prefers-color-scheme: dark)").matches ? "dark" : "light";
  $("about").textContent = data.about;
  for (const view of data.views) {
    view.cells = await unpack(view.cells, Uint8Array);
  }
  $("view").append(...data.views.map((v, i) => make("option", { value: i }, v.name)));
  $("choose").hidden = data.views.length < 2;
  $("view").addEventListener("change", (e) => choose({ view: Number(e.target.value), layer: 0, head: 0 }));
  for (const tab of $("tabs").children) tab.addEventListener("click", () => { state.tab = tab.dataset.tab; draw(); });
  $("direction").addEventListener("click", KEYS.d);
  $("compare").addEventListener("click", compare);
  $("theme").addEventListener("click", theme);
  document.addEventListener("keydown", (event) => {
    const typing = /^(SELECT|INPUT)$/.test(event.target.tagName) || event.ctrlKey || event.metaKey || event.altKey;
    if (typing || !KEYS[event.key]) return;
    event.preventDefault();
    KEYS[event.key]();
  });
  const [, , T, S] = data.views[0].shape;
  state.token = T - 1; state.key = Math.max(0, S - 1);
  state.unfolded.add(state.token - state.token % CHUNK);
  drawGrid();
  drawTables();
  draw();
  document.body.dataset.ready = "yes";
}
start();
