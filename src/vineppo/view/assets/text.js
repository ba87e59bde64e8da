// The response: its text coloured by advantage, and what is known about the token under the pointer or the focus.

const PAGE_TOKENS = 3000, PAGE_CHARACTERS = 40000, TOKEN_CHARACTERS = 8000;
const view = { response: null, first: 0, shown: 0, spans: new Map(), rows: [], hover: null };

/** Return a text cut to `length` characters, with the number of characters that are missing. */
function cut(text, length) {
  return text.length <= length ? visible(text) : `${visible(text.slice(0, length))} \u27e6${whole(text.length - length)} more characters\u27e7`;
}

function renderHead(r) {
  const c = run().c, id = r.id;
  const facts = [
    el("span", {}, `Iteration ${c.it[id]}, response ${c.number[id]}`),
    el("span", {}, plural(c.steps[id], "step")), c.tokens[id] ? el("span", {}, plural(c.tokens[id], "token")) : null,
    c.finish[id] === null || c.finish[id] === "stop" ? null : el("span", { class: "warn" }, c.finish[id] === "length" ? "cut off by the length limit" : `ended: ${oneLine(c.finish[id], 24)}`),
    c.kind[id] === "rollout" ? null : el("span", {}, "training sample, no rollout of its own"),
  ];
  const head = [el("div", { class: "head-line" }, rewardMark(c.reward[id], run().range), el("div", { class: "facts" }, facts),
    el("div", { class: "spacer" }),
    el("button", { type: "button", class: "quiet", title: "previous response (k)", "aria-label": "Previous response", onclick: () => open(list.position - 1) }, "\u2191"),
    el("button", { type: "button", class: "quiet", title: "next response (j)", "aria-label": "Next response", onclick: () => open(list.position + 1) }, "\u2193"))];
  if (r.known) {
    const long = r.prompt.length > 280 || r.prompt.split("\n").length > 4;
    const body = el("div", { class: "prompt-text", dir: "auto" }, cut(r.prompt.trim(), 20000));
    head.push(el("div", { class: "prompt" }, el("span", { class: "label" }, "Prompt"),
      long ? el("details", {}, el("summary", {}, oneLine(r.prompt, 160)), body) : body,
      r.answer ? [el("span", { class: "label" }, "Answer"), el("div", { class: "prompt-text", dir: "auto" }, cut(r.answer, 2000))] : null));
  }
  $("response-head").replaceChildren(...head);
}

/** Show a response. Only the first tokens of a long one are put on the page; a button adds the next ones. */
function renderText(r) {
  view.response = r;
  view.first = view.shown = 0;
  view.spans = new Map();
  view.rows = [];
  renderHead(r);
  const box = $("text");
  if (!r.known) {
    box.replaceChildren(el("p", { class: "empty" }, "The text of this response was left out to keep the page small; see the foot of the page. The list shows what is known."));
    return;
  }
  if (!r.ids.length) {
    box.replaceChildren(el("p", { class: "empty" }, "The response is empty."));
    return;
  }
  box.replaceChildren(legend(r), el("div", { class: "columns", "aria-hidden": "true" }, el("span", {}, "Step"), el("span", {}, r.hasValues ? "V" : ""), el("span", {}, { tokens: "Sum", values: "Adv.", response: "Adv.", none: "" }[r.credit])), el("div", { id: "steps" }));
  showMore(0);
  box.scrollTop = 0;
}

/** Return the legend of the colours. */
function legend(r) {
  if (r.credit === "none" || !r.scale) {
    return el("div", { class: "legend" }, r.credit === "none" ? "This response has no credit, because it was not trained on or has no reward." : "All advantages of this response are 0.");
  }
  const swatch = (name) => el("span", { class: "swatch " + name });
  return el("div", { class: "legend" }, `${MINUS}${num(r.scale)} `, ["n5", "n4", "n3", "n2", "n1", "z", "p1", "p2", "p3", "p4", "p5"].map(swatch), ` +${num(r.scale)}`,
    el("span", { class: "legend-text" }, r.credit === "response" ? "advantage of the whole response" : r.credit === "values" && !r.ownTokens ? "advantage of the step" : "advantage of the token"));
}

