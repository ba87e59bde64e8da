// The state of the page, its address, the keyboard, the colour scheme, and following a run.

const state = { run: 0, id: null, step: null, token: null, tab: "why", queue: "all", it: "", reward: "", finish: "", problem: "", q: "", view: "response" };
const TABS = { why: ["Why", paneWhy], branches: ["Branches", paneBranches], group: ["Group", paneGroup], credits: ["Credits", paneCredits], problem: ["Problem", paneProblem] };
if (RUNS.length > 1) TABS.compare = ["Compare", paneCompare];
const VIEWS = { browse: "List", response: "Response", detail: "Details" };
const KEYS = [
  ["j / k", "next / previous response of the list"], ["n / p", "next / previous step"], ["\u2190 \u2192 \u2191 \u2193", "in the text: next token, next step"],
  ["1 \u2026 " + Object.keys(TABS).length, "the tabs: " + Object.values(TABS).map(([label]) => label).join(", ")],
  ["a d l t g", "the lists: all, drops, lucky, truncated, disagree"], ["[ / ]", "previous / next iteration; at the ends, all"],
  ["/", "search"], ["Enter", "in the list: open the response and go to its text"], ...(RUNS.length > 1 ? [["b", "the other run"]] : []),
  ["c", "colour scheme: as the system, light, dark"], ["?", "this help"], ["Esc", "close; leave the search"],
];
let writing = false, drawn = 0;

/** Change the state, write it to the address, and draw what depends on it. */
function go(changes, { scroll = "auto", replace = false } = {}) {
  const before = { ...state };
  Object.assign(state, changes);
  if (changes.run !== undefined && changes.run !== before.run) {
    Object.assign(state, { it: "", problem: "", finish: "", q: "" });
    if (changes.id === undefined) state.id = RUNS[state.run].size ? 0 : null;
    if (changes.id === undefined) Object.assign(state, { step: null, token: null });
  }
  writeAddress(replace || !(changes.id !== undefined && changes.id !== before.id));
  draw(before, scroll);
}

function draw(before, scroll) {
  const changed = (...names) => before === null || names.some((name) => state[name] !== before[name]);
  document.body.dataset.view = state.view;
  if (changed("run", "queue", "it", "reward", "finish")) renderFilters();
  if (changed("run", "it")) { renderOverview(); renderTop(); }
  if (changed("run", "q")) search(state.q);
  if (changed("run", "queue", "it", "reward", "finish", "problem", "q")) {
    updateList();
    if (changed("queue", "it", "reward", "finish", "problem")) $("list").scrollTop = 0;
    if (state.id === null || before !== null && changed("queue") && list.position < 0 && list.entries.length) return open(0, state.view);
    reveal();
  }
  renderViews();
  if (changed("run", "id")) return show();
  if (changed("step", "token")) {
    markStep(scroll === "auto");
    if (scroll !== "auto" && view.rows[state.step]) view.rows[state.step].scrollIntoView({ block: scroll });
    if (state.step !== before.step) renderCurve();
  }
  if (changed("tab", "step")) renderPanel();
  return undefined;
}

/** Read the open response and show it. */
async function show() {
  const mine = (drawn += 1), owner = run();
  list.position = list.entries.findIndex((e) => e.id === state.id && (state.step === null || e.step === null || e.step === state.step));
  if (list.position < 0) list.position = list.entries.findIndex((e) => e.id === state.id);
  reveal();
  if (state.id === null || state.id >= owner.size) return;
  const r = await owner.response(state.id);
  if (mine !== drawn) return;
  if (r.known && (state.step === null || state.step > r.steps.length)) state.step = tellingStep(r);
  writeAddress(true);
  renderText(r);
  renderCurve();
  markStep(true);
  renderTabs();
  renderPanel();
  document.body.dataset.ready = `${state.run}.${state.id}`;
}

