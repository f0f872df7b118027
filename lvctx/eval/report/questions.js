// Benchmarks and answers: scores, breakdowns, and questions with their filters.

function verdictOf(question, rule) {
  if (question.error != null) return "failed";
  if (rule < 0) return "answered";
  const v = question.verdicts?.[rule];
  if (!v) return "unscored";
  if (v.letter === "") return "unparsed";
  return v.correct === true ? "right" : v.correct === false ? "wrong" : "uncounted";
}

const twins = new Map();
function twinsOf(run) {
  if (!run.bench) return [];
  return of("benchmark", "responses").filter((other) => other !== run && other.bench === run.bench).map((other) => {
    if (!twins.has(other)) twins.set(other, new Map(other.questions_list.map((q) => [q.id, q])));
    return [other, twins.get(other)];
  });
}

function questionBody(run, q) {
  const rules = Object.keys(run.rules ?? {});
  const options = q.options?.length && el("ul", { class: "options" }, q.options.map((option, i) =>
    el("li", { class: q.answer === String.fromCharCode(65 + i) && "key" }, option)));
  const others = twinsOf(run).filter(([, found]) => found.has(q.id)).map(([other, found]) => {
    const same = found.get(q.id), rule = Object.keys(other.rules ?? {}).indexOf(other.rule);
    return el("p", {}, `${other.name}: `, same.response ?? same.error ?? "", " ", badge(verdictOf(same, rule)));
  });
  const scorers = q.verdicts && table("What each scorer makes of the reply", [{ name: "rule" }, { name: "letter" }, { name: "verdict" }],
    q.verdicts.map((v, i) => ({ cells: [rules[i], v.letter === "" ? "none" : v.letter ?? "–",
      badge(v.correct === true ? "right" : v.correct === false ? "wrong" : "uncounted")] })));
  return [pictures(q.images),
    definitions([["question", q.question], ["options", options], ["right answer", q.answer],
      ["reply", q.response], ["error", q.error], ["reply was cut", q.cut ? "at its largest number of tokens" : null],
      ["other runs", others.length ? others : null],
      ["groups", Object.entries(q.groups).map(([k, v]) => `${k.replaceAll("_", " ")}: ${v}`).join("; ")],
      ["video", q.file ?? q.video],
      ["cost", q.cost && Object.entries(q.cost).map(([k, v]) => `${k.replaceAll("_", " ")} ${v}`).join("; ")]]),
    q.reasoning && lazy("Reasoning", () => el("p", { class: "text" }, q.reasoning)), scorers];
}

