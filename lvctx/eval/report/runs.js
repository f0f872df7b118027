// What all kinds of runs have: the table of runs, and notices about failed samples.

const KINDS = { needles: "needles", benchmark: "benchmark", responses: "responses", answers: "answers", training: "training" };
const anchor = (run) => `run-${data.runs.indexOf(run)}`;
const of = (...kinds) => data.runs.filter((run) => kinds.includes(run.kind));
const failed = (run) => run.failures.reduce((sum, f) => sum + f.count, 0);

function kindOf(run) {
  if (run.kind === "needles") return `needles in ${run.grid.modality}`;
  if (run.bench) return run.kind === "responses" ? `${run.bench}, responses` : run.bench;
  if (run.kind === "training" && run.command) return `training, ${run.command}`;
  return KINDS[run.kind];
}

function scoreOf(run) {
  if (run.kind === "needles") {
    const [low, high] = run.grid.interval ?? [];
    return { mean: run.grid.accuracy, low, high };
  }
  return run.rules?.[run.rule] ?? null;
}

function metaOf(run) {
  const bad = failed(run);
  const parts = [run.model && `model ${run.model}`, run.protocol && `protocol ${run.protocol}`,
    run.kind === "training" ? plural(run.samples, "step", "steps") : plural(run.samples, "sample", "samples"),
    bad && `${count(bad)} failed`];
  return el("p", { class: "meta" }, parts.filter(Boolean).join(" · "));
}

function headline(run, ...children) {
  return el("section", { id: anchor(run), "aria-labelledby": `${anchor(run)}-name` },
    el("h3", { id: `${anchor(run)}-name` }, run.name), metaOf(run), children);
}

function notices() {
  const bad = data.runs.filter((run) => failed(run));
  const warned = data.runs.flatMap((run) => (run.warnings ?? []).map((warning) => `${run.name}: ${warning}`));
  const found = [];
  if (bad.length) {
    const sum = bad.reduce((total, run) => total + failed(run), 0);
    found.push(el("div", { class: "notice", role: "note" },
      el("p", {}, el("strong", {}, `${plural(sum, "sample", "samples")} failed`), " and are in no score."),
      bad.map((run) => lazy(`${run.name}: ${count(failed(run))} of ${count(run.samples)}`, () =>
        el("ul", {}, run.failures.slice(0, 20).map((f) => el("li", {}, `${count(f.count)} × ${f.error}`)),
          run.failures.length > 20 && el("li", {}, `${count(run.failures.length - 20)} other messages`))))));
  }
  if (warned.length)
    found.push(el("div", { class: "notice", role: "note" }, warned.map((line) => el("p", {}, line))));
  return found;
}

function effectiveOf(run) {
  if (run.kind !== "needles") return run.more?.effective_length == null ? null : count(run.more.effective_length);
  const { lengths, effective_length: found, effective_tokens: tokens, falls, unit } = run.grid;
  if (run.grid.accuracy == null) return null;
  if (found == null) return `< ${count(lengths[0])} ${unit}`;
  return `${falls ? "" : "≥ "}${count(found)} ${unit}${unit === "frames" && tokens ? ` (${count(tokens)} tokens)` : ""}`;
}

function summary() {
  const all = [
    ["run", (run) => el("a", { href: `#${anchor(run)}` }, run.name)],
    ["kind", kindOf],
    ["model", (run) => run.model],
    ["samples", (run) => [count(run.samples), failed(run) > 0 && [el("br"), el("small", {}, `${count(failed(run))} failed`)]], true],
    ["score, %", (run) => scoreOf(run) && [percent(scoreOf(run).mean), run.rule && [el("br"), el("small", {}, run.rule)]], true],
    ["95% interval", (run) => scoreOf(run) && range(scoreOf(run).low, scoreOf(run).high), true],
    ["0 to 100", (run) => interval(scoreOf(run))],
    ["effective length", effectiveOf],
    ["last loss", (run) => run.kind === "training" && short(run.loss), true],
    ["protocol", (run) => run.protocol],
  ];
  const columns = all.filter(([, make]) => data.runs.some(make)).map(([name, make, number]) => ({ name, make, number }));
  const rows = data.runs.map((run) => ({ cells: columns.map(({ make }) => make(run) || null) }));
  return [table(`Intervals of benchmarks are clustered by video, those of needle tests by needle; their effective length is at ${data.threshold}`, columns, rows)];
}
