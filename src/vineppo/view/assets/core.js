// Elements, numbers and visible marks. Everything that a model wrote reaches the page through text nodes only.

const $ = (id) => document.getElementById(id);
const SVG = $("svg-names").namespaceURI; // so that the page contains no address

/** Return a new element. `props` has properties, `class`, `data-...`, `aria-...`, `role` and handlers such as onclick. */
function el(tag, props = {}, ...children) {
  const node = document.createElement(tag);
  for (const [name, value] of Object.entries(props)) {
    if (value === null || value === undefined || value === false) continue;
    if (name === "class") node.className = value;
    else if (name.includes("-") || name === "role" || name === "for") node.setAttribute(name, value);
    else node[name] = value;
  }
  for (const child of children.flat(3)) {
    if (child !== null && child !== undefined && child !== false) node.append(child);
  }
  return node;
}

/** Return a new SVG element with attributes. */
function svg(tag, attributes = {}, ...children) {
  const node = document.createElementNS(SVG, tag);
  for (const [name, value] of Object.entries(attributes)) node.setAttribute(name, value);
  node.append(...children);
  return node;
}

const MARKS = {
  0x00ad: "SHY", 0x061c: "ALM", 0x180e: "MVS", 0x200b: "ZWSP", 0x200e: "LRM", 0x200f: "RLM", 0x2028: "LSEP",
  0x2029: "PSEP", 0x202a: "LRE", 0x202b: "RLE", 0x202c: "PDF", 0x202d: "LRO", 0x202e: "RLO", 0x2060: "WJ",
  0x2066: "LRI", 0x2067: "RLI", 0x2068: "FSI", 0x2069: "PDI", 0xfeff: "BOM", 0xfff9: "IAA", 0xfffa: "IAS",
  0xfffb: "IAT",
};
const HIDDEN = /[\u0000-\u0008\u000b-\u001f\u007f-\u009f\u00ad\u061c\u180e\u200b\u200e\u200f\u2028-\u202e\u2060\u2066-\u2069\ufeff\ufff9-\ufffb]|[\u{e0000}-\u{e007f}]/gu;

/** Return a text in which characters that are invisible or change the direction of the text are visible marks. */
function visible(text) {
  return text.replace(HIDDEN, (c) => {
    const code = c.codePointAt(0);
    if (code < 0x20) return String.fromCodePoint(0x2400 + code);
    if (code === 0x7f) return "\u2421";
    return "\u27e6" + (MARKS[code] || "U+" + code.toString(16).toUpperCase()) + "\u27e7";
  });
}

/** Return a text on one line of at most `length` characters. */
function oneLine(text, length = 80) {
  const cut = text.length > 4 * length ? text.slice(0, 4 * length) : text;
  const line = visible(cut.replace(/\s+/g, " ").trim());
  return line.length > length || cut.length < text.length ? [...line].slice(0, length - 1).join("") + "\u2026" : line;
}

/** Return a token in quotation marks, with spaces and line breaks visible. */
function quoted(text) {
  const shown = text.length > 60 ? text.slice(0, 60) + "\u2026" : text;
  return "\u201c" + visible(shown).replace(/\n/g, "\u21b5").replace(/\t/g, "\u21e5").replace(/ /g, "\u2423") + "\u201d";
}

const MINUS = "\u2212";

/** Return a number with `digits` decimals; "-" for null. A number that is not 0 is not shown as 0. */
function num(x, digits = 2) {
  if (x === null || x === undefined) return "\u2013";
  const small = x !== 0 && Math.abs(x) < 0.5 * 10 ** -digits;
  const text = small ? Math.abs(x).toExponential(0) : Math.abs(x).toFixed(digits);
  return (x < 0 ? MINUS : "") + text;
}

/** Return a number with its sign. */
function signed(x, digits = 2) {
  if (x === null || x === undefined) return "\u2013";
  return (x > 0 ? "+" : x < 0 ? "" : "\u00b1") + num(x, digits);
}

/** Return an integer with thousands separated by a thin space. */
const whole = (n) => String(n).replace(/\B(?=(\d{3})+$)/g, "\u202f");
const plural = (n, word) => `${whole(n)} ${word}${n === 1 ? "" : "s"}`;

/** Return the numbers of [value, count, value, count, ...]. */
function expand(runs) {
  const numbers = [];
  for (let i = 0; i < runs.length; i += 2) for (let n = 0; n < runs[i + 1]; n += 1) numbers.push(runs[i]);
  return numbers;
}

/** Return the class of the colour of an advantage: z for 0, p1 to p5 above 0, n1 to n5 below 0. */
function shade(advantage, scale) {
  if (!advantage || !scale) return "z";
  const level = Math.min(5, Math.max(1, Math.ceil((5 * Math.abs(advantage)) / scale - 1e-9)));
  return (advantage > 0 ? "p" : "n") + level;
}

/** Return the mark of a reward: right, wrong, or between. */
function rewardMark(reward, range) {
  if (reward === null || reward === undefined) return el("span", { class: "reward none", title: "no reward" }, "\u2013");
  const kind = reward >= range.high ? "right" : reward <= range.low ? "wrong" : "part";
  const sign = kind === "right" ? "\u2713" : kind === "wrong" ? "\u2717" : "\u25d0";
  return el("span", { class: "reward " + kind }, el("span", { "aria-hidden": "true" }, sign), " " + num(reward, Number.isInteger(reward) ? 0 : 2));
}

/** Call `later` once, after calls have stopped for `ms` milliseconds. */
function debounced(later, ms) {
  let timer = 0;
  return (...args) => {
    clearTimeout(timer);
    timer = setTimeout(() => later(...args), ms);
  };
}

const clamp = (x, low, high) => Math.min(high, Math.max(low, x));
const sum = (numbers) => numbers.reduce((a, b) => a + (b || 0), 0);
const mean = (numbers) => (numbers.length ? sum(numbers) / numbers.length : null);
