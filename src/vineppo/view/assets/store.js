// The data: lists of all responses, and the parts of an iteration, which are read when they are needed.

const META = JSON.parse($("meta").textContent);
const KEPT = 24; // iterations whose parts stay in memory

/** Return the JSON of compressed bytes. */
async function inflate(stream) {
  return new Response(stream.pipeThrough(new DecompressionStream("gzip"))).json();
}

/** Return the data of a part, such as 0/12/core; null if the page does not contain it. */
async function readPart(name) {
  if (META.live) {
    const answer = await fetch("/data/" + name, { cache: "no-store" });
    return answer.ok ? inflate(answer.body) : null;
  }
  const node = document.getElementById("chunk/" + name);
  if (!node) return null;
  const text = atob(node.textContent);
  const bytes = new Uint8Array(text.length);
  for (let i = 0; i < text.length; i += 1) bytes[i] = text.charCodeAt(i);
  return inflate(new Blob([bytes]).stream());
}

/** One run: the columns of all its responses. Response i has the entry i in each column. */
class Run {
  constructor(index, meta) {
    this.index = index;
    this.meta = meta;
    this.parts = new Map();
    this.setRows([]);
  }

  async load() {
    this.setRows((await readPart(this.index + "/rows")) || []);
  }

  setRows(blocks) {
    blocks.sort((a, b) => a.iteration - b.iteration);
    this.blocks = blocks;
    const c = { it: [], number: [], kind: [], problem: [], preview: [], reward: [], finish: [], tokens: [], steps: [], lowest: [], conts: [] };
    this.first = new Map(); // iteration -> index of its first response
    this.queues = { drops: [], lucky: [], truncated: [], disagree: [] };
    this.byProblem = new Map();
    for (const b of blocks) {
      const base = c.it.length;
      this.first.set(b.iteration, base);
      let preview = "";
      for (let i = 0; i < b.count; i += 1) {
        if (b.preview[i] !== null) preview = b.preview[i];
        c.it.push(b.iteration);
        c.number.push(i + 1);
        c.kind.push(b.kind[i] || "rollout");
        c.problem.push(b.problem[i]);
        c.preview.push(preview);
        c.reward.push(b.reward[i]);
        c.finish.push(b.finish[i]);
        c.tokens.push(b.tokens[i]);
        c.steps.push(b.steps[i]);
        c.lowest.push(b.lowest[i]);
        c.conts.push(b.continuations[i]);
        const key = b.problem[i] || preview;
        if (!this.byProblem.has(key)) this.byProblem.set(key, []);
        this.byProblem.get(key).push(base + i);
      }
      for (const [name, entries] of Object.entries(b.queues)) {
        for (const [i, step, reason, key] of entries) this.queues[name].push({ id: base + i, step, reason, key });
      }
    }
    for (const entries of Object.values(this.queues)) entries.sort((a, b) => a.key - b.key || a.id - b.id);
    this.c = c;
    this.size = c.it.length;
    this.lowScale = c.lowest.reduce((most, x) => Math.max(most, Math.abs(x || 0)), 0);
    const known = c.reward.filter((r, i) => r !== null && c.kind[i] === "rollout");
    let high = -Infinity, low = Infinity;
    for (const r of known) { high = Math.max(high, r); low = Math.min(low, r); }
    this.range = known.length ? { high, low: Math.min(low, 0) } : { high: 1, low: 0 };
    if (this.range.high <= this.range.low) this.range.high = this.range.low + 1;
  }

  get iterations() { return this.blocks.map((b) => b.iteration); }

  idOf(iteration, number) {
    const base = this.first.get(iteration);
    if (base === undefined) return null;
    const id = base + number - 1;
    return this.c.it[id] === iteration ? id : null;
  }

