// Schedules on their page: controls, a picture of two panels and a sentence that says what it shows.
"use strict";

(() => {
  const [LEFT, WIDTH, HEIGHT] = [40, 350, 180]; // of a panel; its left is room for numbers
  const PANELS = { strength: [26, -3, 7], product: [246, -10, 4] }; // top; powers of ten shown

  const decades = (from, to, digits) =>
    Array.from({ length: to - from }, (_, k) => digits.map((d) => +`${d}e${from + k}`)).flat();
  const inNumbers = (value) => value.toLocaleString("en", { maximumSignificantDigits: 2 });
  const inPercent = (value) => `${Math.round(100 * value)}\u00a0%`;
  const RANGES = {
    aMin: ["a<sub>min</sub>, strength at the start", decades(-2, 5, [1, 3]), inNumbers],
    aMax: ["a<sub>max</sub>, strength at the end", decades(0, 7, [1, 3]), inNumbers],
    growthEnd: ["growth ends at", Array.from({ length: 20 }, (_, k) => (k + 1) / 20), inPercent],
    highest: ["highest learning rate", decades(-3, 0, [1, 1.5, 2, 3, 4, 5, 7]), inNumbers],
  };
  const CHOICES = {
    growth: ["growth of the strength", {
      exponential: "exponential, as published",
      linear: "linear",
      cosine: "cosine",
      cubic: "cubic",
      per_step: "exponential in rate × a",
      constant: "none: a is a_max throughout",
    }],
    course: ["course of the learning rate", {
      triangle: "up for a fifth, then down",
      steps: "a tenth at ⅓ and at ⅔",
      cosine: "half a cosine down",
      constant: "constant",
    }],
    nesterov: ["momentum of 0.9", { true: "Nesterov's", false: "heavy ball" }],
  };

  const slider = (name, wanted) => {
    const [label, values] = RANGES[name];
    const gaps = values.map((value) => Math.abs(Math.log(value / wanted)));
    const start = gaps.indexOf(Math.min(...gaps));
    return `<label>${label}: <b></b><input type="range" name="${name}" min="0"
      max="${values.length - 1}" value="${start}"></label>`;
  };

  const choice = (name, wanted) => {
    const [label, choices] = CHOICES[name];
    const options = Object.entries(choices).map(([key, words]) =>
      `<option value="${key}"${key === String(wanted) ? " selected" : ""}>${words}</option>`);
    return `<label>${label} <select name="${name}">${options.join("")}</select></label>`;
  };

  // With autocomplete, a browser that goes back would change the fields once the picture is drawn.
  const controls = (start) => `<form autocomplete="off">${choice("growth", start.growth)}
    ${["aMin", "aMax", "growthEnd"].map((name) => slider(name, start[name])).join("")}
    ${choice("course", start.course)}${slider("highest", start.highest)}
    ${choice("nesterov", start.nesterov)}<button type="reset">Reset</button></form>`;

  const settingsOf = (start, { elements }) => {
    const chosen = Object.keys(RANGES).map((name) => [name, RANGES[name][1][elements[name].value]]);
    const { growth, course, nesterov } = elements;
    const words = { growth: growth.value, course: course.value, nesterov: nesterov.value === "true" };
    return { ...start, ...Object.fromEntries(chosen), ...words };
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

  const label = ({ elements }, settings) => {
    for (const [name, [, , inWords]] of Object.entries(RANGES)) {
      const value = inWords(settings[name]);
      elements[name].setAttribute("aria-valuetext", value);
      elements[name].previousElementSibling.textContent = value;
    }
    for (const name of ["aMin", "growthEnd"]) elements[name].disabled = settings.growth === "constant";
  };

  const show = (start, [svg, form, status, link]) => {
    const settings = settingsOf(start, form);
    label(form, settings);
    const run = swdSchedule.run(settings);
    const words = swdSchedule.describe(settings, run);
    svg.innerHTML = picture(settings, run);
    svg.setAttribute("aria-label", `The strength, and its product with learning rate and μ, over training. ${words}`);
    status.textContent = words;
    link.href = `data:text/csv,${encodeURIComponent(swdSchedule.csv(run))}`;
  };

  document.querySelectorAll(".swd-schedule").forEach((element) => {
    const start = JSON.parse(element.querySelector("[data-start]").dataset.start);
    element.innerHTML = `<svg viewBox="0 0 400 464" role="img"></svg>${controls(start)}
      <p role="status"></p><a download="schedule.csv">The numbers at each step (CSV)</a>`;
    const draw = () => show(start, [...element.children]);
    const form = element.querySelector("form");
    form.addEventListener("input", draw);
    form.addEventListener("submit", (event) => event.preventDefault());
    form.addEventListener("reset", () => setTimeout(draw)); // once the fields are back
    draw();
  });
})();
