// The live model on its page: controls, picture and a sentence that says what the picture shows.
"use strict";

(() => {
  const [LOW, HIGH, SIZE, EDGE] = [-0.5, 2.75, 400, 24]; // weights shown; picture and its margin
  const SCALE = (SIZE - EDGE) / (HIGH - LOW);
  const spot = ([x, y]) => [EDGE + (x - LOW) * SCALE, (HIGH - y) * SCALE].map((n) => +n.toFixed(1));

  const FIELDS = {
    aMin: { label: "a<sub>min</sub>, strength at the start", values: swdWidgets.decades(-2, 6, [1, 3]) },
    aMax: { label: "a<sub>max</sub>, strength at the end", values: swdWidgets.decades(0, 7, [1, 3]) },
    rate: { label: "learning rate", values: swdWidgets.decades(-3, 0, [1, 1.5, 2, 3, 4, 5, 7]) },
    target: { label: "target", choices: {
      smaller: "the smaller weight (sparsity ½)",
      first: "always w₁ (sparsity ½)",
      second: "always w₂ (sparsity ½)",
      none: "none (sparsity 0)",
    } },
    update: { label: "update rule", choices: { gradient: "gradient, as published", proximal: "proximal" } },
  };

  const TRIES = {
    "Start at 1,000": { aMin: 1000 },
    "End at 1,000": { aMax: 1000 },
    "Learning rate 0.2": { rate: 0.2 },
    "The same, proximal": { rate: 0.2, update: "proximal" },
  };

  const label = ([x, y], words, right = 8, down = 4) =>
    `<text x="${x + right}" y="${y + down}">${words}</text>`;

  // Contours of a quadratic are ellipses around its minimum, along the eigenvectors.
  const contours = ({ hessian: [[a, b], [, d]], trained }) => {
    const [mean, half] = [(a + d) / 2, Math.hypot((a - d) / 2, b)];
    const turn = `rotate(${(-90 / Math.PI) * Math.atan2(2 * b, a - d)} ${spot(trained).join(" ")})`;
    const [cx, cy] = spot(trained);
    const ring = (k) => {
      const [rx, ry] = [mean + half, mean - half].map((curvature) =>
        SCALE * 0.2 * k * Math.sqrt(2 / curvature)); // the loss there is (0.2 k) squared
      return `<ellipse cx="${cx}" cy="${cy}" rx="${rx}" ry="${ry}" transform="${turn}"/>`;
    };
    return `<g class="contours">${Array.from({ length: 14 }, (_, k) => ring(k + 1)).join("")}</g>`;
  };

  const frame = () => {
    const [x, y] = spot([0, 0]);
    const numbers = [0, 1, 2].map((n) =>
      label([spot([n, n])[0], SIZE], n, -4, -6) + label([0, spot([n, n])[1]], n, 8));
    return `<path class="axis" d="M${x} 0V${SIZE - EDGE}M${EDGE} ${y}H${SIZE}"/>
      ${numbers.join("")}${label([SIZE, y], "w₁", -20, -8)}${label([x, 0], "w₂", 8, 14)}`;
  };

  const marks = (problem, points) => {
    const end = points[points.length - 1];
    const at = (w, shape) => `<g transform="translate(${spot(w).join(" ")})">${shape}</g>`;
    const every = Math.max(1, Math.floor(problem.steps / 10));
    const tenths = points.filter((_, k) => k % every === 0);
    return tenths.map((w) => at(w, '<circle class="tenth" r="3"/>')).join("") +
      [0, 1].map((i) => at(swdModel.constrained(problem, i), '<path class="least" d="M-8 0L0-8L8 0L0 8Z"/>')).join("") +
      at(problem.trained, '<path class="cross" d="M-5-5L5 5M5-5L-5 5"/>') +
      at(end, '<circle class="end" r="5"/>') +
      label(spot(problem.start), "start") + label(spot(problem.trained), "trained", 9, -5);
  };

  // A point that takes the path in four seconds, each step in the same time.
  const moving = (points) => {
    const every = Math.ceil(points.length / 200);
    const spots = points.filter((_, k) => k % every === 0).map((w) => spot(w).join());
    return `<circle class="moving" r="6"><animateMotion dur="4s" begin="indefinite" calcMode="linear"
      values="${spots.join(";")}"/></circle>`;
  };

  const picture = (problem, { points }) => {
    const line = points.map((w) => spot(w).join()).join(" ");
    return `<svg class="area" aria-hidden="true" x="${EDGE}" width="${SIZE - EDGE}" height="${SIZE - EDGE}"
      viewBox="${EDGE} 0 ${SIZE - EDGE} ${SIZE - EDGE}">${contours(problem)}
      <polyline points="${line}"/>${marks(problem, points)}${moving(points)}</svg>${frame()}`;
  };

  document.querySelectorAll(".swd-model").forEach((element) => {
    const problem = JSON.parse(element.dataset.problem);
    const parts = {
      size: [SIZE, SIZE],
      title: "The path of SWD over a loss of two weights",
      fields: FIELDS,
      start: problem,
      tries: TRIES,
      file: "path.csv",
      link: "The weights at each step",
    };
    swdWidgets.mount(element, parts, (settings) => {
      const run = swdModel.run(problem, settings);
      const words = swdModel.describe(problem, settings, run);
      return { picture: picture(problem, run), words, csv: swdModel.csv(problem, run) };
    });
  });
})();
