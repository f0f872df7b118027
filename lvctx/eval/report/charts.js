// Line charts and intervals as SVG.

function ticks(low, high, wanted = 5) {
  if (high <= low) return [low];
  const rough = (high - low) / wanted, power = 10 ** Math.floor(Math.log10(rough));
  const step = [1, 2, 5, 10].map((m) => m * power).find((s) => s >= rough);
  const found = [];
  for (let t = Math.ceil(low / step) * step; t <= high + step * 1e-6; t += step) found.push(Number(t.toPrecision(12)));
  return found;
}

function short(value) {
  const size = Math.abs(value);
  if (size >= 1e9) return `${+(value / 1e9).toPrecision(3)}G`;
  if (size >= 1e6) return `${+(value / 1e6).toPrecision(3)}M`;
  if (size >= 1e4) return `${+(value / 1e3).toPrecision(3)}k`;
  return size && size < 1e-3 ? value.toExponential(1) : String(+value.toPrecision(4));
}

/** series: [{name, points: [{x, y, low, high}]}]; log: x axis in powers, with a tick at every x. */
function chart(title, series, { xLabel, yLow, yHigh, log = false, limit = null, width = 640, height = 260 } = {}) {
  const points = series.flatMap((s) => s.points).filter((p) => p.y != null && p.x != null && (!log || p.x > 0));
  if (!points.length) return null;
  const left = 52, right = 14, top = 12, bottom = 44, scale = log ? Math.log : (x) => x;
  const xs = points.map((p) => scale(p.x)), x0 = Math.min(...xs), x1 = Math.max(...xs);
  const ys = points.map((p) => p.y), y0 = yLow ?? Math.min(...ys), y1 = yHigh ?? Math.max(...ys);
  const margin = yLow == null ? (y1 - y0 || Math.abs(y1) || 1) * 0.06 : 0;
  const X = (x) => left + (x1 === x0 ? 0.5 : (scale(x) - x0) / (x1 - x0)) * (width - left - right);
  const Y = (y) => top + (1 - (y - y0 + margin) / (y1 - y0 + 2 * margin || 1)) * (height - top - bottom);
  const parts = ticks(y0, y1).map((t) => [
    draw("line", { class: "grid", x1: left, x2: width - right, y1: Y(t), y2: Y(t) }),
    draw("text", { x: left - 8, y: Y(t) + 4, "text-anchor": "end" }, short(t))]);
  let last = -Infinity;
  const marks = log ? [...new Set(points.map((p) => p.x))].sort((a, b) => a - b) : ticks(x0, x1);
  for (const t of marks) {
    if (X(t) - last < 46) continue;
    last = X(t);
    parts.push(draw("text", { x: X(t), y: height - bottom + 18, "text-anchor": "middle" }, short(t)));
  }
  parts.push(draw("text", { x: (left + width - right) / 2, y: height - 6, "text-anchor": "middle" }, xLabel));
  if (limit != null)
    parts.push(draw("line", { class: "limit", x1: left, x2: width - right, y1: Y(limit), y2: Y(limit) }));
  series.forEach((s, i) => {
    const found = s.points.filter((p) => p.y != null && p.x != null && (!log || p.x > 0));
    const style = `s${i % 6}`, banded = found.filter((p) => p.low != null);
    if (banded.length > 1) {
      const path = [...banded.map((p) => `${X(p.x)},${Y(p.high)}`), ...banded.reverse().map((p) => `${X(p.x)},${Y(p.low)}`)];
      parts.push(draw("polygon", { class: `band ${style}`, points: path.join(" ") }));
    }
    parts.push(draw("polyline", { class: `${style} line`, fill: "none", points: found.map((p) => `${X(p.x)},${Y(p.y)}`).join(" ") }));
    if (found.length <= 40)
      parts.push(found.map((p) => draw("circle", { class: style, cx: X(p.x), cy: Y(p.y), r: 4 },
        draw("title", {}, `${s.name}: ${short(p.y)} at ${count(p.x)}`))));
  });
  const legend = series.length > 1 && el("ul", { class: "legend" }, series.map((s, i) =>
    el("li", {}, draw("svg", { viewBox: "0 0 30 8", "aria-hidden": "true" },
      draw("line", { class: `s${i % 6} line`, x1: 0, x2: 30, y1: 4, y2: 4 })), s.name)));
  return el("figure", { class: "chart" }, el("figcaption", {}, title), legend,
    draw("svg", { viewBox: `0 0 ${width} ${height}`, role: "img", "aria-label": `${title}; ${series.map((s) => s.name).join(", ")}` }, parts.flat()));
}

/** A mean with its interval on a scale from 0 to 100; the numbers stand beside it. */
function interval(e) {
  if (!e || e.mean == null) return null;
  return draw("svg", { class: "plot", viewBox: "-3 0 106 12", preserveAspectRatio: "none", "aria-hidden": "true" },
    draw("line", { class: "axis", x1: 0, x2: 100, y1: 6, y2: 6 }),
    e.low == null ? null : draw("line", { class: "range", x1: 100 * e.low, x2: 100 * e.high, y1: 6, y2: 6 }),
    draw("rect", { class: "dot", x: 100 * e.mean - 1, y: 1.5, width: 2, height: 9 }));
}
