// Draws the charts in the page's own colours, again when the colour scheme changes or the page is printed (A4, landscape).
(function () {
  const charts = JSON.parse(document.getElementById("charts").textContent);
  const style = getComputedStyle(document.documentElement);
  function colours(print) {
    const ink = print ? "#000" : style.getPropertyValue("--ink").trim();
    const line = print ? "#bbb" : style.getPropertyValue("--line").trim();
    const of = (layout) => {
      const change = { "font.color": ink, width: print ? 1000 : null, autosize: !print };
      for (const key of Object.keys(layout)) {
        if (/^[xy]axis\d*$/.test(key)) Object.assign(change, { [key + ".gridcolor"]: line, [key + ".linecolor"]: line, [key + ".zerolinecolor"]: line });
      }
      return change;
    };
    for (const key of Object.keys(charts)) Plotly.relayout("chart-" + key, of(charts[key].layout));
  }
  const drawn = Object.entries(charts).map(([key, chart]) =>
    Plotly.newPlot("chart-" + key, chart.data, chart.layout, { responsive: true, displayModeBar: false, plotlyServerURL: "", scrollZoom: false }));
  Promise.all(drawn).then(() => { colours(false); document.body.dataset.drawn = drawn.length; });
  matchMedia("(prefers-color-scheme: dark)").addEventListener("change", () => colours(false));
  addEventListener("beforeprint", () => colours(true));
  addEventListener("afterprint", () => colours(false));
})();
