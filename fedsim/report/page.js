"use strict";
(() => {
  const { $, $$, unpack, walk, formatTooltip, OPTIONS, save, saveText, recoloured, csv, whenResized } = pages;
  const DATA = pages.read();
  const shown = new Set(DATA.series.slice(0, DATA.shown).map((s) => s.text));
  const figures = DATA.figures.map((figure) => ({ ...figure, card: document.getElementById(`figure-${figure.name}`), view: null, turn: 0 }));
  const PAPER = 760; // of a chart that goes to print, in pixels
  let run = DATA.run;

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
  async function saveFigure(figure, kind) {
    const rows = rowsOf(figure);
    const name = [DATA.file, figure.name, ...Object.values(chosen(figure)).map((c) => c.value), ...(figure.perRun ? [DATA.runs[run]] : [])]
      .join("-").replace(/[^\w.-]+/g, "-");
    if (kind === "csv") return saveText(`${name}.csv`, "text/csv", csv(rows));
    const spec = { ...recoloured(build(figure, rows, 640), DATA.light), background: "white" };
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

  whenResized(() => drawAll());
  drawAll();
})();
