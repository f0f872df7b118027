// Trainings, costs and provenance; and the page itself.

const FIRST = ["loss", "norm", "tokens_per_second", "memory_bytes"];
const titleOf = (name) => (name === "memory_bytes" ? "memory, GiB" : name.replaceAll("_", " "));
const scaled = (name, value) => (name === "memory_bytes" ? value / 2 ** 30 : value);
function trainings() {
  const runs = of("training");
  const names = [...new Set(runs.flatMap((run) => Object.keys(run.curves)))];
  const rank = (name) => (name.startsWith("lr_") ? 1.5 : FIRST.includes(name) ? FIRST.indexOf(name) : 9);
  names.sort((a, b) => rank(a) - rank(b));
  const plot = (name) => chart(titleOf(name), runs.filter((run) => run.curves[name]).map((run) => ({
    name: run.name, points: run.curves[name].map(([x, y]) => ({ x, y: scaled(name, y) })) })), { xLabel: "step", width: 420, height: 220 });
  const rest = names.filter((name) => rank(name) === 9);
  const numbers = (run) => {
    const steps = run.curves.loss.map(([x]) => x), every = Math.ceil(steps.length / 20);
    const chosen = steps.map((_, i) => i).filter((i) => i % every === 0 || i === steps.length - 1);
    const columns = names.filter((name) => rank(name) < 9 && run.curves[name]?.length === steps.length);
    return table(`Some steps of ${run.name}`, [{ name: "step" }, ...columns.map((name) => ({ name: titleOf(name), number: true }))],
      chosen.map((i) => ({ cells: [count(steps[i]), ...columns.map((name) => short(scaled(name, run.curves[name][i][1])))] })));
  };
  return [el("div", { class: "charts" }, names.filter((name) => rank(name) < 9).map(plot)),
    rest.length > 0 && lazy("More curves", () => el("div", { class: "charts" }, rest.map(plot))),
    runs.map((run) => headline(run, lazy("Numbers", () => numbers(run))))];
}

function amount(name, value) {
  if (name.endsWith("seconds")) return `${value < 100 ? value.toFixed(2) : count(Math.round(value))} s`;
  return name.endsWith("bytes") ? `${(value / 2 ** 30).toFixed(2)} GiB` : count(Math.round(value));
}

function costs() {
  const runs = data.runs.filter((run) => run.costs.samples);
  if (!runs.length) return null;
  const names = [...new Set(runs.flatMap((run) => Object.keys(run.costs.total)))];
  const label = (name) => name.replace(/_(seconds|bytes)$/, "").replaceAll("_", " ");
  const columns = [{ name: "run" }, { name: "samples", number: true }, ...names.map((name) => ({ name: label(name), number: true }))];
  const rows = runs.map(({ name: run, costs: { samples, total, median } }) => ({ cells: [run, count(samples), ...names.map((name) =>
    name in total ? [amount(name, total[name]), el("br"), el("small", {}, amount(name, median[name]))] : "–")] }));
  return [table("Totals over the samples (or steps) that state what they cost, with medians below; of memory the maximum", columns, rows)];
}

function provenance() {
  return data.runs.map((run) => lazy(run.name, () => [el("p", { class: "meta" }, run.path),
    table(`Provenance of ${run.name}`, [{ name: "fact" }, { name: "value" }],
      flatten(run.provenance).map(([name, value]) => ({ cells: [name, el("code", {}, value)] })))]));
}

const PARTS = [
  ["summary", "Runs", summary],
  ["needles", "Needle tests", () => of("needles").length && [needleCurves(), comparisons("needles"), el("div", { class: "abreast" }, of("needles").map(heatmap))]],
  ["benchmarks", "Benchmarks", () => of("benchmark", "responses").length && [comparisons("questions"), of("benchmark", "responses").map(benchmark)]],
  ["answers", "Answers", () => of("answers").length && of("answers").map((run) => {
    const [list, setRule] = questions(run);
    setRule(-1);
    return headline(run, list);
  })],
  ["training", "Training", () => of("training").length && trainings()],
  ["costs", "Costs", costs],
  ["provenance", "Provenance", provenance],
];

main.replaceChildren(...notices());
for (const [id, title, make] of PARTS) {
  const content = make();
  if (!content) continue;
  main.append(build(el("section", { id, "aria-labelledby": `${id}-title` }, el("h2", { id: `${id}-title` }, title)), {}, [content]));
  document.getElementById("sections").append(el("a", { href: `#${id}` }, title));
}
document.getElementById("subtitle").textContent = `${plural(data.runs.length, "run", "runs")}, ${plural(data.runs.reduce((sum, run) => sum + run.samples, 0), "row", "rows")}`;
document.getElementById("footer").textContent = [`Written by lvctx ${data.version}. This file loads nothing else.`,
  data.videos_without_images ? `${plural(data.videos_without_images, "video has", "videos have")} no images: the file could not be read, or the report is full.` : ""].join(" ");
if (location.hash) document.getElementById(location.hash.slice(1))?.scrollIntoView();
