// The details of the chosen step: the subtraction behind its advantage, and the branches of its state.

const CREDIT_NOTES = {
  tokens: "This algorithm computes no credit for steps. The number of a step is the sum of the advantages of its tokens. It is not a change of value, and the numbers of the steps do not add up to the reward.",
  response: "The number is the advantage of the whole response, which is repeated for every step. It does not say which step earned it.",
  none: "This response has no credit, because it was not trained on or has no reward.",
};

const noStep = (r) => [el("p", { class: "empty" }, r.steps.length ? "Choose a step: click it, or press n." : "The response has no step.")];

function paneWhy(r) {
  const step = r.steps[(state.step || 0) - 1];
  if (!step) return noStep(r);
  const parts = [stepTitle(r, step)];
  if (CREDIT_NOTES[r.credit]) parts.push(el("p", { class: "note" }, CREDIT_NOTES[r.credit]));
  if (step.v !== null && step.after !== null && step.after !== undefined) parts.push(subtraction(r, step));
  if (r.credit === "tokens") parts.push(tokenTable(r, step));
  if (r.credit === "values" && r.hasValues && r.reward !== null) parts.push(telescope(r));
  return parts;
}

/** Return the title of a details pane: which step, and its text. */
function stepTitle(r, step) {
  return el("div", { class: "step-title" }, el("h2", {}, `Step ${step.number}`, el("span", { class: "of" }, ` of ${r.steps.length}`)),
    el("div", { class: "excerpt", dir: "auto" }, cut(stepText(r, step).trim(), 400)));
}

function estimate(label, value, step) {
  const facts = step === null ? ["the reward"] : step.k === null ? ["predicted"] : step.k === 0 ? ["known without sampling"] : [`K = ${step.k}`, step.lo === null ? "no interval" : `${num(step.lo)} to ${num(step.hi)}`];
  return el("div", { class: "term" }, el("div", { class: "term-label" }, label), el("div", { class: "term-value" }, num(value, 3)), facts.map((fact) => el("div", { class: "term-fact" }, fact)));
}

function subtraction(r, step) {
  const next = r.steps[step.number] || null, difference = step.after - step.v;
  const recorded = step.a === null ? null : Math.abs(step.a - difference) <= 2e-5 * Math.max(1, Math.abs(difference));
  const operator = (sign) => el("div", { class: "operator", "aria-hidden": "true" }, sign);
  return el("div", {}, el("div", { class: "equation", role: "math", "aria-label": `${num(step.after, 3)} minus ${num(step.v, 3)} is ${num(difference, 3)}` },
    estimate("V after", step.after, next), operator(MINUS), estimate("V before", step.v, step), operator("="),
    el("div", { class: "term result " + shade(difference, Math.max(1e-9, r.scale, Math.abs(difference))) }, el("div", { class: "term-label" }, "change of V"), el("div", { class: "term-value" }, signed(difference, 3)))),
  r.credit === "values" ? el("p", { class: recorded ? "check" : "check differs" }, recorded ? "\u2713 This is the recorded advantage of the step." : `\u2260 The recorded advantage is ${signed(step.a, 3)}, which is not this difference.`) : null,
  trained(r, step));
}

/** Return a sentence if the tokens of a step were trained with something else than the advantage of the step. */
function trained(r, step) {
  if (r.credit !== "values" || step.sum === null) return null;
  const tokens = step.end - step.start, average = step.sum / Math.max(1, tokens);
  if (Math.abs(average - step.a) <= 1e-4 * Math.max(1, Math.abs(step.a))) return null;
  return el("p", { class: "note" }, `Its tokens were trained with ${signed(average, 3)} on average, because the algorithm transforms the step advantages or gives tokens their own.`);
}

function tokenTable(r, step) {
  const rows = [];
  for (let i = step.start; i < step.end; i += 1) if (r.adv[i]) rows.push(i);
  const total = el("p", {}, `Sum of the token advantages: `, el("b", {}, signed(step.a, 3)));
  if (!rows.length) return el("div", {}, total, el("p", { class: "note" }, "The advantages of all its tokens are 0."));
  if (rows.length > 1 && new Set(rows.map((i) => r.adv[i])).size === 1) return el("div", {}, total, el("p", {}, `${rows.length} tokens with ${signed(r.adv[rows[0]], 3)} each.`));
  const largest = rows.sort((a, b) => Math.abs(r.adv[b]) - Math.abs(r.adv[a]) || a - b).slice(0, 12);
  return el("div", {}, total, el("table", {}, el("thead", {}, el("tr", {}, el("th", { scope: "col" }, "Token"), el("th", { scope: "col", class: "r" }, "Probability"), el("th", { scope: "col", class: "r" }, "Advantage"))),
    el("tbody", {}, largest.map((i) => el("tr", {}, el("td", { class: "mono" }, r.exact ? quoted(r.tok[i]) : `token ${i + 1}`), el("td", { class: "r" }, r.logprob ? probability(r.logprob[i]) : "\u2013"), el("td", { class: "r " + shade(r.adv[i], r.scale) }, signed(r.adv[i], 3)))))),
  rows.length > 12 ? el("p", { class: "note" }, `and ${rows.length - 12} more`) : null);
}