/** Show a long response from a token on. What stands before it can be shown with a button. */
function showFrom(token) {
  const r = view.response, start = (at) => (r.steps.length && at > 0 ? r.steps[stepAt(r, at) - 1].start : 0);
  view.first = view.shown = start(token);
  view.spans = new Map();
  view.rows = [];
  $("steps").replaceChildren();
  if (view.first > 0) {
    $("steps").append(el("button", { type: "button", id: "earlier-text", onclick: () => showFrom(Math.max(0, view.first - PAGE_TOKENS)) }, `Show earlier text (${whole(view.first)} tokens stand before it)`));
  }
  showMore(view.first);
}

/** Put a token on the page, if it is not. */
function reach(token) {
  if (token < view.first || token >= view.shown + PAGE_TOKENS) showFrom(Math.max(0, token - 200));
  if (token >= view.shown) showMore(token);
}

/** Add rows of steps from the first one that is not shown, at least up to the token `until`. */
function showMore(until) {
  const r = view.response, box = $("steps"), old = $("more-text");
  if (old) old.remove();
  const fragment = document.createDocumentFragment();
  let tokens = 0, characters = 0, at = view.shown;
  const starts = new Set(r.steps.map((step) => step.start)), paid = new Set(r.alternatives.map((a) => a.position));
  const marks = new Set([...paid, ...r.continuations.map((c) => c.state).filter((s) => !starts.has(s))]);
  while (at < r.ids.length && (tokens < PAGE_TOKENS && characters < PAGE_CHARACTERS || at <= until)) {
    const inside = r.steps.length && at < r.steps[r.steps.length - 1].end;
    const step = inside ? r.steps[stepAt(r, at) - 1] : { number: null, start: at, end: r.ids.length, v: null, a: null };
    const end = Math.min(step.end, at + PAGE_TOKENS);
    const text = el("div", { class: "step-text", dir: "auto" });
    for (let i = at; i < end; i += 1) {
      let shown = r.tok[i];
      if (i === step.end - 1) shown = shown.replace(/\n$/, "");
      characters += Math.min(shown.length, TOKEN_CHARACTERS);
      const span = el("span", { class: "t " + shade(r.adv[i], r.scale) + (marks.has(i) ? " fork" : "") + (paid.has(i) ? " paid" : "") }, cut(shown, TOKEN_CHARACTERS));
      span.dataset.i = i;
      view.spans.set(i, span);
      text.append(span);
    }
    const row = el("div", { class: "step" + (step.number === state.step ? " on" : ""), "data-step": step.number },
      el("div", { class: "gutter" }, el("span", { class: "n" }, at === step.start && step.number ? String(step.number) : "\u00b7"), el("span", { class: "v" }, step.v === null || at !== step.start ? "" : num(step.v)),
        el("span", { class: "a " + shade(perToken(r, step), r.scale) }, step.a === null || at !== step.start ? "" : signed(step.a))), text);
    if (step.number && at === step.start) view.rows[step.number] = row;
    fragment.append(row);
    tokens += end - at;
    at = end;
  }
  view.shown = at;
  box.append(fragment);
  if (at < r.ids.length) {
    box.append(el("button", { type: "button", id: "more-text", onclick: () => showMore(view.shown) }, `Show more (${whole(r.ids.length - at)} of ${plural(r.ids.length, "token")} are not shown yet)`));
  }
}

/** Return the number whose colour stands beside a step: the mean advantage of its tokens. */
function perToken(r, step) {
  if (step.a === null || step.number === null) return null;
  return r.credit === "values" || r.credit === "response" ? step.a : step.a / Math.max(1, step.end - step.start);
}

/** Mark the step and the token of the state, and bring them into view. */
function markStep(scroll) {
  const r = view.response;
  if (!r || !r.known) return;
  const step = r.steps[(state.step || 0) - 1];
  if (step) reach(step.start);
  if (state.token !== null && state.token < r.ids.length) reach(state.token);
  for (const row of document.querySelectorAll("#steps .step.on")) row.classList.remove("on");
  for (const span of document.querySelectorAll("#steps .t.cur")) span.classList.remove("cur");
  if (step && view.rows[step.number]) {
    view.rows[step.number].classList.add("on");
    if (scroll) view.rows[step.number].scrollIntoView({ block: "nearest" });
  }
  const span = view.spans.get(state.token);
  if (span) {
    span.classList.add("cur");
    if (scroll) span.scrollIntoView({ block: "nearest" });
  }
  inspect(state.token === null && step ? step.start : state.token);
}

