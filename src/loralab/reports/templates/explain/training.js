// The first steps of a small LoRA: W = W0 + scale B A learns a target of rank two.
"use strict";
(() => {
  const { get } = page;
  const SIZE = 16, STEPS = 30, RANKS = [1, 4, 16, 64];
  const COLOURS = { 1: "#aa4499", 4: "#d55e00", 16: "#0072b2", 64: "#009e73" };
  const draw = algebra.random(7);
  const base = algebra.gaussian(draw, SIZE, SIZE, 0.25);
  const wanted = algebra.multiply(algebra.gaussian(draw, SIZE, 2, 0.5), algebra.gaussian(draw, 2, SIZE, 0.5));
  const { multiply, transpose, combine, norm } = algebra;

  const scaleOf = (alpha, rank, rule) => alpha / (rule === "rank" ? rank : Math.sqrt(rank));
  const start = (rank, init, seed = 3) => {
    const next = algebra.random(seed);
    const random = (rows, columns, fan) => algebra.zeros(rows, columns).map((row) =>
      row.map(() => (2 * next() - 1) / Math.sqrt(fan)));
    const A = init === "A-zero" ? algebra.zeros(rank, SIZE) : random(rank, SIZE, SIZE);
    const B = init === "B-zero" ? algebra.zeros(SIZE, rank) : random(SIZE, rank, rank);
    return { A, B };
  };
  // Loss |scale B A - wanted|^2 / 2 over unit inputs: G is its gradient at the output weight.
  const gradients = ({ A, B }, scale) => {
    const G = combine(multiply(B, A).map((row) => row.map((x) => scale * x)), wanted, -1);
    const times = (M) => M.map((row) => row.map((x) => scale * x));
    return { output: G, loss: norm(G) ** 2 / 2, A: times(multiply(transpose(B), G)), B: times(multiply(G, transpose(A))) };
  };
  const optimiser = (kind, rate) => {
    const moments = {};
    return (name, M, gradient, step) => {
      if (kind === "sgd") return combine(M, gradient, -rate);
      const state = moments[name] ??= { m: algebra.zeros(M.length, M[0].length), v: algebra.zeros(M.length, M[0].length) };
      return M.map((row, i) => row.map((x, j) => {
        const g = gradient[i][j];
        const m = state.m[i][j] = 0.9 * state.m[i][j] + 0.1 * g;
        const v = state.v[i][j] = 0.999 * state.v[i][j] + 0.001 * g * g;
        return x - rate * (m / (1 - 0.9 ** step)) / (Math.sqrt(v / (1 - 0.999 ** step)) + 1e-30);
      }));
    };
  };
  const train = ({ rank, alpha, rule, init, kind, rate }) => {
    const scale = scaleOf(alpha, rank, rule), move = optimiser(kind, rate);
    let factors = start(rank, init);
    const losses = [];
    let first = 0;
    for (let step = 1; step <= STEPS + 1; step++) {
      const found = gradients(factors, scale);
      losses.push(found.loss);
      const before = multiply(factors.B, factors.A);
      factors = { A: move("A", factors.A, found.A, step), B: move("B", factors.B, found.B, step) };
      if (step === 1) {
        const change = combine(multiply(factors.B, factors.A), before, -1).flat();
        first = -scale * change.reduce((sum, x, i) => sum + x * found.output.flat()[i], 0) / norm(found.output);
      }
    }
    return { losses, first };
  };

  const settings = () => ({
    alpha: Number(get("alpha").value),
    rule: get("rule").value,
    init: get("init").value,
    kind: get("optimiser").value,
    rate: 10 ** Number(get("rate").value),
  });
  page.onInput(["alpha", "rule", "init", "optimiser", "rate"], () => {
    const chosen = settings();
    get("alpha-shown").textContent = chosen.alpha;
    get("rate-shown").textContent = chosen.rate.toExponential(1);
    const runs = RANKS.map((rank) => ({ rank, ...train({ rank, ...chosen }) }));
    const top = 1.6 * norm(wanted) ** 2 / 2;
    const marks = runs.flatMap(({ rank, losses }, index) => {
      const points = losses.map((loss, step) => {
        const share = Number.isFinite(loss) ? Math.min(1.05, loss / top) : 1.05;
        return `${(400 * step) / STEPS},${180 - 170 * share}`;
      });
      return [
        page.element("path", { d: `M${points.join("L")}`, class: "curve", stroke: COLOURS[rank],
          "stroke-dasharray": ["", "7 3", "2 3", "9 3 2 3"][index] }),
        page.element("text", { x: 408, y: 30 + 22 * index, fill: COLOURS[rank] }, `rank ${rank}`),
      ];
    });
    page.replace(get("losses"), marks);
    const lines = runs.map(({ rank, losses, first }) => {
      const line = page.element("tr");
      const cells = [scaleOf(chosen.alpha, rank, chosen.rule), losses[0], first, losses[STEPS]];
      line.append(page.element("th", { scope: "row" }, String(rank)),
        ...cells.map((cell) => page.element("td", { class: "n" },
          Number.isFinite(cell) ? page.number(cell) : "diverged")));
      return line;
    });
    page.replace(get("first-steps"), lines);
    const zero = chosen.init !== "neither";
    get("start").textContent = zero
      ? "At step 0 the product B A is zero: the model starts as its base, whatever the rank."
      : "With both factors random the model starts as another one than its base: it must first unlearn that.";
  });

  // What the page says of the start, of the gradients and of the two scalings.
  const begin = start(8, "B-zero"), found = gradients(begin, 2);
  page.check("B = 0 gives the base's own output", norm(multiply(begin.B, begin.A)) === 0);
  page.check("at B = 0 the gradient of A is zero, and that of B is not", norm(found.A) === 0 && norm(found.B) > 0);
  const some = start(3, "neither"), step = 1e-5, exact = gradients(some, 0.7);
  const nudged = (name, delta) => {
    const moved = { A: some.A.map((row) => row.slice()), B: some.B.map((row) => row.slice()) };
    moved[name][1][2] += delta;
    return gradients(moved, 0.7).loss;
  };
  page.check("the gradients are those of finite differences", ["A", "B"].every((name) =>
    Math.abs((nudged(name, step) - nudged(name, -step)) / (2 * step) - exact[name][1][2]) < 1e-5));
  const firstOf = (rank, rule, kind) => train({ rank, alpha: 16, rule, init: "B-zero", kind, rate: 1e-3 }).first;
  const grows = (rule, kind) => firstOf(64, rule, kind) / firstOf(4, rule, kind);
  page.check("under Adam alpha / rank keeps the size of the first step, alpha / sqrt(rank) does not",
    Math.abs(Math.log2(grows("rank", "adam"))) < 1 && grows("root", "adam") > 2);
  page.check("under SGD it is the other way round",
    Math.abs(Math.log2(grows("root", "sgd"))) < 1 && grows("rank", "sgd") < 0.5);

  // The three ways of inference give the same output.
  const next = algebra.random(11);
  const x = algebra.gaussian(next, SIZE, 1);
  const adapters = [1, 2, 3].map(() => ({ A: algebra.gaussian(next, 4, SIZE), B: algebra.gaussian(next, SIZE, 4) }));
  const gaps = adapters.map(({ A, B }) => {
    const merged = multiply(combine(base, multiply(B, A), 0.5), x);
    const apart = combine(multiply(base, x), multiply(B, multiply(A, x)), 0.5);
    return norm(combine(merged, apart, -1)) / norm(merged);
  });
  const largest = Math.max(...gaps);
  page.check("merged and separate give the same output, for each of three adapters", largest < 1e-12);
  get("inference").textContent = `Just now, for three random adapters of rank 4 on a ${SIZE} \u00d7 ${SIZE} weight: `
    + `the outputs of W0 x + s B (A x) and of (W0 + s B A) x differ by at most ${largest.toExponential(0)} of their size, `
    + "in double precision. In bfloat16 merging rounds; loralab merge measures what that costs.";

  for (const button of document.querySelectorAll("[data-pass]")) {
    button.addEventListener("click", () => {
      get("passes").dataset.shown = button.dataset.pass;
      for (const other of document.querySelectorAll("[data-pass]")) {
        other.setAttribute("aria-pressed", String(other === button));
      }
    });
  }
})();