/** Return the step to show first: the one with the lowest advantage, or the highest one if none is below 0. */
function tellingStep(r) {
  let low = null, high = null;
  for (const step of r.steps) {
    if (step.a === null) continue;
    if (low === null || step.a < low.a) low = step;
    if (high === null || step.a > high.a) high = step;
  }
  const found = low && low.a < 0 ? low : high;
  return found ? found.number : r.steps.length ? 1 : null;
}

function renderTop() {
  const r = run(), c = r.meta;
  $("run-name").textContent = visible(c.name);
  $("run-facts").textContent = [c.algorithm, c.recipe && `recipe ${c.recipe}`, plural(r.blocks.length, "iteration"), plural(r.size, "response")].filter(Boolean).map(visible).join(" \u00b7 ");
  $("run-switch").hidden = RUNS.length < 2;
  $("run-switch").replaceChildren(...RUNS.map((x, i) => el("button", { type: "button", "aria-pressed": String(i === state.run), title: visible(x.meta.name), onclick: () => go({ run: i }) }, `Run ${"AB"[i]}`)));
}

function renderViews() {
  $("views").replaceChildren(...Object.entries(VIEWS).map(([name, label]) => el("button", { type: "button", "aria-pressed": String(state.view === name), onclick: () => { go({ view: name }); reveal(); renderRows(); renderCurve(); } }, label)));
}

function renderTabs() {
  $("tabs").replaceChildren(...Object.entries(TABS).map(([name, [label]], i) => el("button", {
    type: "button", role: "tab", id: "tab-" + name, "aria-selected": String(state.tab === name), "aria-controls": "panel", tabIndex: state.tab === name ? 0 : -1, title: `key ${i + 1}`,
    onclick: () => go({ tab: name }),
  }, label)));
  $("panel").setAttribute("aria-labelledby", "tab-" + state.tab);
}

async function renderPanel() {
  const r = view.response, panel = $("panel"), mine = (renderPanel.count = (renderPanel.count || 0) + 1);
  if (!r) return;
  renderTabs();
  const needsText = state.tab !== "problem";
  const parts = !r.known && needsText ? [el("p", { class: "empty" }, "The details of this response were left out to keep the page small.")] : await TABS[state.tab][1](r);
  if (mine !== renderPanel.count) return;
  const top = panel.dataset.tab === state.tab ? panel.scrollTop : 0;
  panel.replaceChildren(...parts.filter(Boolean));
  panel.dataset.tab = state.tab;
  panel.scrollTop = top;
}

/** Write the state to the fragment of the address, so that a link keeps the place. */
function writeAddress(replace) {
  const r = run(), parts = new URLSearchParams();
  if (state.run) parts.set("run", "b");
  if (state.id !== null && r.c.it[state.id] !== undefined) parts.set("r", `${r.c.it[state.id]}.${r.c.number[state.id]}`);
  for (const name of ["step", "token"]) if (state[name] !== null) parts.set(name, state[name]);
  if (state.tab !== "why") parts.set("tab", state.tab);
  if (state.queue !== "all") parts.set("queue", state.queue);
  for (const name of ["it", "reward", "finish", "problem", "q"]) if (state[name]) parts.set(name, state[name]);
  const text = "#" + parts.toString();
  if (text === location.hash) return;
  writing = true;
  try {
    if (replace) history.replaceState(null, "", text); else history.pushState(null, "", text);
  } catch {
    // Some browsers limit how often the address may change; the page works without it.
  }
  writing = false;
}

/** Return the state that the address names. What it does not name, or names wrongly, has its default. */
function readAddress() {
  const parts = new URLSearchParams(location.hash.slice(1)), found = { run: 0, id: null, step: null, token: null, tab: "why", queue: "all", it: "", reward: "", finish: "", problem: "", q: "" };
  if (parts.get("run") === "b" && RUNS.length > 1) found.run = 1;
  const place = /^(\d+)\.(\d+)$/.exec(parts.get("r") || "");
  if (place) found.id = RUNS[found.run].idOf(Number(place[1]), Number(place[2]));
  for (const name of ["step", "token"]) if (/^\d{1,9}$/.test(parts.get(name) || "")) found[name] = Number(parts.get(name));
  if (Object.hasOwn(TABS, parts.get("tab"))) found.tab = parts.get("tab");
  if (Object.hasOwn(QUEUES, parts.get("queue"))) found.queue = parts.get("queue");
  for (const name of ["it", "reward", "finish", "problem", "q"]) found[name] = parts.get(name) || "";
  if (found.step === 0) found.step = null;
  return found;
}

