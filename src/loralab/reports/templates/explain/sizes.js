// Parameters of a pair against the weight's own, and the bytes of many tasks.
"use strict";
(() => {
  const { get, number } = page;
  const value = (id) => Number(get(id).value);
  const bar = (share) => page.element("rect", {
    x: 0, y: 0, width: Math.max(1, 400 * Math.min(1, share)), height: 18, class: "filled",
  });
  const outline = () => page.element("rect", { x: 0, y: 0, width: 400, height: 18, class: "empty" });

  page.onInput(["out", "in", "pair-rank"], () => {
    const [out, into, rank] = [2 ** value("out"), 2 ** value("in"), value("pair-rank")];
    const [full, pair] = [out * into, rank * (out + into)];
    get("out-shown").textContent = number(out);
    get("in-shown").textContent = number(into);
    get("pair-rank-shown").textContent = rank;
    page.replace(get("pair-bar"), [outline(), bar(pair / full)]);
    const even = full / (out + into);
    get("pair").textContent = `${rank} \u00d7 (${number(out)} + ${number(into)}) = ${pair.toLocaleString("en")}`
      + ` against ${full.toLocaleString("en")}: ${number(100 * pair / full, 3)} %.`
      + ` A pair is smaller than the weight below rank ${Math.floor(even).toLocaleString("en")}`
      + (out === into ? " (half of d, as 2dr < d\u00b2)." : ".");
  });

  page.onInput(["tasks", "model-size", "bytes", "adapter-size"], () => {
    const [tasks, billions, bytes, megabytes] = ["tasks", "model-size", "bytes", "adapter-size"].map(value);
    const model = billions * bytes;
    const whole = tasks * model;
    const shared = model + (tasks * megabytes) / 1000;
    for (const id of ["tasks", "model-size", "adapter-size"]) get(`${id}-shown`).textContent = number(value(id));
    page.replace(get("storage-bar"), [outline(), bar(shared / whole)]);
    get("storage").textContent = `${tasks} tuned models: ${number(whole)} GB. One base and ${tasks} adapters:`
      + ` ${number(shared)} GB, ${number(100 * (1 - shared / whole), 3)} % less.`;
  });
  const told = 7 + (10 * 50) / 1000;
  page.check("ten 7B models: 70 GB against 7.5 GB at one byte a parameter", told === 7.5
    && Math.abs(1 - told / 70 - 0.893) < 0.001);
})();
