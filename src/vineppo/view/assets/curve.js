// The values of the states with their intervals, beside the text. Without values: the advantage of each step as a bar.

/** Draw the curve of the open response. It runs downwards like the text, or to the right on a narrow page. */
function renderCurve() {
  const r = view.response, box = $("curve");
  if (!r || !r.known || !r.steps.length || r.credit === "none" && !r.hasValues) {
    box.replaceChildren();
    box.hidden = true;
    return;
  }
  box.hidden = false;
  const across = matchMedia("(max-width: 760px)").matches;
  const S = r.steps.length, W = Math.max(120, box.clientWidth), limit = Math.max(160, $("response-body").clientHeight - 44);
  const length = across ? W : Math.min(limit, Math.max(180, 34 * (S + 1))), breadth = across ? 110 : W;
  const bars = r.credit === "response" ? "Advantage of the response" : "Token advantages";
  const title = r.hasValues ? (r.monteCarlo ? "V, 95% interval" : "V, predicted") : bars;
  const chart = svg("svg", { width: across ? length : breadth, height: across ? breadth : length, class: "curve", role: "img",
    "aria-label": r.hasValues ? `Value of ${S} states, from ${num(r.steps[0].v)} to the reward ${num(r.reward)}` : r.credit === "response" ? `${bars}, repeated for ${S} steps` : `Sum of the token advantages of ${S} steps` });
  const P = across ? 26 : 14;
  const place = (along, value) => {
    const a = P + (length - P - 14) * along;
    return across ? [a, breadth - 14 - (breadth - 28) * value] : [P + (breadth - 2 * P) * value, a];
  };
  const line = (from, to, name) => svg("line", { x1: from[0], y1: from[1], x2: to[0], y2: to[1], class: name });
  if (r.hasValues) drawValues(r, chart, place, line); else drawBars(r, chart, place, line);
  const count = r.hasValues ? S : S - 1;
  chart.addEventListener("click", (event) => {
    const at = pointer(event, chart, across, P, length);
    const step = r.hasValues ? clamp(Math.floor(at * count) + 1, 1, S) : clamp(Math.round(at * Math.max(1, count)) + 1, 1, S);
    go({ step, token: null }, { scroll: "center" });
  });
  chart.addEventListener("mousemove", (event) => {
    const at = pointer(event, chart, across, P, length);
    const step = r.steps[clamp(Math.round(at * Math.max(1, count)), 0, S - 1)];
    inspect(step.start);
  });
  chart.addEventListener("mouseleave", () => markStep(false));
  box.replaceChildren(el("div", { class: "curve-title" }, title), chart);
}

/** Return the place of the pointer along the curve, 0 at its start and 1 at its end. */
function pointer(event, chart, across, P, length) {
  const box = chart.getBoundingClientRect();
  const at = across ? (event.clientX - box.left) * (length / box.width) : (event.clientY - box.top) * (length / box.height);
  return clamp((at - P) / (length - P - 14), 0, 1);
}

/** Return the label of a value at the start of the curve. */
function tick([x, y], text, across) {
  const node = svg("text", { x: across ? 1 : x, y: across ? y + 3 : y - 4, class: "tick", "text-anchor": across ? "start" : "middle" });
  node.textContent = text;
  return node;
}

const POINTS = 500; // largest number of states or bars that are drawn

/** Return at most about POINTS of the numbers 0 to n - 1: of each stretch the one with the largest weight. */
function thinned(n, weight) {
  const width = Math.ceil(n / POINTS), kept = [];
  for (let start = 0; start < n; start += width) {
    let best = start;
    for (let i = start + 1; i < Math.min(n, start + width); i += 1) if (weight(i) > weight(best)) best = i;
    kept.push(best);
  }
  return kept;
}

function drawValues(r, chart, place, line) {
  const S = r.steps.length, states = r.steps.map((step) => ({ v: step.v, lo: step.lo, hi: step.hi }));
  states.push({ v: r.reward, lo: null, hi: null, reward: true });
  const range = run().range;
  let low = range.low, high = range.high;
  for (const s of states) for (const x of [s.v, s.lo, s.hi]) if (x !== null) { low = Math.min(low, x); high = Math.max(high, x); }
  const at = (i, value) => place(i / S, (value - low) / (high - low || 1));
  for (const [value, name] of [[low, "axis"], [(low + high) / 2, "axis faint"], [high, "axis"]]) {
    chart.append(line(at(0, value), at(S, value), name), tick(at(0, value), num(value, Number.isInteger(value) ? 0 : 1), at(0, low)[0] === at(0, high)[0]));
  }
  const kept = [...new Set([0, ...thinned(S + 1, () => 0), S])], band = kept.map((i) => ({ ...states[i], i })).filter((s) => s.lo !== null);
  if (band.length > 1) {
    const points = [...band.map((s) => at(s.i, s.hi)), ...band.reverse().map((s) => at(s.i, s.lo))];
    chart.append(svg("polygon", { points: points.map((p) => p.join(",")).join(" "), class: "band" }));
  }
  if (S <= 40) for (const s of band) chart.append(line(at(s.i, s.lo), at(s.i, s.hi), "whisker"));
  const change = (i, j) => {
    const a = states[i].v, b = states[j].v;
    if (a === null || b === null) return;
    chart.append(line(at(i, a), at(j, b), "change " + (b > a + 1e-9 ? "up" : b < a - 1e-9 ? "down" : "flat") + (j === state.step && j === i + 1 ? " on" : "")));
  };
  for (let n = 1; n < kept.length; n += 1) change(kept[n - 1], kept[n]);
  if (S >= POINTS && state.step) change(state.step - 1, state.step);
  const points = S > 80 ? [state.step - 1, state.step, S].filter((i) => i >= 0) : states.map((_, i) => i);
  points.forEach((i) => {
    const s = states[i], on = i + 1 === state.step || i === state.step;
    if (s.v === null) return;
    const [cx, cy] = at(i, s.v);
    chart.append(s.reward ? svg("rect", { x: cx - 4, y: cy - 4, width: 8, height: 8, class: "reward-point" }) : svg("circle", { cx, cy, r: on ? 4 : 2.5, class: "state" + (on ? " on" : "") }));
  });
}

function drawBars(r, chart, place, line) {
  const S = r.steps.length, largest = r.steps.reduce((most, step) => Math.max(most, Math.abs(step.a || 0)), 1e-9);
  const at = (i, value) => place(S > 1 ? i / (S - 1) : 0.5, 0.5 + value / (2 * largest));
  chart.append(line(at(0, 0), at(S - 1, 0), "axis"));
  const kept = new Set(thinned(S, (i) => Math.abs(r.steps[i].a || 0)));
  if (state.step) kept.add(state.step - 1);
  kept.forEach((i) => {
    const step = r.steps[i], name = "bar " + ((step.a || 0) > 0 ? "up" : (step.a || 0) < 0 ? "down" : "flat") + (i + 1 === state.step ? " on" : "") + (S > 60 ? " thin" : "");
    chart.append(line(at(i, 0), at(i, step.a || 0), name));
    if (!step.a) {
      const [cx, cy] = at(i, 0);
      chart.append(svg("circle", { cx, cy, r: i + 1 === state.step ? 3.5 : 2, class: "state" + (i + 1 === state.step ? " on" : "") }));
    }
  });
}