/** The questions of a run with their filters; returns the element, and a function that sets the rule. */
function questions(run) {
  const all = run.questions_list, state = { verdict: "all", text: "", page: 0, rule: -1, groups: {} };
  const texts = all.map(() => null);
  const textOf = (i) => (texts[i] ??= [all[i].id, all[i].video, all[i].question, ...(all[i].options ?? []), all[i].response,
    all[i].reasoning, all[i].error].filter(Boolean).join("\n").toLowerCase());
  const verdictAs = (v) => (v ? String(v.correct) : "");
  const disagree = (q) => new Set((q.verdicts ?? []).map(verdictAs)).size > 1;
  const others = twinsOf(run);
  const differs = (q) => others.some(([other, found]) => {
    const same = found.get(q.id), rule = Object.keys(run.rules ?? {})[state.rule];
    return same?.verdicts && q.verdicts && verdictAs(same.verdicts[Object.keys(other.rules).indexOf(rule)]) !== verdictAs(q.verdicts[state.rule]);
  });
  const correct = (q) => q.error == null && q.verdicts?.[state.rule]?.correct;
  const FILTERS = { all: ["all", () => true], right: ["right", (q) => correct(q) === true], wrong: ["wrong", (q) => correct(q) === false],
    unparsed: ["no letter found", (q) => verdictOf(q, state.rule) === "unparsed"], disagreement: ["scorers disagree", disagree],
    runs: ["runs differ", differs], cut: ["reply was cut", (q) => q.cut], failed: ["failed", (q) => q.error != null] };
  const names = Object.keys(FILTERS).filter((name) => name === "all" || name === "failed" || name === "cut" ||
    (run.rules && (name !== "runs" || others.length)));
  const status = el("p", { role: "status", class: "meta" });
  const list = el("ul", { class: "list" });
  const verdictSelect = el("select", { onchange: (e) => { state.verdict = e.target.value; state.page = 0; show(); } });
  const previous = el("button", { class: "plain", type: "button", onclick: () => { state.page -= 1; show(); } }, "Previous");
  const next = el("button", { class: "plain", type: "button", onclick: () => { state.page += 1; show(); } }, "Next");
  const place = el("span", {});
  const turning = el("div", { class: "pages" }, previous, place, next);
  const keys = [...new Set(all.flatMap((q) => Object.keys(q.groups)))];
  const groupSelects = keys.map((key) => {
    const values = [...new Set(all.map((q) => q.groups[key]))].filter((v) => v != null).sort();
    return values.length > 1 && select(key.replaceAll("_", " "), [["", "all"], ...values.map((v) => [v, v])],
      (value) => { state.groups[key] = value; state.page = 0; show(); });
  });
  const item = (q) => {
    const verdict = verdictOf(q, state.rule), details = el("details", {}, el("summary", {}, el("span", { class: "id" }, q.id),
      el("span", { class: "line" }, q.question || q.video), el("span", { class: "line reply" }, q.response ?? q.error ?? ""), badge(verdict)));
    details.addEventListener("toggle", () => {
      if (details.open && details.childElementCount === 1) details.append(el("div", {}, questionBody(run, q)));
    });
    return el("li", {}, details);
  };
  function show() {
    const found = all.filter((q, i) => FILTERS[state.verdict][1](q) && (!state.text || textOf(i).includes(state.text)) &&
      Object.entries(state.groups).every(([key, value]) => !value || q.groups[key] === value));
    const pages = Math.max(1, Math.ceil(found.length / PAGE));
    state.page = Math.min(Math.max(state.page, 0), pages - 1);
    status.textContent = `${count(found.length)} of ${plural(all.length, "question", "questions")}`;
    list.replaceChildren(...found.slice(state.page * PAGE, (state.page + 1) * PAGE).map(item));
    place.textContent = `Page ${count(state.page + 1)} of ${count(pages)}`;
    turning.hidden = pages === 1;
    previous.disabled = state.page === 0;
    next.disabled = state.page >= pages - 1;
  }
  function setRule(rule) {
    state.rule = rule;
    verdictSelect.replaceChildren(...names.map((name) => el("option", { value: name, selected: name === state.verdict },
      `${FILTERS[name][0]} (${count(all.filter(FILTERS[name][1]).length)})`)));
    show();
  }
  const search = el("input", { type: "search", oninput: (e) => { state.text = e.target.value.toLowerCase(); state.page = 0; show(); } });
  return [el("div", {}, el("h4", {}, "Questions"), el("div", { class: "controls" }, el("label", {}, "verdict", verdictSelect),
    el("label", {}, "search in questions and replies", search), groupSelects), status, list, turning), setRule];
}

const counted = (e) => (e ? [percent(e.mean), " ", el("small", {}, `(${count(e.counted)})`)] : "");

function breakdown(run, rule) {
  const columns = [{ name: "" }, { name: "accuracy, %", number: true }, { name: "95% interval", number: true }, { name: "0 to 100" }, { name: "counted", number: true }];
  const cells = (run.cells ?? []).filter((cell) => cell.rule === rule);
  const groups = Object.entries(run.by ?? {}).filter(([, values]) => Object.keys(values).length > 1);
  const tables = groups.map(([group, values]) => table(`By ${group.replaceAll("_", " ")}`, columns,
    Object.entries(values).filter(([, rules]) => rules[rule]).map(([value, rules]) => {
      const e = rules[rule];
      return { cells: [value, percent(e.mean), range(e.low, e.high), interval(e), count(e.counted)] };
    })));
  const found = [el("div", { class: "tables" }, tables)];
  if (!cells.length) return found;
  const durations = [...new Set(cells.map((c) => c.duration))];
  const lines = new Map();
  for (const cell of cells) {
    const key = JSON.stringify([cell.domain, cell.task_type]);
    if (!lines.has(key)) lines.set(key, { domain: cell.domain, task: cell.task_type, values: {} });
    lines.get(key).values[cell.duration] = cell;
  }
  const domains = [...new Set(cells.map((c) => c.domain))].sort((a, b) => (b === "all") - (a === "all") || a.localeCompare(b));
  const ordered = domains.flatMap((domain) => [...lines.values()].filter((line) => line.domain === domain)
    .sort((a, b) => (b.task === "all") - (a.task === "all") || a.task.localeCompare(b.task)));
  const rows = ordered.map((line) => ({ class: line.task === "all" ? "total" : "part",
    cells: [line.task === "all" ? (line.domain === "all" ? "all domains" : line.domain) : line.task, ...durations.map((d) => counted(line.values[d]))] }));
  const caption = "Duration x domain x task: accuracy in %, questions counted in brackets";
  return [...found, lazy(caption, () => table(caption, [{ name: "domain, task" }, ...durations.map((d) => ({ name: d, number: true }))], rows))];
}

