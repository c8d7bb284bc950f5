// The laws of rank, tried on random matrices of integers.
"use strict";
(() => {
  const TRIALS = 200;
  const { rank, multiply, combine, transpose } = algebra;
  const LAWS = [
    ["rank(A) \u2264 min(m, n)", ({ A }) => rank(A) <= Math.min(A.length, A[0].length)],
    ["rank(A B) \u2264 min(rank A, rank B)", ({ A, B }) => rank(multiply(A, B)) <= Math.min(rank(A), rank(B))],
    ["rank(A + C) \u2264 rank A + rank C", ({ A, C }) => rank(combine(A, C)) <= rank(A) + rank(C)],
    ["rank(A \u2212 C) \u2264 rank A + rank C", ({ A, C }) => rank(combine(A, C, -1)) <= rank(A) + rank(C)],
    ["rank(A\u1d40) = rank(A)", ({ A }) => rank(transpose(A)) === rank(A)],
    ["rank(A) = 0 only for A = 0", ({ A }) => (rank(A) === 0) === A.flat().every((x) => x === 0)],
  ];
  // Not laws: what one may take for one.
  const HALF_TRUTHS = [
    ["rank(A B) = min(rank A, rank B)", ({ A, B }) => rank(multiply(A, B)) === Math.min(rank(A), rank(B))],
    ["rank(A + C) = rank A + rank C", ({ A, C }) => rank(combine(A, C)) === rank(A) + rank(C)],
  ];

  // Sizes and ranks vary, zero included: products of thin factors.
  const draw = (next) => {
    const size = () => 1 + Math.floor(next() * 5);
    const thin = (rows, columns) => {
      const inner = Math.floor(next() * 4);
      if (inner === 0) return algebra.zeros(rows, columns);
      return multiply(algebra.integers(next, rows, inner, 1), algebra.integers(next, inner, columns, 1));
    };
    const [m, n, p] = [size(), size(), size()];
    return { A: thin(m, n), B: thin(n, p), C: thin(m, n) };
  };

  let seed = 1;
  const run = () => {
    const next = algebra.random(seed++);
    const cases = Array.from({ length: TRIALS }, () => draw(next));
    const row = ([name, holds], isLaw) => {
      const held = cases.filter(holds).length;
      if (isLaw) page.check(name, held === TRIALS);
      const said = held === TRIALS ? `held in all ${TRIALS}` : `held in ${held} of ${TRIALS}`;
      const line = page.element("tr", { class: isLaw ? "law" : "half" });
      line.append(page.element("th", { scope: "row" }, name), page.element("td", {}, said));
      return line;
    };
    page.replace(page.get("laws"), LAWS.map((law) => row(law, true)));
    page.replace(page.get("half-truths"), HALF_TRUTHS.map((law) => row(law, false)));
  };
  page.get("again").addEventListener("click", run);
  run();
})();
