// Draw every chart from its specification. The expression interpreter (`ast`) needs no eval, so
// that the page's content security policy can forbid it.
(async () => {
  "use strict";
  document.documentElement.classList.add("js");
  for (const details of document.querySelectorAll("figure.charts details")) details.open = false;
  const options = {
    mode: "vega-lite",
    ast: true,
    renderer: "svg",
    actions: false,
    defaultStyle: false,
    tooltip: { disableDefaultStyle: true, theme: "report" },
  };
  for (const place of document.querySelectorAll("[data-chart]")) {
    try {
      const spec = JSON.parse(document.getElementById("chart-" + place.dataset.chart).textContent);
      await vegaEmbed(place, spec, options);
    } catch (error) {
      console.error(error);
      place.textContent = "This chart could not be drawn; its figures are in the table below.";
      const table = place.closest("figure").querySelector("details");
      if (table) table.open = true;
    }
  }
  document.documentElement.classList.add("drawn");
})();