/** Rows of nested figures; an estimate is one row, in %. */
function figures(value, name = "") {
  if (value !== null && typeof value === "object" && !Array.isArray(value)) {
    const estimate = "mean" in value && "low" in value;
    const parts = Object.entries(value).filter(([key]) => !estimate || !["mean", "low", "high", "counted", "clusters"].includes(key));
    return [...(estimate ? [{ cells: [name, value.mean == null ? "–" : `${percent(value.mean)}%`, range(value.low, value.high), interval(value), count(value.counted)] }] : []),
      ...parts.flatMap(([key, part]) => figures(part, [name, key].filter(Boolean).join(", ").replaceAll("_", " ")))];
  }
  const text = typeof value === "number" ? short(value) : typeof value === "string" ? value : JSON.stringify(value);
  return [{ cells: [name, text, "", "", ""] }];
}

function benchmark(run) {
  const rules = Object.keys(run.rules ?? {});
  const [list, setRule] = questions(run);
  const tables = el("div", {});
  const choose = (rule) => {
    tables.replaceChildren(...breakdown(run, rule).filter(Boolean));
    setRule(rules.indexOf(rule));
  };
  const columns = [{ name: "rule" }, { name: "accuracy, %", number: true }, { name: "95% interval", number: true }, { name: "0 to 100" },
    { name: "counted", number: true }, { name: "answer found, %", number: true }, { name: "source", prose: true }];
  const scores = rules.length > 0 && table("Accuracy under each rule, with intervals clustered by video", columns, rules.map((rule) => {
    const e = run.rules[rule];
    return { class: rule === run.rule && "total", cells: [rule, percent(e.mean), range(e.low, e.high), interval(e), count(e.counted), percent(e.parsed),
      el("small", {}, run.rule_sources?.[rule] ?? "")] };
  }));
  const own = figures(run.more ?? {});
  const more = own.length > 0 && table("Further figures of this benchmark",
    [{ name: "" }, { name: "value", number: true }, { name: "95% interval", number: true }, { name: "0 to 100" }, { name: "counted", number: true }], own);
  const chooser = rules.length > 1 && el("div", { class: "controls" },
    select("rule of the tables and verdicts below", rules.map((rule) => [rule, rule]), choose));
  if (chooser) chooser.querySelector("select").value = run.rule;
  const section = headline(run, scores, more, chooser, tables, list);
  choose(run.rule);
  return section;
}

function comparisons(kind) {
  const pairs = data.comparisons.filter((pair) => (pair.bench === "niah") === (kind === "needles"));
  if (!pairs.length) return null;
  const [group, unit, note] = kind === "needles" ? ["length", "cells", "Paired, on the cells with the same needle that ran in both runs; clustered by needle."]
    : ["rule", "questions", "Paired, on the questions that a rule counts in both runs; clustered by video."];
  const columns = [{ name: group }, { name: "difference, points", number: true }, { name: "95% interval", number: true }, { name: "p", number: true }, { name: unit, number: true }, { name: "needed for 2 points", number: true }];
  return [el("h3", {}, "Differences"), el("p", { class: "meta" }, note),
    el("div", { class: "tables" }, pairs.map((pair) => table(`${pair.first} minus ${pair.second}`, columns,
      Object.entries(pair.rules).map(([rule, e]) => ({ cells: [rule, percent(e.mean), range(e.low, e.high),
        e.p_value === null ? "–" : e.p_value.toFixed(3), count(e.counted), e.needed === null ? "–" : count(e.needed)] })))))];
}
