// The group of responses to one problem as a tree of prefixes, and the same response under several credits.

const LEAVES = 64;

async function paneGroup(r) {
  const ids = r.run.byProblem.get(r.problem || run().c.preview[r.id]) || [r.id];
  const members = ids.filter((id) => r.run.c.it[id] === r.it && r.run.c.kind[id] === "rollout").slice(0, LEAVES);
  if (!members.includes(r.id)) members.push(r.id);
  const responses = (await Promise.all(members.map((id) => (id === r.id ? r : r.run.response(id))))).filter((x) => x.known);
  if (!responses.length) responses.push(r);
  const leaves = responses.map((x) => ({ ids: x.ids, text: (i, j) => x.text.slice(x.char[i], x.char[j]), reward: x.reward, id: x.id, name: `response ${x.number}` }));
  const rewards = responses.map((x) => x.reward).filter((x) => x !== null);
  const parts = [el("h2", {}, "Group", el("span", { class: "of" }, ` ${plural(responses.length, "response")} to this problem in iteration ${r.it}`))];
  if (rewards.length) parts.push(el("p", {}, `Mean reward ${num(mean(rewards))}. A node is text that the responses below it share; its number is the mean of their rewards.`));
  if (responses.length < 2) {
    const branches = r.continuations.slice(0, LEAVES);
    parts.push(el("p", { class: "note" }, branches.length ? "The group has one response. The tree also has the saved continuations of this response." : "The group has one response, so the tree has one branch."));
    for (const c of branches) {
      const cutAt = c.state + c.shared;
      leaves.push({ ids: [...r.ids.slice(0, cutAt), { c }], text: (i, j) => (j > cutAt ? r.text.slice(r.char[i], r.char[cutAt]) + c.text : r.text.slice(r.char[i], r.char[j])), reward: c.reward, id: null, name: "continuation" });
    }
  }
  parts.push(el("ul", { class: "tree" }, treeNode(leaves, 0, r)));
  return parts;
}

/** Return the node of leaves that share their tokens from `from` on as far as possible. */
function treeNode(leaves, from, r) {
  let end = from;
  while (leaves.every((leaf) => end < leaf.ids.length) && leaves.every((leaf) => leaf.ids[end] === leaves[0].ids[end])) end += 1;
  const groups = new Map();
  if (leaves.length > 1) {
    for (const leaf of leaves) {
      const key = end < leaf.ids.length ? leaf.ids[end] : "end";
      if (!groups.has(key)) groups.set(key, []);
      groups.get(key).push(leaf);
    }
  }
  const known = leaves.map((leaf) => leaf.reward).filter((x) => x !== null);
  const average = mean(known), range = run().range;
  const text = leaves[0].text(from, end);
  const mine = leaves.some((leaf) => leaf.id === r.id);
  const shown = text.length > 60 || text.trimEnd().includes("\n") ? el("details", {}, el("summary", {}, oneLine(text.slice(0, 400).trimEnd().replace(/\n/g, " \u21b5 "), 90)), el("div", {}, cut(text, 4000))) : el("div", {}, visible(text.replace(/\n$/, "")) || (from === end ? "\u2205" : "\u21b5"));
  const share = average === null ? 0 : clamp((average - range.low) / (range.high - range.low), 0, 1);
  const meter = el("span", { class: "meter", "aria-hidden": "true" }, el("span", {}));
  meter.firstChild.style.width = `${100 * share}%`;
  const single = leaves.length === 1;
  const label = single ? (leaves[0].id === null || leaves[0].id === r.id ? el("span", { class: "leaf" }, leaves[0].id === r.id ? "this response" : leaves[0].name) : el("button", { type: "button", class: "link leaf", onclick: () => go({ id: leaves[0].id, step: null, token: null }) }, leaves[0].name)) : el("span", { class: "leaf" }, `${leaves.length} responses`);
  const same = !single && groups.size === 1 && groups.has("end");
  return el("li", { class: mine ? "mine" : "" }, el("div", { class: "node" }, el("div", { class: "node-head" }, single ? rewardMark(leaves[0].reward, range) : [meter, el("span", { class: "node-mean" }, num(average))], label), el("div", { class: "node-text mono", dir: "auto" }, shown)),
    single ? null : same ? el("p", { class: "note" }, `all equal: ${leaves.map((leaf) => leaf.name).join(", ")}`)
      : el("ul", {}, [...groups.entries()].map(([key, group]) => (key === "end" && group.length > 1 ? el("li", { class: "note" }, `${group.length} responses end here`) : treeNode(group, end, r)))));
}

