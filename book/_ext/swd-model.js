// Selective Weight Decay on a quadratic loss of two weights, and a description of a run.
// The steps are those of swdlib's SelectiveWeightDecay with torch's plain SGD; a test compares them.
"use strict";

const swdModel = (() => {
  const TOO_FAR = 1e3;

  // Loss and slope: 1/2 d'Hd and Hd, where d leads from the trained weights to w.
  const away = ({ trained }, w) => [w[0] - trained[0], w[1] - trained[1]];
  const slopeOf = (problem, w) => {
    const [d, h] = [away(problem, w), problem.hessian];
    return [h[0][0] * d[0] + h[0][1] * d[1], h[1][0] * d[0] + h[1][1] * d[1]];
  };
  const lossOf = (problem, w) => {
    const [d, slope] = [away(problem, w), slopeOf(problem, w)];
    return (d[0] * slope[0] + d[1] * slope[1]) / 2;
  };

  // The index of the penalised weight, or null. Of equal magnitudes the first is selected.
  const selected = (target, w) => {
    if (target === "smaller") return Math.abs(w[0]) <= Math.abs(w[1]) ? 0 : 1;
    return { first: 0, second: 1 }[target] ?? null;
  };

  const strengthAt = ({ aMin, aMax }, progress) =>
    progress === 0 ? aMin : aMin * (aMax / aMin) ** progress;

  const stepFrom = (w, problem, settings, progress) => {
    const { rate, target, update } = settings;
    const pull = strengthAt(settings, progress) * problem.weightDecay;
    const slope = slopeOf(problem, w);
    const before = selected(target, w);
    if (update === "gradient" && before !== null) slope[before] += pull * w[before];
    const next = [w[0] - rate * slope[0], w[1] - rate * slope[1]];
    const after = selected(target, next);
    if (update === "proximal" && after !== null) next[after] /= 1 + rate * pull;
    return next;
  };

  // All weights from the start to the end: steps + 1 pairs.
  const path = (problem, settings) => {
    const points = [problem.start];
    for (let step = 0; step < problem.steps; step++) {
      points.push(stepFrom(points[step], problem, settings, step / problem.steps));
    }
    return points;
  };

  const cut = (w, i) => w.map((value, k) => (k === i ? 0 : value));

  // Where the loss is least if weight i is zero.
  const constrained = ({ hessian, trained }, i) => {
    const [j, w] = [1 - i, [0, 0]];
    w[j] = trained[j] + (hessian[j][i] / hessian[j][j]) * trained[i];
    return w;
  };

  // Weights that diverge are cut off before they overflow.
  const run = (problem, settings) => {
    const all = path(problem, settings);
    const end = all[all.length - 1];
    const far = all.findIndex((w) => !w.every((value) => Math.abs(value) < TOO_FAR));
    const points = far < 0 ? all : all.slice(0, far);
    const product = settings.rate * Math.max(settings.aMin, settings.aMax) * problem.weightDecay;
    const removed = selected(settings.target, end);
    return { points, end, removed, product, diverged: far < 0 ? null : far };
  };

  // The numbers behind the picture: a line a step.
  const csv = (problem, { points }) =>
    ["step,w1,w2,loss", ...points.map((w, step) => [step, ...w, lossOf(problem, w)].join())]
      .join("\n") + "\n";

  const three = (value) => (Math.round(value * 1e3) / 1e3 + 0).toFixed(3).replace("-", "−");

  const describe = (problem, settings, { end, removed, product, diverged }) => {
    const bound = settings.update === "gradient" ? "the bound is near 2" : "it has no bound";
    const largest = `Largest decay rate: ${Number(product.toPrecision(2))}; ${bound}.`;
    if (diverged !== null) return `Diverged at step ${diverged} of ${problem.steps}. ${largest}`;
    const where = `End: w = (${end.map(three).join(", ")}), loss ${three(lossOf(problem, end))}`;
    if (removed === null) return `${where}. Nothing is selected, so there is nothing to cut.`;
    const [now, then, least] = [end, problem.trained, constrained(problem, removed)].map((w) =>
      three(lossOf(problem, cut(w, removed))));
    return `${where}. With ${["w₁", "w₂"][removed]} cut: ${now}; least possible: ${least}; ` +
      `had the trained weights been cut: ${then}. ${largest}`;
  };

  return { path, lossOf, constrained, run, csv, describe };
})();
