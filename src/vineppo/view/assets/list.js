// The list of responses: queues, filters, search, and rows that exist only while they are visible.

const ROW = 48; // height of a row in CSS pixels, as in style.css
const QUEUES = {
  all: ["All", "all responses, in the order of the run"],
  drops: ["Drops", "the most negative step first"],
  lucky: ["Lucky", "right, although the value of a state was low after it had been higher: right in spite of a wrong step"],
  truncated: ["Truncated", "cut off by the length limit"],
  disagree: ["Disagree", "the trained credit of a step and the Monte-Carlo values differ in sign or rank"],
};
const list = { entries: [], position: -1, hits: null, searching: 0 };

const run = () => RUNS[state.run];

/** Show which queues and filters there are, with the number of responses of each queue. */
function renderFilters() {
  const r = run();
  $("queues").replaceChildren(...Object.entries(QUEUES).map(([name, [label, title]]) => el("button", {
    type: "button", title, "aria-pressed": String(state.queue === name), "data-queue": name,
    onclick: () => go({ queue: name }),
  }, label, " ", el("span", { class: "count" }, whole(name === "all" ? r.size : r.queues[name].length)))));
  const choice = (id, key, options) => {
    const select = $(id);
    select.replaceChildren(...options.map(([value, text]) => el("option", { value, selected: String(state[key]) === value }, text)));
    select.onchange = () => go({ [key]: select.value });
  };
  choice("filter-iteration", "it", [["", "all"], ...r.iterations.map((i) => [String(i), String(i)])]);
  choice("filter-reward", "reward", [["", "any"], ["right", "highest"], ["wrong", "lowest"], ["part", "between"], ["none", "none"]]);
  const finishes = [...new Set(r.c.finish.filter((f) => f !== null))].sort();
  choice("filter-finish", "finish", [["", "any"], ...finishes.map((f) => [f, f === "length" ? "cut off" : f === "stop" ? "by itself" : oneLine(f, 20)])]);
  if ($("search") !== document.activeElement) $("search").value = state.q;
}

/** Return whether a response passes the filters. */
function passes(id) {
  const r = run(), c = r.c;
  if (state.it && String(c.it[id]) !== state.it) return false;
  if (state.finish && c.finish[id] !== state.finish) return false;
  if (state.reward) {
    const x = c.reward[id];
    const kind = x === null ? "none" : x >= r.range.high ? "right" : x <= r.range.low ? "wrong" : "part";
    if (kind !== state.reward) return false;
  }
  if (state.problem && (c.problem[id] || c.preview[id]) !== state.problem) return false;
  return !list.hits || list.hits.has(id);
}

/** Make the list of the chosen queue, filters and search. */
function updateList() {
  const r = run();
  const entries = state.queue === "all" ? Array.from({ length: r.size }, (_, id) => ({ id, step: null, reason: "" })) : r.queues[state.queue];
  list.entries = entries.filter((entry) => passes(entry.id));
  list.position = list.entries.findIndex((e) => e.id === state.id && (e.step === null || state.queue === "all" || e.step === state.step));
  if (list.position < 0) list.position = list.entries.findIndex((e) => e.id === state.id);
  $("list-space").style.height = list.entries.length * ROW + "px";
  const status = list.entries.length === entries.length ? plural(entries.length, "response") : `${whole(list.entries.length)} of ${plural(entries.length, "response")}`;
  const filter = state.problem ? " to one problem" : "";
  $("list-status").replaceChildren(status + filter, ...(list.searching ? [`, searched ${list.searching}\u202f%`] : []),
    ...(filtered() ? [" ", el("button", { type: "button", class: "link", onclick: () => go({ it: "", reward: "", finish: "", problem: "", q: "" }) }, "clear filters")] : []));
  renderRows();
}

const filtered = () => Boolean(state.it || state.reward || state.finish || state.problem || state.q);

/** Draw the rows that are visible, and a few above and below them. */
function renderRows() {
  const box = $("list"), rows = $("list-rows");
  const first = Math.max(0, Math.floor(box.scrollTop / ROW) - 4);
  const last = Math.min(list.entries.length, first + Math.ceil((box.clientHeight || 600) / ROW) + 10);
  rows.style.transform = `translateY(${first * ROW}px)`;
  const made = [];
  for (let i = first; i < last; i += 1) made.push(rowOf(i));
  if (!list.entries.length) made.push(el("p", { class: "empty" }, emptyText()));
  rows.replaceChildren(...made);
  const current = list.position >= first && list.position < last ? "row-" + list.position : "";
  if (current) box.setAttribute("aria-activedescendant", current); else box.removeAttribute("aria-activedescendant");
}

function emptyText() {
  if (list.searching) return "Searching\u2026";
  if (filtered()) return "No response passes the filters.";
  if (state.queue === "disagree" && !run().c.steps.length) return "No response.";
  if (state.queue === "disagree") return "None. The trained credit agrees with the values, or the run has not both.";
  return "None in this run.";
}

