"use strict";
(() => {
  const DATA = JSON.parse(document.getElementById("data").textContent);
  const $ = (selector, root = document) => root.querySelector(selector);
  const $$ = (selector, root = document) => [...root.querySelectorAll(selector)];
  const shown = new Set(DATA.series.slice(0, DATA.shown).map((s) => s.text));
  const figures = DATA.figures.map((figure) => ({ ...figure, card: document.getElementById(`figure-${figure.name}`), view: null, turn: 0 }));
  const PAPER = 760; // of a chart that goes to print, in pixels
  let run = DATA.run;

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

  function chosen(figure) {
    return Object.fromEntries(figure.selects.map((field) => {
      const select = $(`select[data-field="${field}"]`, field === "split" ? document : figure.card);
      return [field, { value: select.value, text: select.selectedOptions[0].textContent }];
    }));
  }

  function rowsOf(figure) {
    const place = figure.perRun ? figure.rowsAt[run] : 0;
    let rows = unpack(figure.rows[place]);
    if (figure.perRun) return rows;
    for (const [field, { value }] of Object.entries(chosen(figure))) rows = rows.filter((row) => row[field] === value);
    const visible = DATA.series.map((s) => s.text).filter((t) => shown.has(t)).slice(0, figure.limit || undefined);
    return rows.filter((row) => visible.includes(row.series));
  }

  // ---- specifications
  const walk = (node, visit) => {
    if (node === null || typeof node !== "object") return;
    visit(node);
    Object.values(node).forEach((child) => walk(child, visit));
  };

  function build(figure, rows, width) {
    const choices = chosen(figure);
    const spec = JSON.parse(JSON.stringify(figure.specs[figure.perRun ? figure.specAt[run] : 0]), (_, value) =>
      typeof value === "string" && /^{{\w+}}$/.test(value) ? choices[value.slice(2, -2)]?.text ?? value : value);
    const present = new Set(rows.map((row) => row.series));
    walk(spec, (node) => {
      if (["series", "kind", "tested"].includes(node.field) && node.legend) {
        const values = [...new Set(rows.map((row) => row[node.field]))];
        if (node.legend.values) node.legend.values = node.legend.values.filter((value) => present.has(value));
        const longest = Math.max(1, ...values.map((value) => String(value).length));
        node.legend.columns = Math.max(1, Math.floor((Math.min(width, PAPER) - 30) / (6 * longest + 34)));
        node.legend.labelLimit = Math.max(80, width - 60);
      }
      if (node.axis?.labelLimit && width < 480) node.axis.labelLimit = Math.round(width / 3.2);
    });
    if (spec.facet) {
      const panels = new Set(rows.map((row) => row[spec.facet.field])).size;
      const most = Math.max(1, Math.min(panels, Math.floor(width / 230)));
      const columns = Math.ceil(panels / Math.ceil(panels / most)); // no row with one panel left over
      const side = Math.max(90, Math.min(560, Math.floor((width - 60 - 20 * (columns - 1)) / columns)));
      Object.assign(spec, { columns });
      Object.assign(spec.spec, { width: side, height: Math.round(Math.min(side * 0.8, 280)) });
    } else spec.width = width;
    if (spec.usermeta?.step) spec.height = spec.usermeta.step * present.size;
    spec.datasets = { ...spec.datasets, rows };
    return spec;
  }

  // ---- drawing
  const escaped = (value) => String(value).replace(/[&<>"']/g, (c) => `&#${c.charCodeAt(0)};`);
  function formatTooltip(value) {
    if (value === null || typeof value !== "object") return escaped(value);
    const lines = Object.entries(value).filter(([, v]) => v !== null && v !== undefined && !["", "null", "NaN", "undefined"].includes(String(v)));
    return `<table>${lines.map(([k, v]) => `<tr><td>${escaped(k)}</td><td>${escaped(v)}</td></tr>`).join("")}</table>`;
  }
  const OPTIONS = { mode: "vega-lite", renderer: "svg", actions: false, ast: true, defaultStyle: false };

  async function draw(figure) {
    const turn = ++figure.turn;
    const place = $(".chart", figure.card);
    const rows = rowsOf(figure);
    if (figure.view) figure.view.finalize();
    figure.view = null;
    if (!rows.length) {
      place.innerHTML = '<p class="empty">Nothing to show for this choice.</p>';
      return;
    }
    const spec = build(figure, rows, place.clientWidth);
    const { view, finalize } = await vegaEmbed(place, spec, { ...OPTIONS, tooltip: { disableDefaultStyle: true, formatTooltip } });
    if (turn === figure.turn) figure.view = { view, finalize, spec };
    else finalize();
    for (const [field, choice] of Object.entries(chosen(figure))) $(`.chosen[data-field="${field}"]`, figure.card).textContent = choice.text;
  }

  async function drawAll(which = () => true) {
    document.body.dataset.drawn = "no";
    for (const figure of figures.filter(which)) {
      await draw(figure);
      await new Promise((resolve) => setTimeout(resolve)); // lets the page breathe
    }
    document.body.dataset.drawn = "yes";
  }

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
  const light = (spec) => JSON.parse(JSON.stringify(spec).replace(/var\(--([\w-]+)\)/g, (all, name) => DATA.light[name] ?? all));

  function csv(rows) {
    const names = Object.keys(rows[0] || {});
    const cell = (v) => (v === null || v === undefined ? "" : /[",\n]/.test(v) ? `"${String(v).replaceAll('"', '""')}"` : v);
    return [names, ...rows.map((row) => names.map((n) => row[n]))].map((line) => line.map(cell).join(",")).join("\n") + "\n";
  }

  async function saveFigure(figure, kind) {
    const rows = rowsOf(figure);
    const name = [DATA.file, figure.name, ...Object.values(chosen(figure)).map((c) => c.value), ...(figure.perRun ? [DATA.runs[run]] : [])]
      .join("-").replace(/[^\w.-]+/g, "-");
    if (kind === "csv") return saveText(`${name}.csv`, "text/csv", csv(rows));
    const spec = { ...light(build(figure, rows, 640)), background: "white" };
    if (kind === "json") return saveText(`${name}.vl.json`, "application/json", JSON.stringify(spec, null, 1));
    const place = document.createElement("div");
    const { view, finalize } = await vegaEmbed(place, spec, OPTIONS);
    save(`${name}.${kind}`, await view.toImageURL(kind, kind === "png" ? 3 : 1));
    finalize();
  }

  // ---- controls
  for (const figure of figures) {
    for (const select of $$("select[data-field]", figure.card)) select.addEventListener("change", () => draw(figure));
    for (const button of $$("button[data-save]", figure.card)) button.addEventListener("click", () => saveFigure(figure, button.dataset.save));
  }
  const split = $("#split");
  if (split) split.addEventListener("change", () => { rank(); drawAll((f) => f.selects.includes("split")); });
  const runs = $("#which");
  if (runs) runs.addEventListener("change", () => { run = Number(runs.value); $("#run-name").textContent = DATA.runs[run]; drawAll((f) => f.perRun); });

  const picker = $("#series");
  function rank() {
    if (!picker) return;
    const scores = DATA.scores[split ? split.value : Object.keys(DATA.scores)[0]] || {};
    const items = $$("li", picker);
    for (const item of items) {
      const score = scores[item.dataset.series];
      item.dataset.score = score ?? -1;
      $(".value", item).textContent = score === undefined ? "–" : score.toFixed(1);
    }
    $("ul", picker).append(...items.sort((a, b) => b.dataset.score - a.dataset.score));
    $("summary span", picker).textContent = `${shown.size} of ${DATA.series.length} series`;
  }
  if (picker) {
    const show = (items) => {
      shown.clear();
      items.forEach((item) => shown.add(item.dataset.series));
      $$("li", picker).forEach((item) => { $("input", item).checked = shown.has(item.dataset.series); });
      rank();
      drawAll((f) => !f.perRun);
    };
    const matching = () => $$("li", picker).filter((item) => !item.hidden);
    $("input[type=search]", picker).addEventListener("input", (event) => {
      const words = event.target.value.toLowerCase().split(/\s+/);
      $$("li", picker).forEach((item) => { item.hidden = !words.every((w) => item.dataset.series.toLowerCase().includes(w)); });
    });
    $("[data-pick=best]", picker).addEventListener("click", () => show(matching().slice(0, DATA.shown)));
    $("[data-pick=all]", picker).addEventListener("click", () => show(matching()));
    $("[data-pick=none]", picker).addEventListener("click", () => show([]));
    $("ul", picker).addEventListener("change", () => show($$("li", picker).filter((item) => $("input", item).checked)));
    document.addEventListener("click", (event) => { if (!picker.contains(event.target)) picker.open = false; });
    document.addEventListener("keydown", (event) => { if (event.key === "Escape") picker.open = false; });
    rank();
  }

  const theme = $("#theme");
  const dark = () => (document.documentElement.dataset.theme || (matchMedia("(prefers-color-scheme: dark)").matches ? "dark" : "light")) === "dark";
  const label = () => { theme.textContent = dark() ? "Light" : "Dark"; };
  theme.addEventListener("click", () => { document.documentElement.dataset.theme = dark() ? "light" : "dark"; label(); });
  matchMedia("(prefers-color-scheme: dark)").addEventListener("change", label);
  label();

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

  const search = $("#search");
  if (search) {
    search.addEventListener("input", () => {
      const wanted = search.value.toLowerCase().trim();
      $$("details.run").forEach((item) => { item.hidden = !item.textContent.toLowerCase().includes(wanted); });
    });
  }
  $$("button[data-table]").forEach((button) => button.addEventListener("click", () => saveText(`${DATA.file}-runs.csv`, "text/csv", DATA.csv)));

  // Charts are laid out for the sheet at once, since a printer does not wait.
  function relayout(paper) {
    for (const { view: result } of figures) {
      if (!result) continue;
      const { spec, view } = result;
      if (spec.facet) view.signal("child_width", paper ? Math.floor((PAPER - 60) / spec.columns) - 20 : spec.spec.width);
      else view.width(paper ? PAPER : spec.width);
      view.resize().run();
    }
  }
  addEventListener("beforeprint", () => relayout(true));
  addEventListener("afterprint", () => relayout(false));

  let resized;
  let width = innerWidth;
  addEventListener("resize", () => {
    if (innerWidth === width) return;
    width = innerWidth;
    clearTimeout(resized);
    resized = setTimeout(() => drawAll(), 200);
  });
  drawAll();
})();