/** Return the sum that leads from the value of the prompt to the reward, as a line and as a stair of bars. */
function telescope(r) {
  const start = r.steps[0].v, total = start + sum(r.steps.map((step) => step.a));
  const holds = Math.abs(total - r.reward) <= 1e-4 * Math.max(1, r.steps.length / 10);
  const values = r.steps.map((step) => step.v || 0);
  const low = values.reduce((a, b) => Math.min(a, b), Math.min(0, r.reward)), high = values.reduce((a, b) => Math.max(a, b), Math.max(1, r.reward));
  const W = 360, row = r.steps.length > 40 ? 6 : 15, H = row * (r.steps.length + 2), X = (v) => 34 + ((W - 44) * (v - low)) / (high - low);
  const chart = svg("svg", { viewBox: `0 0 ${W} ${H}`, class: "stairs", role: "img", "aria-label": "From the value of the prompt to the reward, step by step" });
  let at = start;
  const bar = (y, from, to, name) => svg("rect", { x: Math.min(X(from), X(to)), y: y + 2, width: Math.max(1.5, Math.abs(X(to) - X(from))), height: row - 4, class: name });
  const label = (y, text) => (row > 10 ? [Object.assign(svg("text", { x: 28, y: y + row - 4, class: "stair-label" }), { textContent: text })] : []);
  chart.append(bar(0, low, start, "stair whole"), ...label(0, "V\u2080"));
  r.steps.slice(0, 600).forEach((step, i) => {
    const y = row * (i + 1), to = at + (step.a || 0);
    if (step.number === state.step) chart.append(svg("rect", { x: 0, y, width: W, height: row, class: "stair-on" }));
    chart.append(bar(y, at, to, "stair " + (step.a > 0 ? "up" : step.a < 0 ? "down" : "flat")), ...label(y, String(step.number)));
    at = to;
  });
  chart.append(bar(row * (r.steps.length + 1), low, r.reward, "stair whole"), ...label(row * (r.steps.length + 1), "R"));
  chart.addEventListener("click", (event) => {
    const box = chart.getBoundingClientRect(), n = Math.floor((((event.clientY - box.top) / box.height) * H) / row);
    if (n >= 1 && n <= r.steps.length) go({ step: n, token: null }, { scroll: "nearest" });
  });
  return el("div", { class: "telescope" }, el("h3", {}, "All steps"),
    el("p", { class: "sum" }, `V(prompt) ${num(start, 3)} + advantages ${signed(total - start, 3)} = ${num(total, 3)}`),
    el("p", { class: holds ? "check" : "check differs" }, holds ? `\u2713 The step advantages telescope to the reward ${num(r.reward, 3)}.` : `\u2260 The reward is ${num(r.reward, 3)}; the step advantages do not add up to it.`), r.steps.length > 600 ? el("p", { class: "note" }, "The stairs of more than 600 steps are not drawn.") : chart);
}

function paneBranches(r) {
  const step = r.steps[(state.step || 0) - 1];
  if (!step) return noStep(r);
  const inStep = (position) => position >= step.start && (position < step.end || step.number === r.steps.length);
  const own = r.continuations.filter((c) => inStep(c.state));
  const passing = r.continuations.filter((c) => c.state < step.start && c.state + c.shared >= step.start);
  const alternatives = r.alternatives.filter((a) => inStep(a.position));
  const parts = [stepTitle(r, step)];
  if (step.v !== null && step.k !== null) {
    parts.push(el("p", {}, `State before the step: V = ${num(step.v, 3)}, the mean of ${plural(step.k, "Monte-Carlo rollout")}`, step.lo === null ? "." : `, 95% interval ${num(step.lo)} to ${num(step.hi)}.`));
  }
  if (alternatives.length) parts.push(el("h3", {}, "Tokens trained in place of others"), alternativeTable(r, alternatives));
  if (own.length) {
    const range = run().range, right = own.filter((c) => c.reward !== null && c.reward >= range.high).length;
    parts.push(el("h3", {}, `Continuations from ${own.some((c) => c.state !== step.start) ? "this step" : "this state"}`, el("span", { class: "of" }, ` ${right} of ${own.length} right`)),
      el("ol", { class: "branches" }, own.slice(0, 60).map((c) => branch(r, c, step))));
    if (own.length > 60) parts.push(el("p", { class: "note" }, `and ${own.length - 60} more`));
  }
  if (passing.length) {
    parts.push(el("details", { open: !own.length }, el("summary", {}, `${plural(passing.length, "continuation")} of earlier states that pass through this state`),
      el("ol", { class: "branches" }, passing.slice(0, 40).map((c) => branch(r, c, step)))));
  }
  if (!own.length && !passing.length) {
    parts.push(el("p", { class: "empty" }, !r.hasMore ? "The continuations of this iteration were left out to keep the page small; see the foot of the page."
      : r.continuations.length ? "No continuation was sampled in this step."
        : "The run saved no continuations of this response. It saves those of the first rollouts of an iteration (run.save_continuations), if the algorithm samples any."));
  }
  return parts;
}

