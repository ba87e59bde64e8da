// The same problem over the iterations, and two runs compared.

const keyOf = (r, id) => r.c.problem[id] || r.c.preview[id];

function paneProblem(r) {
  const key = keyOf(r.run, r.id), ids = r.run.byProblem.get(key) || [];
  const byIteration = new Map();
  for (const id of ids) {
    if (!byIteration.has(r.run.c.it[id])) byIteration.set(r.run.c.it[id], []);
    byIteration.get(r.run.c.it[id]).push(id);
  }
  const parts = [el("h2", {}, "Problem", el("span", { class: "of" }, ` ${oneLine(key, 44)}`)),
    el("p", {}, `${plural(ids.length, "response")} in ${plural(byIteration.size, "iteration")}. `, el("button", { type: "button", class: "link", onclick: () => go({ queue: "all", problem: key, it: "" }) }, "List them"))];
  if (byIteration.size < 2) parts.push(el("p", { class: "note" }, "The problem was drawn in one iteration only, so there is no curve over the iterations."));
  parts.push(problemTable(r.run, byIteration, r.id));
  return parts;
}

/** Return a table with the rewards of the responses to a problem in each iteration. */
function problemTable(owner, byIteration, current) {
  return el("table", { class: "problem-table" }, el("thead", {}, el("tr", {}, el("th", { scope: "col" }, "Iteration"), el("th", { scope: "col", class: "r" }, "Mean"), el("th", { scope: "col" }, "Responses"))),
    el("tbody", {}, [...byIteration.entries()].slice(0, 300).map(([it, ids]) => el("tr", {}, el("td", {}, String(it)), el("td", { class: "r" }, num(mean(ids.map((id) => owner.c.reward[id]).filter((x) => x !== null)))),
      el("td", {}, ids.slice(0, 64).map((id) => el("button", { type: "button", class: "chip" + (id === current ? " on" : ""), title: `response ${owner.c.number[id]}`, onclick: () => go({ run: owner.index, id, step: null, token: null }) }, rewardMark(owner.c.reward[id], owner.range))))))));
}

async function paneCompare(r) {
  const [a, b] = RUNS, key = keyOf(r.run, r.id), other = RUNS[1 - r.run.index];
  const parts = [el("h2", {}, "Two runs"), el("table", {}, el("thead", {}, el("tr", {}, ["", "Run", "Credit", "Iterations", "Mean reward", "Last"].map((name, i) => el("th", { scope: "col", class: i > 2 ? "r" : "" }, name)))),
    el("tbody", {}, RUNS.map((x, i) => {
      const known = x.c.reward.filter((y) => y !== null), last = x.blocks.length ? x.blocks[x.blocks.length - 1].reward.filter((y) => y !== null) : [];
      return el("tr", {}, el("td", {}, "AB"[i]), el("td", {}, oneLine(x.meta.name, 24)), el("td", {}, x.meta.algorithm), el("td", { class: "r" }, String(x.blocks.length)), el("td", { class: "r" }, num(mean(known))), el("td", { class: "r" }, num(mean(last))));
    })))];
  const ids = other.byProblem.get(key) || [];
  parts.push(el("h3", {}, `This problem in run ${"AB"[other.index]}`));
  if (!ids.length) parts.push(el("p", { class: "empty" }, "The other run did not draw this problem."));
  else {
    const near = [...ids].sort((x, y) => Math.abs(other.c.it[x] - r.it) - Math.abs(other.c.it[y] - r.it) || x - y)[0];
    const twin = await other.response(near);
    const side = (x, owner) => el("div", { class: "side" }, el("div", { class: "side-head" }, el("b", {}, "AB"[owner.index]), rewardMark(owner.c.reward[x.id], owner.range), el("button", { type: "button", class: "link", onclick: () => go({ run: owner.index, id: x.id, step: null, token: null }) }, `${owner.c.it[x.id]}.${owner.c.number[x.id]}`)), small(x));
    parts.push(el("div", { class: "sides" }, side(r, r.run), side(twin, other)));
    if (ids.length > 1) {
      const byIteration = new Map();
      for (const id of ids) byIteration.set(other.c.it[id], [...(byIteration.get(other.c.it[id]) || []), id]);
      parts.push(problemTable(other, byIteration, null));
    }
  }
  const shared = [];
  for (const [problem, mine] of a.byProblem) {
    const theirs = b.byProblem.get(problem);
    if (!theirs) continue;
    const means = [[a, mine], [b, theirs]].map(([x, list]) => mean(list.map((id) => x.c.reward[id]).filter((y) => y !== null)));
    if (means[0] !== null && means[1] !== null) shared.push({ means, id: mine[0], text: a.c.preview[mine[0]], difference: means[1] - means[0] });
  }
  shared.sort((x, y) => Math.abs(y.difference) - Math.abs(x.difference) || x.id - y.id);
  parts.push(el("h3", {}, `Largest differences`, el("span", { class: "of" }, ` ${plural(shared.length, "problem")} in both runs`)));
  if (!shared.length) parts.push(el("p", { class: "empty" }, "The runs have no problem in common. Runs with the same seed and task draw the same problems."));
  else parts.push(el("table", {}, el("thead", {}, el("tr", {}, ["Problem", "A", "B", "B \u2212 A"].map((name, i) => el("th", { scope: "col", class: i ? "r" : "" }, name)))),
    el("tbody", {}, shared.slice(0, 40).map((x) => el("tr", {}, el("td", {}, el("button", { type: "button", class: "link mono", onclick: () => go({ run: 0, id: x.id, step: null, token: null }) }, oneLine(x.text, 34) || "(empty)")), el("td", { class: "r" }, num(x.means[0])), el("td", { class: "r" }, num(x.means[1])), el("td", { class: "r " + shade(x.difference, 1) }, signed(x.difference)))))));
  return parts;
}

/** Return the text of a response in small print, coloured by step. */
function small(x) {
  if (!x.known) return el("p", { class: "empty" }, "left out");
  return el("div", { class: "small-text mono", dir: "auto" }, x.steps.slice(0, 200).map((step) => el("span", { class: shade(perToken(x, step), x.scale) }, cut(stepText(x, step), 800))));
}
