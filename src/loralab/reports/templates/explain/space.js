// The rows of a 3 x 3 matrix as vectors one can turn, with what they span.
"use strict";
(() => {
  const EXAMPLES = {
    identity: [[1, 0, 0], [0, 1, 0], [0, 0, 1]],
    line: [[1, 0, 0], [3, 0, 0], [0, 0, 0]],
    plane: [[1, 0, 0], [0, 1, 1], [0, 0, 0]],
  };
  const COLOURS = ["#0072b2", "#d55e00", "#009e73"];
  const WORDS = ["a point", "a line", "a plane", "all of space"];
  const svg = page.get("space");
  const inputs = [...document.querySelectorAll("#matrix input")];
  let [turn, tilt] = [0.6, 0.45];

  const matrix = () => [0, 1, 2].map((i) => [0, 1, 2].map((j) => Number(inputs[3 * i + j].value) || 0));
  const project = ([x, y, z], unit) => {
    const across = Math.cos(turn) * x - Math.sin(turn) * y;
    const away = Math.sin(turn) * x + Math.cos(turn) * y;
    return [unit * across, -unit * (Math.cos(tilt) * z - Math.sin(tilt) * away)];
  };

  // Two or fewer orthonormal directions that span the rows (Gram and Schmidt).
  const basis = (rows) => {
    const found = [];
    for (const row of rows) {
      let rest = row.slice();
      for (const b of found) {
        const along = rest.reduce((sum, x, i) => sum + x * b[i], 0);
        rest = rest.map((x, i) => x - along * b[i]);
      }
      const length = Math.hypot(...rest);
      if (length > 1e-9 * Math.max(1, Math.hypot(...row))) found.push(rest.map((x) => x / length));
    }
    return found;
  };

  const draw = () => {
    const rows = matrix();
    const size = Math.max(1, ...rows.map((row) => Math.hypot(...row)));
    const unit = 120 / size;
    const line = (from, to, attributes) => {
      const [a, b] = [project(from, unit), project(to, unit)];
      return page.element("line", { x1: a[0], y1: a[1], x2: b[0], y2: b[1], ...attributes });
    };
    const far = 1.15 * size;
    const axes = [[far, 0, 0], [0, far, 0], [0, 0, far]].map((end) =>
      line(end.map((x) => -x), end, { class: "axis" }));
    const span = basis(rows);
    const shapes = [];
    if (span.length === 2) {
      const corners = [[1, 1], [1, -1], [-1, -1], [-1, 1]].map(([p, q]) =>
        project([0, 1, 2].map((i) => far * (p * span[0][i] + q * span[1][i])), unit).join(","));
      shapes.push(page.element("polygon", { points: corners.join(" "), class: "span" }));
    } else if (span.length === 1) {
      shapes.push(line(span[0].map((x) => -far * x), span[0].map((x) => far * x), { class: "span" }));
    }
    const arrows = rows.flatMap((row, i) => {
      if (!row.some(Boolean)) return [];
      const end = project(row, unit);
      return [
        line([0, 0, 0], row, { class: "vector", stroke: COLOURS[i] }),
        page.element("circle", { cx: end[0], cy: end[1], r: 4.5, fill: COLOURS[i] }),
        page.element("text", { x: end[0] + 8, y: end[1] - 6, fill: COLOURS[i] }, `r${i + 1}`),
      ];
    });
    page.replace(svg, [...axes, ...shapes, ...arrows]);
    const rank = algebra.rank(rows);
    const values = algebra.singularValues(rows).map((value) => page.number(value, 3)).join(", ");
    page.get("rank").textContent = `Rank ${rank}: the rows span ${WORDS[rank]}. Singular values ${values}.`;
    svg.dataset.rank = String(rank);
    svg.dataset.turn = turn.toFixed(3);
  };

  const show = (rows) => { rows.flat().forEach((value, i) => { inputs[i].value = value; }); draw(); };
  for (const button of document.querySelectorAll("[data-example]")) {
    button.addEventListener("click", () => show(EXAMPLES[button.dataset.example]));
  }
  for (const input of inputs) input.addEventListener("input", draw);

  let held = null;
  svg.addEventListener("pointerdown", (event) => {
    held = [event.clientX, event.clientY];
    if (event.isTrusted) svg.setPointerCapture(event.pointerId);
  });
  svg.addEventListener("pointermove", (event) => {
    if (!held) return;
    turn += (event.clientX - held[0]) / 120;
    tilt = Math.min(1.5, Math.max(-1.5, tilt + (event.clientY - held[1]) / 120));
    held = [event.clientX, event.clientY];
    draw();
  });
  for (const end of ["pointerup", "pointercancel"]) svg.addEventListener(end, () => { held = null; });
  svg.addEventListener("keydown", (event) => {
    const step = { ArrowLeft: [-0.15, 0], ArrowRight: [0.15, 0], ArrowUp: [0, -0.15], ArrowDown: [0, 0.15] }[event.key];
    if (!step) return;
    event.preventDefault();
    turn += step[0];
    tilt = Math.min(1.5, Math.max(-1.5, tilt + step[1]));
    draw();
  });
  show(EXAMPLES.identity);
  page.check("ranks of the three examples", algebra.rank(EXAMPLES.identity) === 3
    && algebra.rank(EXAMPLES.line) === 1 && algebra.rank(EXAMPLES.plane) === 2);
})();
