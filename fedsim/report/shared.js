"use strict";
// What every page of fedsim does: rows from columns, charts by Vega-Embed, files, light and dark, tables that sort, texts to copy.
const pages = (() => {
  const $ = (selector, root = document) => root.querySelector(selector);
  const $$ = (selector, root = document) => [...root.querySelectorAll(selector)];
  const read = () => JSON.parse(document.getElementById("data").textContent);

  // ---- rows: columns, where repeated texts are numbered, become objects
  const cache = new Map();
  function unpack(packed) {
    if (cache.has(packed)) return cache.get(packed);
    const rows = Array.from({ length: packed.length }, () => ({}));
    for (const [name, column] of Object.entries(packed.columns)) {
      const { levels, values } = column;
      values.forEach((v, i) => { rows[i][name] = levels ? levels[v] : v; });
    }
    cache.set(packed, rows);
    return rows;
  }

  // ---- specifications and charts
  const walk = (node, visit) => {
    if (node === null || typeof node !== "object") return;
    visit(node);
    Object.values(node).forEach((child) => walk(child, visit));
  };

  const escaped = (value) => String(value).replace(/[&<>"']/g, (c) => `&#${c.charCodeAt(0)};`);
  function formatTooltip(value) {
    if (value === null || typeof value !== "object") return escaped(value);
    const lines = Object.entries(value).filter(([, v]) => v !== null && v !== undefined && !["", "null", "NaN", "undefined"].includes(String(v)));
    return `<table>${lines.map(([k, v]) => `<tr><td>${escaped(k)}</td><td>${escaped(v)}</td></tr>`).join("")}</table>`;
  }
  const OPTIONS = { mode: "vega-lite", renderer: "svg", actions: false, ast: true, defaultStyle: false };

  // ---- files
  function save(name, url) {
    const link = document.createElement("a");
    link.href = url;
    link.download = name;
    link.click();
  }
  const saveText = (name, type, text) => {
    const url = URL.createObjectURL(new Blob([text], { type }));
    save(name, url);
    setTimeout(() => URL.revokeObjectURL(url), 1000);
  };
  const recoloured = (spec, colours) => JSON.parse(JSON.stringify(spec).replace(/var\(--([\w-]+)\)/g, (all, name) => colours[name] ?? all));

  function csv(rows) {
    const names = Object.keys(rows[0] || {});
    const cell = (v) => (v === null || v === undefined ? "" : /[",\n]/.test(v) ? `"${String(v).replaceAll('"', '""')}"` : v);
    return [names, ...rows.map((row) => names.map((n) => row[n]))].map((line) => line.map(cell).join(",")).join("\n") + "\n";
  }

  // ---- light and dark
  const theme = $("#theme");
  const dark = () => (document.documentElement.dataset.theme || (matchMedia("(prefers-color-scheme: dark)").matches ? "dark" : "light")) === "dark";
  const label = () => { theme.textContent = dark() ? "Light" : "Dark"; };
  theme.addEventListener("click", () => { document.documentElement.dataset.theme = dark() ? "light" : "dark"; label(); });
  matchMedia("(prefers-color-scheme: dark)").addEventListener("change", label);
  label();

  // ---- tables
  for (const button of $$("th button")) {
    button.addEventListener("click", () => {
      const head = button.closest("th");
      const table = head.closest("table");
      const column = [...head.parentNode.children].indexOf(head);
      const before = head.getAttribute("aria-sort");
      const down = (before === null ? head.dataset.first : before === "ascending" ? "descending" : "ascending") === "descending";
      $$("th[aria-sort]", table).forEach((th) => th.removeAttribute("aria-sort"));
      head.setAttribute("aria-sort", down ? "descending" : "ascending");
      const rows = $$("tbody tr", table);
      const key = (row) => row.children[column].dataset.value;
      const undefinedLast = (a, b) => (key(a) === "") - (key(b) === "");
      const order = (a, b) => (isNaN(key(a)) || isNaN(key(b)) ? key(a).localeCompare(key(b)) : key(a) - key(b));
      rows.sort((a, b) => undefinedLast(a, b) || (down ? -order(a, b) : order(a, b)));
      const body = table.tBodies[0];
      body.append(...rows);
      $$("tbody", table).slice(1).forEach((b) => b.remove());
    });
  }

  // ---- the width: charts are drawn anew once it stays
  function whenResized(draw) {
    let waiting;
    let width = innerWidth;
    addEventListener("resize", () => {
      if (innerWidth === width) return;
      width = innerWidth;
      clearTimeout(waiting);
      waiting = setTimeout(draw, 200);
    });
  }

  // ---- texts
  async function copy(button) {
    const source = document.getElementById(button.dataset.copy);
    try {
      await navigator.clipboard.writeText(source.textContent);
    } catch {
      getSelection().selectAllChildren(source);
      document.execCommand("copy");
      getSelection().removeAllRanges();
    }
    button.textContent = "Copied";
    setTimeout(() => { button.textContent = "Copy"; }, 1500);
  }
  $$("button[data-copy]").forEach((button) => button.addEventListener("click", () => copy(button)));

  return { $, $$, read, unpack, walk, formatTooltip, OPTIONS, save, saveText, recoloured, csv, whenResized };
})();