/** Return a continuation: its reward, where it leaves the response, and its text. */
function branch(r, c, step) {
  const leaves = c.state + c.shared, end = leaves >= r.ids.length;
  const where = end ? "never leaves the response" : `leaves in step ${r.steps.length ? stepAt(r, Math.min(leaves, r.ids.length - 1)) : "\u2013"}, after ${plural(leaves, "token")}`;
  const shared = c.place === null ? "" : r.text.slice(r.char[c.state], r.char[leaves]);
  const draft = c.accepted === null ? null : `, ${c.accepted} from the draft`;
  return el("li", {}, el("div", { class: "branch-head" }, rewardMark(c.reward, run().range),
    el("button", { type: "button", class: "link", onclick: () => go({ step: stepAt(r, Math.min(leaves, r.ids.length - 1)), token: Math.min(leaves, r.ids.length - 1) }, { scroll: "center" }) }, where),
    el("span", { class: "of" }, plural(c.length, "token"), draft, c.finish === "length" ? ", cut off" : null)),
  el("div", { class: "branch-text", dir: "auto" }, shared ? el("span", { class: "shared" }, shared.length > 600 ? "\u2026" + visible(shared.slice(-600)) : visible(shared)) : null,
    end ? null : el("span", { class: "leave", title: where }, "\u25b8"), el("span", {}, cut(c.text, 1500))));
}

/**
 * Return the trained alternatives of a step: one row per place, token and advantage. What a token earned are the rewards
 * of the continuations that leave the response at its place with this token.
 */
function alternativeTable(r, alternatives) {
  const rows = new Map(), range = run().range;
  for (const a of alternatives) {
    const key = JSON.stringify([a.position, a.text, a.advantage]);
    if (!rows.has(key)) rows.set(key, { ...a, times: 0 });
    rows.get(key).times += 1;
  }
  const shown = [...rows.values()].slice(0, 60), earned = rewardsOf(r, alternatives);
  return el("table", {}, el("thead", {}, el("tr", {}, ["In place of", "Token", "Advantage", "Earned"].map((name, i) => el("th", { scope: "col", class: i > 1 ? "r" : "" }, name)))),
    el("tbody", {}, shown.map((a, i) => {
      const before = shown[i - 1], same = before && before.position === a.position && before.text === a.text;
      const times = (n) => (n > 1 ? ` \u00d7 ${n}` : null);
      const rewards = same ? [] : earned.get(placeOf(a)) || [];
      return el("tr", {}, el("td", { class: "mono" }, r.exact && r.tok[a.position] !== undefined ? quoted(r.tok[a.position]) : `token ${a.position + 1}`), el("td", { class: "mono" }, quoted(a.text)),
        el("td", { class: "r " + shade(a.advantage, r.scale) }, signed(a.advantage, 3), times(a.times)),
        el("td", { class: "r" }, same ? null : rewards.length ? rewards.map(([reward, n]) => el("div", {}, rewardMark(reward, range), times(n))) : "\u2013"));
    })));
}

const placeOf = (a) => `${a.position} ${a.text}`;

/** Return a map from the place and the token of each alternative to the [reward, number] of its continuations. */
function rewardsOf(r, alternatives) {
  const counts = new Map();
  for (const c of r.continuations) {
    if (c.place === null && c.shared > 0) continue; // the text after the shared tokens is unknown
    // A token can be the beginning of another one: the longest that fits is the token of the continuation.
    const fitting = alternatives.filter((a) => a.position === c.state + c.shared && (a.text ? c.text.startsWith(a.text) : !c.text));
    if (!fitting.length) continue;
    const best = placeOf(fitting.reduce((x, y) => (y.text.length > x.text.length ? y : x)));
    if (!counts.has(best)) counts.set(best, new Map());
    counts.get(best).set(c.reward, (counts.get(best).get(c.reward) || 0) + 1);
  }
  return new Map([...counts].map(([place, rewards]) => [place, [...rewards].sort((x, y) => y[0] - x[0])]));
}
