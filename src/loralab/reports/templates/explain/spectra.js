// The reader's own adapter: the spectrum of any of its modules.
"use strict";
(() => {
  const place = page.get("own");
  if (!place) return;
  const modules = JSON.parse(page.get("own-data").textContent);
  const choice = page.get("module");
  for (const [index, module] of modules.entries()) {
    choice.append(page.element("option", { value: index }, module.module));
  }
  const draw = () => {
    const { values, rank, directions } = modules[Number(choice.value)];
    const first = values[0] || 1;
    const total = values.reduce((sum, value) => sum + value ** 2, 0) || 1;
    const width = 400 / values.length;
    let held = 0;
    const energy = [];
    const bars = values.map((value, index) => {
      held += value ** 2;
      energy.push(`${width * (index + 0.5)},${180 - 170 * (held / total)}`);
      const height = 170 * (value / first);
      return page.element("rect", {
        x: width * index + 1, y: 180 - height, width: Math.max(0.5, width - 2), height,
        class: index < directions ? "filled" : "rest",
      });
    });
    page.replace(page.get("spectrum"), [...bars, page.element("path", { d: `M${energy.join("L")}`, class: "curve energy" })]);
    page.get("spectrum-said").textContent = `Rank ${rank ?? "full"}; 90 % of the squared norm lies in`
      + ` ${directions} direction${directions === 1 ? "" : "s"} (filled). The line is the share that so many hold.`;
  };
  choice.addEventListener("input", draw);
  draw();
  const falling = modules.every(({ values }) => values.every((value, i) => i === 0 || value <= values[i - 1] * (1 + 1e-6)));
  page.check("your adapter's singular values fall", falling);
})();
