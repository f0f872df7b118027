"use strict";
// Elements, tables and number formats of the page. The files of the page are joined in the order of page.py.

const PAGE = 25;
const data = JSON.parse(document.getElementById("content").textContent);
let images = null;
const main = document.getElementById("main");
const count = (n) => n.toLocaleString("en");
const percent = (x) => (x == null ? "–" : (100 * x).toFixed(1));
const range = (low, high) => (low == null ? "–" : `${percent(low)} to ${percent(high)}`);
const plural = (n, one, many) => `${count(n)} ${n === 1 ? one : many}`;

// Elements. Texts are text nodes, never markup; attributes of results are only the numbers and labels set below.
function build(node, attributes, children) {
  for (const [name, value] of Object.entries(attributes)) {
    if (value == null || value === false) continue;
    if (name.startsWith("on")) node.addEventListener(name.slice(2), value);
    else node.setAttribute(name, value === true ? "" : value);
  }
  node.append(...children.flat(Infinity).filter((child) => child != null && child !== false));
  return node;
}
const el = (tag, attributes = {}, ...children) => build(document.createElement(tag), attributes, children);
const draw = (tag, attributes = {}, ...children) =>
  build(document.createElementNS("http://www.w3.org/2000/svg", tag), attributes, children);

function table(caption, columns, rows, attributes = {}) {
  const head = columns.map((c) => el("th", { scope: "col", class: c.number && "number" }, c.name));
  const body = rows.map((row) =>
    el("tr", { class: row.class }, row.cells.map((cell, i) => {
      const inside = cell == null ? "–" : cell;
      if (i === 0) return el("th", { scope: "row", class: "wide" }, inside);
      return el("td", { class: columns[i].number ? "number" : columns[i].prose && "prose" }, inside);
    })));
  return el("div", { class: "scroll" },
    el("table", attributes, el("caption", {}, caption), el("thead", {}, el("tr", {}, head)), el("tbody", {}, body)));
}

function definitions(pairs) {
  return el("dl", {}, pairs.filter(([, value]) => value != null && value !== "").map(([name, value]) => [
    el("dt", {}, name), el("dd", { class: typeof value === "string" && "text" }, value)]));
}

/** A details element whose content is made when it is first opened. */
function lazy(title, fill, attributes = {}) {
  const details = el("details", attributes, el("summary", {}, title));
  details.addEventListener("toggle", () => {
    if (details.open && details.childElementCount === 1) details.append(el("div", {}, fill()));
  });
  return details;
}

function select(label, options, onchange) {
  const list = options.map(([value, text]) => el("option", { value }, text));
  return el("label", {}, label, el("select", { onchange: (event) => onchange(event.target.value) }, list));
}

function clock(seconds) {
  const s = Math.abs(seconds), whole = Math.floor(s), pad = (n) => String(n).padStart(2, "0");
  const text = `${Math.floor(whole / 3600)}:${pad(Math.floor(whole / 60) % 60)}:${pad(whole % 60)}`;
  return `${seconds < 0 ? "-" : ""}${text}.${Math.floor((s - whole) * 10)}`;
}

/** Thumbnails by their numbers: [number] or [caption, number]. */
function pictures(entries) {
  if (!entries || !entries.length) return null;
  images ??= JSON.parse(document.getElementById("images").textContent);
  return el("div", { class: "frames" }, entries.map((entry) => {
    const [caption, number] = Array.isArray(entry) ? entry : ["", entry];
    const { jpeg, seconds } = images[number];
    const text = [caption, seconds == null ? "" : clock(seconds)].filter(Boolean).join(", ");
    return el("figure", {}, el("img", { src: `data:image/jpeg;base64,${jpeg}`, alt: text || "image" }),
      el("figcaption", {}, text));
  }));
}

function flatten(value, prefix = "") {
  if (value !== null && typeof value === "object" && !Array.isArray(value) && Object.keys(value).length)
    return Object.entries(value).flatMap(([key, part]) => flatten(part, prefix ? `${prefix}.${key}` : key));
  return [[prefix, typeof value === "string" ? value : JSON.stringify(value)]];
}
