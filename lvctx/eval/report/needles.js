// Needle tests: accuracy by length, and heatmaps whose cells open their trials.

function needleCurves() {
  return ["text", "video"].map((modality) => {
    const runs = of("needles").filter((run) => run.grid.modality === modality);
    const series = runs.map(({ name, grid }) => ({ name, points: grid.lengths.map((length, i) => {
      const [low, high] = grid.interval_by_length[i] ?? [];
      return { x: modality === "text" ? length : grid.tokens[i] || length, y: grid.accuracy_by_length[i], low, high };
    }) }));
    const title = `Accuracy by length, ${modality}: bands are 95% intervals, the dotted line is ${data.threshold}`;
    return chart(title, series, { xLabel: "tokens", yLow: 0, yHigh: 1, log: true, limit: data.threshold });
  });
}

const VERDICTS = { right: ["✓ right", "right"], wrong: ["✗ wrong", "wrong"], failed: ["failed", "failed"],
  unparsed: ["no letter", "open"], uncounted: ["not counted", "open"], unscored: ["not scored", "muted"], answered: ["", "muted"] };
const badge = (verdict) => el("span", { class: `badge ${VERDICTS[verdict][1]}` }, VERDICTS[verdict][0]);

function heatmap(run) {
  const grid = run.grid, panel = el("div", {});
  let opened = null;
  const close = () => {
    panel.replaceChildren();
    if (opened) { opened.setAttribute("aria-pressed", "false"); opened.focus(); }
    opened = null;
  };
  const open = (button, d, n) => {
    if (opened) opened.setAttribute("aria-pressed", "false");
    opened = button;
    button.setAttribute("aria-pressed", "true");
    const title = el("h4", { tabindex: "-1" }, `Depth ${grid.labels[d]}, ${count(grid.lengths[n])} ${grid.unit}`,
      el("button", { class: "plain close", type: "button", onclick: close }, "Close"));
    const trials = run.trials.filter((t) => t.cell[0] === d && t.cell[1] === n);
    panel.replaceChildren(el("section", { class: "panel", onkeydown: (e) => { if (e.key === "Escape") close(); } }, title,
      trials.map(trial)));
    title.focus();
  };
  const trial = (t) => el("article", {},
    el("p", {}, el("strong", {}, `Trial ${t.trial + 1} `), badge(t.verdict)),
    pictures(t.images),
    definitions([["question", t.question], ["answer", t.answer], ["part", t.part], ["reply", t.generated],
      ["most likely tokens", t.predicted],
      ["log-probability", t.log_prob == null ? null : String(t.log_prob)],
      ["rank of the answer", t.rank == null ? null : JSON.stringify(t.rank)],
      ["needle", t.needle && t.needle.trim()], ["inserted after", t.position == null ? null : `${count(t.position)} ${grid.unit}`],
      ["sequence", t.tokens ? `${count(t.tokens)} tokens` : null], ["error", t.error]]));
  const edge = (n) => run.beyond === n && "beyond";
  const head = grid.lengths.map((length, n) => el("th", { scope: "col", class: edge(n) }, count(length),
    grid.unit === "frames" && grid.tokens[n] ? [el("br"), el("small", {}, count(grid.tokens[n]))] : null));
  const body = grid.depths.map((_, d) => el("tr", {}, el("th", { scope: "row" }, grid.labels[d]),
    grid.lengths.map((length, n) => {
      const right = grid.correct[d][n], all = grid.trials[d][n], share = all ? right / all : null;
      const label = `depth ${grid.labels[d]}, ${count(length)} ${grid.unit}: ${all ? `${right} of ${all} right` : "nothing ran"}`;
      const button = el("button", { type: "button", "aria-label": label, title: label, "aria-pressed": "false",
        class: share == null ? "none" : `q${Math.floor(share * 10 + 1e-9)}` }, share == null ? "–" : String(Math.round(100 * share)));
      button.addEventListener("click", () => open(button, d, n));
      const exists = run.trials.some((t) => t.cell[0] === d && t.cell[1] === n);
      return el("td", { class: edge(n) }, exists ? button : null);
    })));
  const foot = grid.lengths.map((_, n) => el("td", { class: edge(n) }, percent(grid.accuracy_by_length[n])));
  const trained = grid.trained_length == null ? "" : run.beyond == null
    ? ` The language model was trained to ${count(grid.trained_length)} tokens.`
    : ` Columns after the dashed line exceed the ${count(grid.trained_length)} tokens that the language model was trained on.`;
  const guessing = grid.chance == null ? "" : ` Chance is ${percent(grid.chance)}%.`;
  const pairs = (grid.pairs ?? []).map((p, n) => p.chains ? ` At ${count(grid.lengths[n])}: caption ${percent(p.caption)}%, qa ${percent(p.qa)}%, both ${percent(p.both)}% of ${count(p.chains)} chains.` : "").join("");
  const caption = `Right answers in %, by depth and length in ${grid.unit === "frames" ? "frames, tokens below" : "tokens"}`;
  return headline(run,
    el("p", {}, `Mean ${percent(grid.accuracy)}% (${range(...(grid.interval ?? []))}); ${run.effective ?? "no result"}.${run.scoring ? ` Scoring: ${run.scoring}.` : ""}${guessing}${trained}${pairs} A cell opens its needles.`),
    el("div", { class: "scroll" }, el("table", { class: "heat" }, el("caption", {}, caption),
      el("thead", {}, el("tr", {}, el("th", { scope: "col" }, "depth"), head)), el("tbody", {}, body),
      el("tfoot", {}, el("tr", {}, el("th", { scope: "row" }, "all depths"), foot)))),
    panel);
}