function moveIteration(by) {
  const all = ["", ...run().iterations.map(String)];
  go({ it: all[(all.indexOf(state.it) + by + all.length) % all.length] });
}

function setTheme(theme) {
  document.documentElement.dataset.theme = theme;
  $("theme").textContent = { auto: "Colours: system", light: "Colours: light", dark: "Colours: dark" }[theme];
  try { localStorage.setItem("vineppo-theme", theme); } catch { /* a page opened as a file may have no storage */ }
}

function nextTheme() {
  const order = ["auto", "light", "dark"];
  setTheme(order[(order.indexOf(document.documentElement.dataset.theme) + 1) % 3]);
}

function renderHelp() {
  const close = () => $("help").close();
  $("help").replaceChildren(el("h2", { id: "help-title" }, "Keys"), el("dl", { class: "keys" }, KEYS.map(([keys, text]) => [el("dt", {}, keys.split(" ").map((key) => (key === "/" && keys.length > 1 || key === "\u2026" ? ` ${key} ` : el("kbd", {}, key)))), el("dd", {}, text)])),
    el("h2", {}, "Colours"), el("p", {}, "Blue is an advantage above 0, orange one below 0, which is also underlined. The scale ends at the largest advantage of the response."),
    el("h2", {}, "Lists"), el("dl", { class: "keys" }, Object.values(QUEUES).map(([label, text]) => [el("dt", {}, label), el("dd", {}, text)])),
    el("p", {}, el("button", { type: "button", onclick: close }, "Close")));
}

function onKey(event) {
  if (event.ctrlKey || event.metaKey || event.altKey) return;
  const field = event.target.closest("input, select, textarea");
  if (event.key === "Escape" && field) { field.blur(); $("list").focus(); return; }
  if (field || $("help").open) return;
  const n = Number(event.key), tabs = Object.keys(TABS);
  const keys = {
    j: () => open(list.position + 1, state.view), k: () => open(list.position - 1, state.view), n: () => moveStep(1), p: () => moveStep(-1),
    "[": () => moveIteration(-1), "]": () => moveIteration(1), c: nextTheme, "?": () => $("help").showModal(),
    "/": () => { go({ view: "browse" }); $("search").focus(); $("search").select(); },
    a: () => go({ queue: "all" }), d: () => go({ queue: "drops" }), l: () => go({ queue: "lucky" }), t: () => go({ queue: "truncated" }), g: () => go({ queue: "disagree" }),
    b: () => RUNS.length > 1 && go({ run: 1 - state.run }),
  };
  const action = keys[event.key] || (n >= 1 && n <= tabs.length ? () => go({ tab: tabs[n - 1] }) : null);
  if (!action) return;
  event.preventDefault();
  action();
}

