// What the widgets share: a form beside a picture, the words and numbers of it, and a button that plays.
"use strict";

const swdWidgets = (() => {
  // Values of a slider: those digits in each power of ten.
  const decades = (from, to, digits) =>
    Array.from({ length: to - from }, (_, k) => digits.map((d) => +`${d}e${from + k}`)).flat();
  const inNumbers = (value) => value.toLocaleString("en", { maximumSignificantDigits: 2 });

  // It starts at the nearest value to the wanted one.
  const slider = (name, { label, values }, wanted) => {
    const gaps = values.map((value) => Math.abs(Math.log(value / wanted)));
    const start = gaps.indexOf(Math.min(...gaps));
    return `<label>${label}: <b></b><input type="range" name="${name}" min="0"
      max="${values.length - 1}" value="${start}"></label>`;
  };

  const menu = (name, { label, choices }, wanted) => {
    const options = Object.entries(choices).map(([key, words]) =>
      `<option value="${key}"${key === String(wanted) ? " selected" : ""}>${words}</option>`);
    return `<label>${label} <select name="${name}">${options.join("")}</select></label>`;
  };

  // With autocomplete, a browser that goes back would change the fields once the picture is drawn.
  const controls = (fields, start) => `<form autocomplete="off">
    ${Object.entries(fields).map(([name, field]) =>
      (field.values ? slider : menu)(name, field, start[name])).join("")}
    <button type="reset">Reset</button></form>`;

  const settingsOf = (fields, { elements }) => Object.fromEntries(
    Object.entries(fields).map(([name, { values }]) =>
      [name, values ? values[elements[name].value] : elements[name].value]));

  const showValues = (fields, { elements }, settings) => {
    for (const [name, { values, inWords = inNumbers }] of Object.entries(fields)) {
      if (!values) continue;
      const value = inWords(settings[name]);
      elements[name].setAttribute("aria-valuetext", value);
      elements[name].previousElementSibling.textContent = value;
    }
  };

  // Fill an element. A field with `values` is a slider, one with `choices` a menu. `show` returns
  // the picture for the settings, its description and its numbers; it may change the form.
  const mount = (element, { size, title, fields, start, file, link }, show) => {
    element.innerHTML = `<svg viewBox="0 0 ${size.join(" ")}" role="img"></svg>
      ${controls(fields, start)}<p role="status"></p><a download="${file}">${link} (CSV)</a>`;
    const [svg, form, status, download] = element.children;
    const draw = () => {
      const settings = settingsOf(fields, form);
      showValues(fields, form, settings);
      const { picture, words, csv } = show(settings, form);
      svg.innerHTML = picture;
      svg.setAttribute("aria-label", `${title}. ${words}`);
      status.textContent = words;
      download.href = `data:text/csv,${encodeURIComponent(csv)}`;
    };
    form.addEventListener("input", draw);
    form.addEventListener("submit", (event) => event.preventDefault());
    form.addEventListener("reset", () => setTimeout(draw)); // once the fields are back
    draw();
  };

  // A button that plays pictures `show(0)` to `show(last)`, one every so many milliseconds. It goes on
  // from the picture `at()`, or from the first if that is the last, and pauses when pressed again.
  const player = (button, last, every, at, show) => {
    let timer = null;
    const name = (words) => { button.textContent = words; };
    const stop = () => {
      cancelAnimationFrame(timer);
      timer = null;
      name("Play");
    };
    const play = (first = at() < last ? at() : 0) => {
      stop();
      name("Pause");
      let begin = null;
      const step = (now) => {
        begin ??= now;
        const k = Math.min(first + Math.floor((now - begin) / every), last);
        if (k !== at()) show(k);
        if (k === last) stop();
        else timer = requestAnimationFrame(step);
      };
      show(first);
      timer = requestAnimationFrame(step);
    };
    button.type = "button";
    button.addEventListener("click", () => (timer === null ? play() : stop()));
    name("Play");
    return { play, stop };
  };

  return { decades, mount, player };
})();
