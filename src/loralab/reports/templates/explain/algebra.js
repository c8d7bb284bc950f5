// Small exact and numerical linear algebra for the page: matrices are arrays of rows.
"use strict";
const algebra = (() => {
  const zeros = (rows, columns) => Array.from({ length: rows }, () => new Array(columns).fill(0));
  const transpose = (M) => M[0].map((_, j) => M.map((row) => row[j]));
  const multiply = (A, B) => {
    const columns = transpose(B);
    return A.map((row) => columns.map((column) => row.reduce((sum, a, i) => sum + a * column[i], 0)));
  };
  const combine = (A, B, scale = 1) => A.map((row, i) => row.map((a, j) => a + scale * B[i][j]));
  const norm = (M) => Math.sqrt(M.flat().reduce((sum, x) => sum + x * x, 0));

  // Gaussian elimination with the largest pivot; integers of a page's size stay exact enough.
  const rank = (M) => {
    const rows = M.map((row) => row.slice());
    const tolerance = 1e-9 * Math.max(1, ...M.flat().map(Math.abs));
    let found = 0;
    for (let column = 0; column < M[0].length && found < rows.length; column++) {
      let pivot = found;
      for (let i = found; i < rows.length; i++) {
        if (Math.abs(rows[i][column]) > Math.abs(rows[pivot][column])) pivot = i;
      }
      if (Math.abs(rows[pivot][column]) <= tolerance) continue;
      [rows[found], rows[pivot]] = [rows[pivot], rows[found]];
      for (let i = found + 1; i < rows.length; i++) {
        const factor = rows[i][column] / rows[found][column];
        for (let j = column; j < M[0].length; j++) rows[i][j] -= factor * rows[found][j];
      }
      found++;
    }
    return found;
  };

  // Singular values by one-sided Jacobi rotations, falling.
  const singularValues = (M) => {
    const columns = transpose(M);
    for (let sweep = 0; sweep < 30; sweep++) {
      let off = 0;
      for (let p = 0; p < columns.length; p++) {
        for (let q = p + 1; q < columns.length; q++) {
          const [a, b] = [columns[p], columns[q]];
          let aa = 0, bb = 0, ab = 0;
          for (let i = 0; i < a.length; i++) { aa += a[i] ** 2; bb += b[i] ** 2; ab += a[i] * b[i]; }
          if (Math.abs(ab) <= 1e-14 * Math.sqrt(aa * bb)) continue;
          off = 1;
          const zeta = (bb - aa) / (2 * ab);
          const t = Math.sign(zeta || 1) / (Math.abs(zeta) + Math.hypot(1, zeta));
          const c = 1 / Math.hypot(1, t), s = c * t;
          for (let i = 0; i < a.length; i++) {
            [a[i], b[i]] = [c * a[i] - s * b[i], s * a[i] + c * b[i]];
          }
        }
      }
      if (!off) break;
    }
    return columns.map((column) => Math.hypot(...column)).sort((x, y) => y - x);
  };

  // A generator of its own, so that a page shows the same twice: mulberry32.
  const random = (seed) => () => {
    seed = (seed + 0x6d2b79f5) | 0;
    let t = Math.imul(seed ^ (seed >>> 15), 1 | seed);
    t = (t + Math.imul(t ^ (t >>> 7), 61 | t)) ^ t;
    return ((t ^ (t >>> 14)) >>> 0) / 4294967296;
  };
  const gaussian = (draw, rows, columns, std = 1) => zeros(rows, columns).map((row) => row.map(() =>
    std * Math.sqrt(-2 * Math.log(1 - draw())) * Math.cos(2 * Math.PI * draw())));
  const integers = (draw, rows, columns, span = 3) => zeros(rows, columns).map((row) => row.map(() =>
    Math.floor(draw() * (2 * span + 1)) - span));

  return { zeros, transpose, multiply, combine, norm, rank, singularValues, random, gaussian, integers };
})();

const page = (() => {
  const get = (id) => document.getElementById(id);
  const element = (name, attributes = {}, text = "") => {
    const svg = ["svg", "path", "line", "circle", "rect", "text", "g", "polygon"].includes(name);
    const made = svg ? document.createElementNS("http://www.w3.org/2000/svg", name)
      : document.createElement(name);
    for (const [key, value] of Object.entries(attributes)) made.setAttribute(key, value);
    if (text) made.textContent = text;
    return made;
  };
  const replace = (parent, children) => parent.replaceChildren(...children);
  const number = (value, digits = 3) => {
    if (value === 0) return "0";
    const size = Math.abs(value);
    const text = size >= 1e6 || size < 1e-3 ? value.toExponential(1) : size >= 1000
      ? Math.round(value).toLocaleString("en") : String(Number(value.toPrecision(digits)));
    return text.replace("-", "\u2212");
  };
  // Every live check of the page reports here; the page says so at its top.
  const results = new Map();
  const check = (name, holds) => {
    results.set(name, holds);
    const failed = [...results].filter(([, ok]) => !ok).map(([key]) => key);
    document.documentElement.dataset.checks = failed.length ? `failed: ${failed.join(", ")}` : "passed";
    get("checks").textContent = failed.length
      ? `Failed just now: ${failed.join(", ")}.`
      : `${results.size} statements of this page have just been checked in your browser; all hold.`;
  };
  const onInput = (ids, draw) => {
    for (const id of ids) get(id).addEventListener("input", draw);
    draw();
  };
  return { get, element, replace, number, check, onInput };
})();
