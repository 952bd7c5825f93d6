// Schedules of SWD: the strength, the learning rate, their product with mu, and a description.
// The values are those of swdlib's schedules, `growing` and LR_SCHEDULES; a test compares them.
"use strict";

const swdSchedule = (() => {
  // From one value to another; u in [0, 1] says how far.
  const SHAPES = {
    exponential: (from, to, u) => from * (to / from) ** u,
    linear: (from, to, u) => from + (to - from) * u,
    cosine: (from, to, u) => to + (from - to) * (1 + Math.cos(Math.PI * u)) / 2,
    cubic: (from, to, u) => to + (from - to) * (1 - u) ** 3,
  };

  const ramp = (shape, from, to, finish, progress) => {
    if (progress <= 0) return from;
    return progress >= finish ? to : SHAPES[shape](from, to, progress / finish);
  };

  const LR_SCHEDULES = {
    constant: (highest) => highest,
    triangle: (highest, t) => t < 0.2
      ? ramp("linear", highest / 10, highest, 0.2, t)
      : ramp("linear", highest, highest / 100, 0.8, t - 0.2),
    steps: (highest, t) => highest * 0.1 ** ((t >= 1 / 3) + (t >= 2 / 3)),
    cosine: (highest, t) => ramp("cosine", highest, highest / 100, 1, t),
  };

  const rate = ({ lrSchedule, highest }, progress) => LR_SCHEDULES[lrSchedule](highest, progress);

  const strength = (settings, progress) => {
    const { growth, aMin, aMax, growthEnd: end } = settings;
    if (growth === "constant") return aMax;
    if (growth !== "per_step") return ramp(growth, aMin, aMax, end, progress);
    // Not the strength but rate * strength rises by a constant factor.
    const [first, last] = [aMin * rate(settings, 0), aMax * rate(settings, end)];
    const perStep = ramp("exponential", first, last, end, progress);
    return perStep / rate(settings, Math.min(progress, end));
  };

  const at = (settings, progress) => {
    const [eta, a] = [rate(settings, progress), strength(settings, progress)];
    return { progress, rate: eta, strength: a, product: eta * a * settings.weightDecay };
  };

  // Above this product, a selected weight grows at each step.
  const bound = ({ momentum, nesterov }) =>
    nesterov ? (2 + 2 * momentum) / (1 + 2 * momentum) : 2 * (1 + momentum);

  // All steps of a training. The push is the sum of their products, amplified by momentum.
  const run = (settings) => {
    const rows = Array.from({ length: settings.steps }, (_, k) => at(settings, k / settings.steps));
    const largest = rows.reduce((most, row) => (row.product > most.product ? row : most));
    const above = rows.filter(({ product }) => product > bound(settings));
    const sum = rows.reduce((total, { product }) => total + product, 0);
    return { rows, largest, above, push: sum / (1 - settings.momentum) };
  };

  // The numbers behind the picture: a line a step.
  const csv = ({ rows }) =>
    ["step,progress,rate,strength,product", ...rows.map((row, step) =>
      [step, row.progress, row.rate, row.strength, row.product].join())].join("\n") + "\n";

  const percent = (share) => `${+(100 * share).toFixed(1)} %`;
  const digits = (value, maximumSignificantDigits) =>
    value.toLocaleString("en", { maximumSignificantDigits });

  const describe = (settings, { largest, above, push }) => {
    const { steps, nesterov } = settings;
    const limit = `the bound of ${nesterov ? "Nesterov's" : "heavy-ball"} momentum is ` +
      digits(bound(settings), 4);
    const verdict = above.length
      ? `It first passes the bound at ${percent(above[0].progress)} of training ` +
        `and is above it in ${above.length} of ${steps} steps: there training diverges.`
      : "It stays below the bound.";
    return `Largest decay rate: ${digits(largest.product, 3)}, ` +
      `at ${percent(largest.progress)} of training; ${limit}. ${verdict} ` +
      `Total decay P over ${steps} steps: ${digits(push, 3)}.`;
  };

  return { strength, rate, at, bound, run, csv, describe };
})();
