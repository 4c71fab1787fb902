"use strict";
(() => {
  const { $, $$, unpack, walk, formatTooltip, OPTIONS, save, saveText, recoloured, whenResized } = pages;
  const DATA = pages.read();
  const rows = unpack(DATA.rows);
  const curves = unpack(DATA.curves);
  const bounds = unpack(DATA.bounds);
  const figures = $$("figure.card").map((card) => ({ name: card.id.replace("figure-", ""), card, turn: 0 }));
  const choice = (name) => $(`#${name}`).value;

  // ---- which methods and rows are shown
  function wanted() {
    const words = $("#search").value.toLowerCase().split(/\s+/);
    const [family, sees] = [choice("family"), choice("sees")];
    const fits = (m) => (!family || m.family === family) && (!sees || m.sees.includes(sees)) && words.every((w) => m.text.includes(w));
    return new Set(Object.keys(DATA.methods).filter((name) => fits(DATA.methods[name])));
  }
  const here = (row, split = true) => row.stream === choice("stream") && (!split || row.split === choice("split") || row.split === DATA.any);

  function filterTable() {
    const methods = wanted();
    let count = 0;
    for (const row of $$("#table tbody tr")) {
      row.hidden = !(row.dataset.stream === choice("stream") && row.dataset.split === choice("split") && methods.has(row.dataset.method));
      count += !row.hidden;
    }
    for (const line of $$("ul.bounds")) line.hidden = !(line.dataset.stream === choice("stream") && line.dataset.split === choice("split"));
    for (const fold of $$("details.run")) fold.hidden = !methods.has(fold.dataset.method);
    $("#count").textContent = `${count} of ${Object.keys(DATA.methods).length} methods shown.`;
    return methods;
  }

  function fillSplits(before) {
    const select = $("#split");
    const splits = DATA.splits[choice("stream")];
    select.replaceChildren(...splits.map((s) => new Option(DATA.splitNames[s], s)));
    select.value = splits.includes(before) ? before : DATA.usual[choice("stream")];
  }

  // ---- charts
  function spec(name, data, lines, width) {
    const chart = JSON.parse(JSON.stringify(DATA.specs[name]));
    const families = new Set(data.map((row) => row.family));
    walk(chart, (node) => {
      if (node.field === "family" && node.scale && node.legend) {
        const kept = node.scale.domain.map((f, i) => [f, node.scale.range[i]]).filter(([f]) => families.has(f));
        node.scale = { domain: kept.map(([f]) => f), range: kept.map(([, look]) => look) };
      }
      if (node.field === "split" && node.scale) node.scale.domain = [...new Set(data.map((row) => row.split))]; // one legend
      if (node.field === "bound" && node.scale) {
        const kept = node.scale.domain.map((b, i) => [b, node.scale.range[i]]).filter(([b]) => lines.some((line) => line.bound === b));
        node.scale = { domain: kept.map(([b]) => b), range: kept.map(([, dash]) => dash) };
      }
      if (node.legend) node.legend.columns = Math.max(1, Math.floor((width - 20) / (node.field === "bound" ? 190 : 130)));
      if (node.axis?.labelLimit && width < 480) node.axis.labelLimit = Math.round(width / 3);
    });
    if (chart.usermeta?.step) chart.height = Math.max(120, chart.usermeta.step * data.length);
    return { ...chart, width, datasets: { ...chart.datasets, rows: data, bounds: lines } };
  }

  const points = (name, methods) => rows
    .filter((row) => here(row) && methods.has(row.method) && row.mean !== null && (name === "ranking" || row.method !== DATA.joint))
    .map((row) => ({ ...row, family: DATA.methods[row.method].family, sees: DATA.methods[row.method].sees.join("; ") }));

  async function show(place, chart) {
    return vegaEmbed(place, chart, { ...OPTIONS, tooltip: { disableDefaultStyle: true, formatTooltip } });
  }

  async function draw(figure, methods) {
    const turn = ++figure.turn;
    const place = $(".chart", figure.card);
    const data = points(figure.name, methods);
    $(".chosen", figure.card).textContent = `${choice("stream")}, ${DATA.splitNames[choice("split")]}`;
    figure.view?.finalize();
    figure.view = null;
    if (!data.length) {
      place.innerHTML = '<p class="empty">Nothing to show for this choice.</p>';
      return;
    }
    const view = await show(place, spec(figure.name, data, bounds.filter((b) => here(b)), place.clientWidth));
    if (turn === figure.turn) figure.view = view;
    else view.finalize();
  }

  async function drawCurve(fold) {
    const found = curves.filter((row) => here(row, false) && row.method === fold.dataset.method)
      .map((row) => ({ ...row, split: DATA.splitNames[row.split] ?? row.split }));
    for (const place of $$(".chart", fold)) {
      const data = found.filter((row) => row.kind === place.dataset.kind);
      if (data.length) await show(place, spec(place.dataset.kind, data, bounds.filter((b) => here(b)), place.clientWidth));
      else place.textContent = "";
    }
  }

  async function update() {
    document.body.dataset.drawn = "no";
    const methods = filterTable();
    for (const figure of figures) {
      await draw(figure, methods);
      await new Promise((resolve) => setTimeout(resolve)); // lets the page breathe
    }
    for (const fold of $$("details.run[open]")) await drawCurve(fold);
    document.body.dataset.drawn = "yes";
  }

  // ---- controls
  for (const name of ["split", "family", "sees"]) $(`#${name}`).addEventListener("change", update);
  $("#stream").addEventListener("change", () => { fillSplits(choice("split")); update(); });
  let typed;
  $("#search").addEventListener("input", () => { filterTable(); clearTimeout(typed); typed = setTimeout(update, 250); });
  for (const fold of $$("details.run")) fold.addEventListener("toggle", () => { if (fold.open) drawCurve(fold); });

  function follow() {
    const fold = document.getElementById(decodeURIComponent(location.hash.slice(1)));
    if (fold?.matches("details.run")) {
      fold.open = true;
      fold.scrollIntoView();
    }
  }
  addEventListener("hashchange", follow);

  $("#csv").addEventListener("click", () => {
    const heads = $$("#table thead th button").map((button) => button.textContent);
    const lines = $$("#table tbody tr").filter((row) => !row.hidden).map((row) => [...row.children].map((cell) => cell.dataset.value));
    const cell = (v) => (/[",\n]/.test(v) ? `"${v.replaceAll('"', '""')}"` : v);
    const text = [heads, ...lines].map((line) => line.map(cell).join(",")).join("\n") + "\n";
    saveText(`${DATA.file}-${choice("stream")}-${choice("split")}.csv`, "text/csv", text);
  });
  for (const figure of figures) {
    for (const button of $$("button[data-save]", figure.card)) {
      button.addEventListener("click", async () => {
        const chart = recoloured(spec(figure.name, points(figure.name, wanted()), bounds.filter((b) => here(b)), 640), DATA.light);
        const { view, finalize } = await vegaEmbed(document.createElement("div"), { ...chart, background: "white" }, OPTIONS);
        const kind = button.dataset.save;
        save(`${DATA.file}-${figure.name}.${kind}`, await view.toImageURL(kind, kind === "png" ? 3 : 1));
        finalize();
      });
    }
  }

  whenResized(update);
  fillSplits();
  update().then(follow);
})();