/** Show what is known about a token and the state before its step. */
function inspect(i) {
  const r = view.response, box = $("inspector");
  if (!r || !r.known || i === null || i === undefined || !r.ids.length || i >= r.ids.length) {
    box.replaceChildren();
    return;
  }
  const n = r.steps.length ? stepAt(r, i) : 0, step = r.steps[n - 1];
  const left = r.hasTokens ? null : "left out";
  const item = (label, value, title) => el("div", { title }, el("dt", {}, label), el("dd", {}, value));
  const items = [item("Token", r.exact ? quoted(r.tok[i]) : `${i + 1} of step ${n}`, `token ${i + 1} of ${r.ids.length}`)];
  items.push(item("Probability", left || (r.logprob && r.logprob[i] !== null ? probability(r.logprob[i]) : "\u2013"), "with which the token was sampled"));
  items.push(item("Entropy", left || (r.entropy && r.entropy[i] !== null ? num(r.entropy[i] / 1000, 3) + " nats" : "\u2013"), "of the policy at this token, at the start of the iteration"));
  items.push(item("Advantage", signed(r.adv[i], 3), "what the token was trained with"));
  if (r.weight && r.weight[i] !== 1) items.push(item("Weight", num(r.weight[i])));
  if (step && step.v !== null) {
    items.push(item(`V before ${n}`, num(step.v, 3), "value of the state before the step"));
    if (step.k !== null) items.push(item("K", step.k === 0 ? "known" : String(step.k), "number of Monte-Carlo rollouts in the value; known without sampling if 0"));
    if (step.lo !== null) items.push(item("95% interval", `${num(step.lo)} to ${num(step.hi)}`));
    if (step.after !== null && step.after !== undefined) items.push(item("V after", num(step.after, 3)));
  }
  if (r.tokenValue && r.tokenValue[i] !== null) items.push(item("Critic", num(r.tokenValue[i], 3), "value of the state before the token as predicted by the value network"));
  const other = r.alternatives.filter((a) => a.position === i);
  if (other.length) items.push(item("In its place", other.slice(0, 3).map((a) => `${quoted(a.text)} ${signed(a.advantage)}`).join(", ") + (other.length > 3 ? "\u2026" : "")));
  box.replaceChildren(el("dl", {}, items));
}

/** Return a probability from a log-probability in 0.001 nats. */
function probability(thousandths) {
  const p = Math.exp(thousandths / 1000);
  return p > 0.9995 ? "> 0.999" : p < 0.0005 ? "< 0.001" : num(p, 3);
}

/** Move the current token by `by` tokens. */
function moveToken(by) {
  const r = view.response;
  if (!r || !r.known || !r.ids.length) return;
  const step = r.steps[(state.step || 1) - 1];
  let at = state.token === null ? (step ? step.start : 0) + (by < 0 ? by : 0) : state.token + by;
  at = clamp(at, 0, r.ids.length - 1);
  while (r.tok[at] === "" && at + Math.sign(by) >= 0 && at + Math.sign(by) < r.ids.length) at += Math.sign(by);
  go({ token: at, step: r.steps.length ? stepAt(r, at) : null });
}

/** Move to the next or the previous step. */
function moveStep(by) {
  const r = view.response;
  if (!r || !r.known || !r.steps.length) return;
  go({ step: clamp((state.step || 0) + by, 1, r.steps.length), token: null });
}

function listenText() {
  const box = $("text");
  const indexOf = (event) => {
    const span = event.target.closest ? event.target.closest("[data-i]") : null;
    return span ? Number(span.dataset.i) : null;
  };
  box.addEventListener("mouseover", (event) => {
    const i = indexOf(event), row = event.target.closest("[data-step]");
    if (i !== null) inspect(i);
    else if (row && view.response.steps[row.dataset.step - 1]) inspect(view.response.steps[row.dataset.step - 1].start);
  });
  box.addEventListener("mouseleave", () => markStep(false));
  box.addEventListener("click", (event) => {
    if (String(getSelection())) return;
    const i = indexOf(event), row = event.target.closest("[data-step]");
    if (row && row.dataset.step !== "null") go({ step: Number(row.dataset.step), token: i });
  });
  box.addEventListener("keydown", (event) => {
    if (event.target !== box || event.ctrlKey || event.metaKey || event.altKey) return;
    const moves = { ArrowRight: () => moveToken(1), ArrowLeft: () => moveToken(-1), ArrowDown: () => moveStep(1), ArrowUp: () => moveStep(-1),
      Home: () => go({ step: 1, token: 0 }), End: () => moveStep(1e9) };
    if (moves[event.key]) {
      event.preventDefault();
      event.stopPropagation();
      moves[event.key]();
    }
  });
}