  /** Return a part of an iteration; a promise that is kept for the newest iterations that were asked for. */
  part(iteration, part) {
    const name = `${this.index}/${iteration}/${part}`;
    if (this.parts.has(name)) {
      const found = this.parts.get(name);
      this.parts.delete(name);
      this.parts.set(name, found);
      return found;
    }
    const found = readPart(name).catch(() => null);
    this.parts.set(name, found);
    while (this.parts.size > 3 * KEPT) this.parts.delete(this.parts.keys().next().value);
    return found;
  }

  /** Return a response with everything that the page has about it; its `known` is false without its texts. */
  async response(id) {
    const it = this.c.it[id], n = this.c.number[id] - 1;
    const [core, tokens, more] = await Promise.all([this.part(it, "core"), this.part(it, "tokens"), this.part(it, "more")]);
    if (!core || !core.responses[n]) return { run: this, id, known: false };
    return assemble(this, id, core, core.responses[n], tokens && tokens.responses[n], more && more.responses[n]);
  }
}

/** Return the object of a response from its entries in the parts of its iteration. */
function assemble(run, id, core, entry, tokens, more) {
  const r = { run, id, known: true, it: run.c.it[id], number: run.c.number[id], reward: run.c.reward[id], finish: run.c.finish[id] };
  const [problem, prompt, answer] = core.problems[entry.p];
  Object.assign(r, { problem, prompt, answer, credit: entry.credit, exact: entry.exact, ids: entry.t });
  r.tok = entry.t.map((index) => core.texts[index]);
  r.char = [0];
  for (const text of r.tok) r.char.push(r.char[r.char.length - 1] + text.length);
  r.text = r.tok.join("");
  r.adv = expand(entry.a);
  r.alternatives = entry.alt.map(([position, token, advantage]) => ({ position, text: core.texts[token], advantage }));
  r.others = Object.fromEntries(Object.entries(entry.others).map(([name, runs]) => [name, expand(runs)]));
  r.logprob = tokens && tokens.lp ? tokens.lp : null;
  r.entropy = tokens && tokens.h ? tokens.h : null;
  r.tokenValue = tokens && tokens.v ? tokens.v : null;
  r.weight = tokens && tokens.w ? expand(tokens.w) : null;
  r.hasTokens = Boolean(tokens);
  r.hasMore = Boolean(more);
  r.continuations = (more || []).map(([state, shared, accepted, length, place, text, reward, finish]) => ({ state, shared, accepted, length, place, text, reward, finish }));
  const s = entry.s, ends = s.end || [];
  const at = (name, i) => (s[name] ? s[name][i] : null);
  r.steps = ends.map((end, i) => ({
    number: i + 1, start: i ? ends[i - 1] : 0, end, v: at("v", i), k: at("k", i), lo: at("lo", i), hi: at("hi", i), a: at("a", i), sum: at("sum", i),
  }));
  r.steps.forEach((step, i) => { step.after = i + 1 < r.steps.length ? r.steps[i + 1].v : r.reward; });
  r.hasValues = r.steps.some((step) => step.v !== null);
  r.monteCarlo = r.steps.some((step) => step.k !== null);
  r.scale = 0;
  for (const a of r.adv) if (a !== null) r.scale = Math.max(r.scale, Math.abs(a));
  for (const a of r.alternatives) r.scale = Math.max(r.scale, Math.abs(a.advantage));
  // Tokens have credit of their own if they differ within a step.
  r.ownTokens = r.steps.some((step) => new Set(r.adv.slice(step.start, step.end)).size > 1);
  return r;
}

const RUNS = META.runs.map((meta, index) => new Run(index, meta));

/** Return the number of the step (from 1) that contains a token. */
function stepAt(response, token) {
  let low = 0, high = response.steps.length - 1;
  while (low < high) {
    const middle = (low + high) >> 1;
    if (response.steps[middle].end > token) high = middle; else low = middle + 1;
  }
  return low + 1;
}

/** Return the text of a step. */
const stepText = (response, step) => response.text.slice(response.char[step.start], response.char[step.end]);