function rowOf(i) {
  const { id, step, reason } = list.entries[i], r = run(), c = r.c;
  const selected = i === list.position;
  const lowest = c.lowest[id];
  const below = reason || `${plural(c.steps[id], "step")}${c.tokens[id] ? ", " + plural(c.tokens[id], "token") : ""}${c.finish[id] === "length" ? ", cut off" : ""}`;
  return el("div", {
    class: "row" + (selected ? " selected" : ""), role: "option", id: "row-" + i, "aria-selected": String(selected),
    "aria-setsize": String(list.entries.length), "aria-posinset": String(i + 1),
    onclick: () => open(i),
  },
  el("span", { class: "row-id" }, `${c.it[id]}.${c.number[id]}`),
  el("span", { class: "row-text" }, oneLine(c.preview[id], 70) || "(empty prompt)"),
  rewardMark(c.reward[id], r.range),
  el("span", { class: "row-more" }, c.kind[id] === "rollout" ? null : "training sample; ", step ? `step ${step}: ` : null, oneLine(below, 90)),
  el("span", { class: "row-low " + shade(lowest, r.lowScale), title: "lowest step advantage" }, lowest ? signed(lowest) : ""));
}

/** Open an entry of the list. */
function open(i, view = "response") {
  if (i < 0 || i >= list.entries.length) return;
  const { id, step } = list.entries[i];
  list.position = i;
  go({ id, step: state.queue === "all" ? null : step, token: null, view });
  reveal();
}

/** Scroll the list so that the open response is visible. */
function reveal() {
  const box = $("list"), top = list.position * ROW;
  if (list.position < 0) return;
  const below = top + ROW - box.scrollTop - box.clientHeight, above = box.scrollTop - top;
  if (Math.max(above, below) > 2 * ROW) box.scrollTop = top - box.clientHeight / 2 + ROW;
  else if (above > 0) box.scrollTop = top;
  else if (below > 0) box.scrollTop += below;
  renderRows();
}

/** Search the prompts and the texts of all iterations, one after the other, so that the page stays usable. */
async function search(query) {
  const r = run(), needle = query.trim().toLowerCase(), mine = (search.count = (search.count || 0) + 1);
  list.searching = 0;
  if (!needle) {
    list.hits = null;
    return updateList();
  }
  const hits = (list.hits = new Set());
  for (let id = 0; id < r.size; id += 1) if (r.c.problem[id].toLowerCase() === needle) hits.add(id);
  let painted = performance.now();
  for (const [n, block] of r.blocks.entries()) {
    // Read without `part`, so that a search does not displace what is open.
    const core = await readPart(`${r.index}/${block.iteration}/core`).catch(() => null);
    if (mine !== search.count || r !== run()) return undefined;
    const base = r.first.get(block.iteration);
    if (core) {
      core.responses.forEach((entry, i) => {
        const text = core.problems[entry.p][1] + "\n" + entry.t.map((t) => core.texts[t]).join("");
        if (text.toLowerCase().includes(needle)) hits.add(base + i);
      });
    } else {
      for (let i = 0; i < block.count; i += 1) if (r.c.preview[base + i].toLowerCase().includes(needle)) hits.add(base + i);
    }
    list.searching = Math.round((100 * (n + 1)) / r.blocks.length);
    if (performance.now() - painted > 120) {
      updateList();
      await new Promise((resolve) => setTimeout(resolve));
      painted = performance.now();
    }
  }
  list.searching = 0;
  return updateList();
}

/** Draw the mean reward of each iteration; a click chooses the iteration. */
function renderOverview() {
  const W = 280, H = 56, P = 6;
  const series = RUNS.map((r) => r.blocks.map((b) => {
    const known = b.reward.filter((x, i) => x !== null && (b.kind[i] || "rollout") === "rollout");
    return [b.iteration, mean(known)];
  }).filter(([, y]) => y !== null));
  const all = series.flat();
  if (!all.length) return $("overview").replaceChildren();
  const xs = all.map(([x]) => x), low = Math.min(0, ...RUNS.map((r) => r.range.low)), high = Math.max(...RUNS.map((r) => r.range.high));
  const x0 = Math.min(...xs), x1 = Math.max(...xs);
  const X = (x) => P + ((W - 2 * P) * (x - x0)) / Math.max(1, x1 - x0);
  const Y = (y) => H - P - ((H - 2 * P) * (y - low)) / (high - low || 1);
  const chart = svg("svg", { viewBox: `0 0 ${W} ${H}`, class: "overview", role: "img", "aria-label": `Mean reward from iteration ${x0} to ${x1}` });
  chart.append(svg("line", { x1: P, x2: W - P, y1: Y(low), y2: Y(low), class: "axis" }));
  if (state.it) chart.append(svg("line", { x1: X(Number(state.it)), x2: X(Number(state.it)), y1: P, y2: H - P, class: "cursor" }));
  series.forEach((points, i) => {
    chart.append(svg("polyline", { points: points.map(([x, y]) => `${X(x)},${Y(y)}`).join(" "), class: "series run" + i }));
    if (points.length < 40) for (const [x, y] of points) chart.append(svg("circle", { cx: X(x), cy: Y(y), r: 2, class: "series-dot run" + i }));
  });
  chart.addEventListener("click", (event) => {
    const box = chart.getBoundingClientRect();
    const x = x0 + ((((event.clientX - box.left) / box.width) * W - P) / (W - 2 * P)) * (x1 - x0);
    const near = run().iterations.reduce((a, b) => (Math.abs(b - x) < Math.abs(a - x) ? b : a));
    go({ it: state.it === String(near) ? "" : String(near) });
  });
  const last = series.map((points) => (points.length ? num(points[points.length - 1][1]) : "\u2013"));
  $("overview").replaceChildren(el("div", { class: "overview-head" }, el("span", {}, "Mean reward"),
    ...last.map((text, i) => el("span", { class: "key run" + i }, RUNS.length > 1 ? `${"AB"[i]} ${text}` : text))), chart);
  return undefined;
}
