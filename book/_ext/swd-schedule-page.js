// Schedules on their page: controls, a picture of two panels and a sentence that says what it shows.
"use strict";

(() => {
  const [LEFT, WIDTH, HEIGHT] = [40, 350, 180]; // of a panel; its left is room for numbers
  const PANELS = { strength: [26, -3, 7], product: [246, -10, 4] }; // top; powers of ten shown

  const FIELDS = {
    growth: { label: "growth of the strength", choices: {
      exponential: "exponential, as published",
      linear: "linear",
      cosine: "cosine",
      cubic: "cubic",
      per_step: "exponential in rate × a",
      constant: "none: a is a_max throughout",
    } },
    aMin: { label: "a<sub>min</sub>, strength at the start", values: swdWidgets.decades(-2, 5, [1, 3]) },
    aMax: { label: "a<sub>max</sub>, strength at the end", values: swdWidgets.decades(0, 7, [1, 3]) },
    growthEnd: {
      label: "growth ends at",
      values: Array.from({ length: 20 }, (_, k) => (k + 1) / 20),
      inWords: (value) => `${Math.round(100 * value)}\u00a0%`,
    },
    lrSchedule: { label: "learning-rate schedule", choices: {
      triangle: "up for a fifth, then down",
      steps: "a tenth at ⅓ and at ⅔",
      cosine: "half a cosine down",
      constant: "constant",
    } },
    highest: { label: "highest learning rate", values: swdWidgets.decades(-3, 0, [1, 1.5, 2, 3, 4, 5, 7]) },
    nesterov: { label: "momentum of 0.9", choices: { true: "Nesterov's", false: "heavy ball" } },
  };

  const across = (progress) => LEFT + progress * WIDTH;
  const upTo = ([top, low, high], value) =>
    top + HEIGHT * (high - Math.log10(value)) / (high - low);
  const spots = (name, rows) => rows.map((row) =>
    [across(row.progress), upTo(PANELS[name], row[name])].map((n) => n.toFixed(1)).join()).join(" ");

  const raised = (power) => [...String(power)].map((sign) => "⁻⁰¹²³⁴⁵⁶⁷⁸⁹"["-0123456789".indexOf(sign)]).join("");

  const frame = ([top, low, high], title) => {
    const powers = Array.from({ length: high - low + 1 }, (_, k) => low + k).filter((k) => k % 3 === 0);
    const lines = powers.map((k) => [k, upTo([top, low, high], 10 ** k)]);
    return `<path class="grid" d="${lines.map(([, y]) => `M${LEFT} ${y}h${WIDTH}`).join("")}"/>
      <path class="axis" d="M${LEFT} ${top}v${HEIGHT}h${WIDTH}"/>
      ${lines.map(([k, y]) => `<text x="${LEFT - 6}" y="${y + 4}" class="left">10${raised(k)}</text>`).join("")}
      <text x="${LEFT}" y="${top - 9}">${title}</text>`;
  };

  const foot = () => [0, 0.25, 0.5, 0.75, 1].map((share) =>
    `<text x="${across(share)}" y="442" class="${share === 1 ? "left" : "middle"}">${share}</text>`)
    .join("") + `<text x="${across(0.5)}" y="459" class="middle">progress t / T</text>`;

  // Neighbouring steps above the bound, from the first to the step after the last.
  const stretches = (rows, limit) => rows.reduce((found, { product }, k) => {
    if (product <= limit) return found;
    const last = found[found.length - 1];
    if (last?.[1] === k) last[1] = k + 1;
    else found.push([k, k + 1]);
    return found;
  }, []);

  const marked = (rows, limit) => stretches(rows, limit).map(([from, to]) => {
    const [x, right] = [from, to].map((k) => across(k / rows.length));
    return `<rect class="above" x="${x}" y="${PANELS.product[0]}" width="${right - x}" height="${HEIGHT}"/>
      <polyline class="above" points="${spots("product", rows.slice(from, to + 1))}"/>`;
  }).join("");

  const picture = (settings, { rows }) => {
    const [limit, all] = [swdSchedule.bound(settings), [...rows, swdSchedule.at(settings, 1)]];
    const y = upTo(PANELS.product, limit);
    const dashed = `dashed: the bound, ${limit.toLocaleString("en", { maximumSignificantDigits: 4 })}`;
    return `${frame(PANELS.strength, "strength a")}
      ${frame(PANELS.product, `learning rate × a × μ; ${dashed}`)}
      <path class="bound" d="M${LEFT} ${y}h${WIDTH}"/>
      ${["strength", "product"].map((name) => `<polyline points="${spots(name, all)}"/>`).join("")}
      ${marked(rows, limit)}${foot()}`;
  };

  document.querySelectorAll(".swd-schedule").forEach((element) => {
    const start = JSON.parse(element.querySelector("[data-start]").dataset.start);
    const parts = {
      size: [400, 464],
      title: "The strength, and its product with learning rate and μ, over training",
      fields: FIELDS,
      start,
      file: "schedule.csv",
      link: "The numbers at each step",
    };
    swdWidgets.mount(element, parts, (chosen, { elements }) => {
      for (const name of ["aMin", "growthEnd"]) elements[name].disabled = chosen.growth === "constant";
      const settings = { ...start, ...chosen, nesterov: chosen.nesterov === "true" };
      const run = swdSchedule.run(settings);
      const words = swdSchedule.describe(settings, run);
      return { picture: picture(settings, run), words, csv: swdSchedule.csv(run) };
    });
  });
})();