function paneCredits(r) {
  const columns = [];
  const own = r.run.meta.algorithm;
  if (r.credit !== "none") columns.push([own === "Counterfactual" ? "Counter\u00adfactual" : own in r.others ? `${own}, run` : own, r.adv]);
  for (const [name, numbers] of Object.entries(r.others)) if (numbers.length) columns.push([name, numbers]);
  if (r.tokenValue && r.reward !== null) columns.push(["Critic", r.tokenValue.map((v, i) => (i + 1 < r.ids.length ? r.tokenValue[i + 1] : r.reward) - v)]);
  const parts = [el("h2", {}, "Credits", el("span", { class: "of" }, " the same response under several algorithms"))];
  if (!columns.length) return [...parts, el("p", { class: "empty" }, "This response has no credit and no group to compute one from.")];
  const averages = columns.map(([, numbers]) => r.steps.map((step) => mean(numbers.slice(step.start, step.end)) || 0));
  const scales = averages.map((numbers) => Math.max(1e-9, ...numbers.map(Math.abs)));
  const width = `minmax(64px, 1fr) repeat(${columns.length}, ${columns.length > 4 ? 56 : 66}px)`;
  const table = el("div", { class: "credits", role: "table", "aria-label": "Mean advantage of the tokens of each step" });
  const line = (cells, name) => { const row = el("div", { class: "credit-row " + name, role: "row" }, cells); row.style.gridTemplateColumns = width; return row; };
  table.append(line([el("span", { role: "columnheader" }, "Step"), ...columns.map(([name]) => el("span", { role: "columnheader", class: "r" }, name))], "head"));
  const steps = r.steps.slice(0, 400);
  steps.forEach((step, i) => {
    const row = line([el("span", { role: "rowheader", class: "mono credit-text" }, `${step.number}\u2002${oneLine(stepText(r, step), 60)}`), ...averages.map((numbers, c) => el("span", { role: "cell", class: "r " + shade(numbers[i], scales[c]) }, signed(numbers[i])))], step.number === state.step ? "on" : "");
    row.addEventListener("click", () => go({ step: step.number, token: null }, { scroll: "center" }));
    table.append(row);
  });
  parts.push(el("p", {}, `Mean advantage of the tokens of each step. ${r.credit === "none" ? "" : "The first column is what the run recorded. "}Each column has its own colour scale.`), table);
  if (r.steps.length > 400) parts.push(el("p", { class: "note" }, `${r.steps.length - 400} more steps are not shown.`));
  const differing = columns.map(([name], c) => [name, averages[c]]).filter(([, numbers], c) => c && numbers.some((x) => x !== 0));
  if (differing.length && r.credit !== "none") {
    parts.push(el("p", { class: "note" }, "Steps with the same sign as recorded: " + differing.map(([name, numbers]) => `${name} ${numbers.filter((x, i) => Math.sign(x) === Math.sign(averages[0][i])).length} of ${r.steps.length}`).join(", ") + "."));
  }
  if (Object.values(r.others).length && Object.values(r.others).every((numbers) => numbers.every((x) => x === 0))) {
    parts.push(el("p", { class: "note" }, "All responses of the group have the same reward, so GRPO, RLOO and TEMPO give no credit."));
  }
  if (!Object.keys(r.others).length) parts.push(el("p", { class: "note" }, "GRPO, RLOO and TEMPO compare the responses of a group. This response has no other response to compare with."));
  parts.push(el("p", { class: "note" }, "GRPO, RLOO and TEMPO are computed here from the rewards and tokens of the group, with their default settings." + (r.tokenValue ? " Critic is the change of the value that the run's value network predicts." : "")));
  return parts;
}
