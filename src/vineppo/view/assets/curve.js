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
  const title = r.hasValues ? (r.monteCarlo ? "V, 95% interval" : "V, predicted") : "Token advantages";
  const chart = svg("svg", { width: across ? length : breadth, height: across ? breadth : length, class: "curve", role: "img",
    "aria-label": r.hasValues ? `Value of ${S} states, from ${num(r.steps[0].v)} to the reward ${num(r.reward)}` : `Sum of the token advantages of ${S} steps` });
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
  const band = states.map((s, i) => ({ ...s, i })).filter((s) => s.lo !== null);
  if (band.length > 1) {
    const points = [...band.map((s) => at(s.i, s.hi)), ...band.reverse().map((s) => at(s.i, s.lo))];
    chart.append(svg("polygon", { points: points.map((p) => p.join(",")).join(" "), class: "band" }));
  }
  if (S <= 40) for (const s of band) chart.append(line(at(s.i, s.lo), at(s.i, s.hi), "whisker"));
  for (let i = 0; i < S; i += 1) {
    const a = states[i], b = states[i + 1];
    if (a.v === null || b.v === null) continue;
    const on = i + 1 === state.step;
    chart.append(line(at(i, a.v), at(i + 1, b.v), "change " + (b.v > a.v + 1e-9 ? "up" : b.v < a.v - 1e-9 ? "down" : "flat") + (on ? " on" : "")));
  }
  states.forEach((s, i) => {
    const on = i + 1 === state.step || i === state.step;
    if (s.v === null || (S > 80 && !on && !s.reward)) return;
    const [cx, cy] = at(i, s.v);
    chart.append(s.reward ? svg("rect", { x: cx - 4, y: cy - 4, width: 8, height: 8, class: "reward-point" }) : svg("circle", { cx, cy, r: on ? 4 : 2.5, class: "state" + (on ? " on" : "") }));
  });
}

function drawBars(r, chart, place, line) {
  const S = r.steps.length, largest = Math.max(1e-9, ...r.steps.map((step) => Math.abs(step.a || 0)));
  const at = (i, value) => place(S > 1 ? i / (S - 1) : 0.5, 0.5 + value / (2 * largest));
  chart.append(line(at(0, 0), at(S - 1, 0), "axis"));
  r.steps.forEach((step, i) => {
    const name = "bar " + ((step.a || 0) > 0 ? "up" : (step.a || 0) < 0 ? "down" : "flat") + (i + 1 === state.step ? " on" : "") + (S > 60 ? " thin" : "");
    chart.append(line(at(i, 0), at(i, step.a || 0), name));
    if (!step.a) {
      const [cx, cy] = at(i, 0);
      chart.append(svg("circle", { cx, cy, r: i + 1 === state.step ? 3.5 : 2, class: "state" + (i + 1 === state.step ? " on" : "") }));
    }
  });
}