function listen() {
  document.addEventListener("keydown", onKey);
  $("list").addEventListener("scroll", renderRows, { passive: true });
  $("list").addEventListener("keydown", (event) => {
    const page = Math.max(1, Math.floor($("list").clientHeight / ROW) - 1);
    const moves = { ArrowDown: 1, ArrowUp: -1, PageDown: page, PageUp: -page, Home: -1e9, End: 1e9 };
    if (event.key in moves) {
      event.preventDefault();
      open(clamp(list.position + moves[event.key], 0, list.entries.length - 1), state.view);
    } else if (event.key === "Enter") {
      event.preventDefault();
      go({ view: "response" });
      $("text").focus();
    }
  });
  $("tabs").addEventListener("keydown", (event) => {
    const tabs = Object.keys(TABS), by = { ArrowRight: 1, ArrowLeft: -1 }[event.key];
    if (!by) return;
    event.preventDefault();
    const name = tabs[(tabs.indexOf(state.tab) + by + tabs.length) % tabs.length];
    go({ tab: name });
    renderTabs();
    $("tab-" + name).focus();
  });
  $("search").addEventListener("input", debounced(() => go({ q: $("search").value.trim() }), 200));
  $("search").addEventListener("keydown", (event) => { if (event.key === "Enter") { go({ q: $("search").value.trim() }); $("list").focus(); } });
  $("skip").addEventListener("click", (event) => { event.preventDefault(); go({ view: "response" }); $("text").focus(); });
  $("theme").addEventListener("click", nextTheme);
  $("help-button").addEventListener("click", () => $("help").showModal());
  addEventListener("popstate", () => {
    if (writing) return;
    const before = { ...state };
    Object.assign(state, readAddress());
    draw(before, "auto");
  });
  new ResizeObserver(debounced(() => { renderRows(); renderCurve(); }, 60)).observe($("main"));
  listenText();
}

/** Ask the server every few seconds what is new, and load it. */
async function follow() {
  $("live").hidden = false;
  let stamps = META.runs.map((meta) => JSON.stringify(meta.stamps));
  const told = (text, lost) => { $("live-text").textContent = text; $("live").classList.toggle("lost", Boolean(lost)); };
  const say = (metas) => told(metas.every((m) => m.finished) ? "finished" : `following, iteration ${Math.max(...metas.map((m) => Math.max(0, ...m.iterations)))}`);
  say(META.runs);
  for (;;) {
    await new Promise((resolve) => setTimeout(resolve, 2000));
    try {
      const answer = await fetch("/meta", { cache: "no-store" });
      if (!answer.ok) throw new Error("no answer");
      const meta = await answer.json(), now = meta.runs.map((m) => JSON.stringify(m.stamps));
      for (const [i, r] of RUNS.entries()) {
        if (now[i] === stamps[i]) continue;
        const place = i === state.run && state.id !== null ? [r.c.it[state.id], r.c.number[state.id]] : null;
        const stamp = () => (place ? r.meta.stamps[r.meta.iterations.indexOf(place[0])] : 0), before = stamp();
        r.meta = meta.runs[i];
        r.parts.clear();
        await r.load();
        if (i !== state.run) continue;
        if (place) state.id = r.idOf(...place);
        if (state.id === null && r.size) state.id = 0;
        if (state.q) search(state.q);
        renderFilters(); renderOverview(); renderTop(); updateList();
        if (!place || state.id === null || stamp() !== before) show(); // also if the run repeated the iteration after a resume
      }
      stamps = now;
      say(meta.runs);
    } catch {
      told("no connection", true);
    }
  }
}

async function start() {
  let theme = "auto";
  try { theme = localStorage.getItem("vineppo-theme") || "auto"; } catch { /* no storage */ }
  setTheme(["auto", "light", "dark"].includes(theme) ? theme : "auto");
  if (!("DecompressionStream" in window)) {
    $("main").replaceChildren(el("p", { class: "message" }, "This browser is too old for the page. It needs Chrome 108, Firefox 113 or Safari 16.4, or newer."));
    return;
  }
  renderHelp();
  await Promise.all(RUNS.map((r) => r.load()));
  if (META.left_out.length) {
    $("left-out").hidden = false;
    $("left-out").replaceChildren(el("details", {}, el("summary", {}, "Left out of this page"), el("ul", {}, META.left_out.map((text) => el("li", {}, visible(text)))), el("p", {}, "The lists are complete. `vineppo view --max_mb` allows a larger page, and --serve leaves nothing out.")));
  }
  listen();
  Object.assign(state, readAddress());
  const asked = state.id !== null;
  if (!asked && run().size) {
    const best = run().queues.drops[0];
    Object.assign(state, { id: best ? best.id : 0, step: best ? best.step : null });
  }
  draw(null, "auto");
  if (META.live) follow();
}

start();
