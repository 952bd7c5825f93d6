// What the widgets share: a form beside a picture, the words and numbers of it, and a button that plays.
"use strict";

const swdWidgets = (() => {
  // Values of a slider: those digits in each power of ten.
  const decades = (from, to, digits) =>
    Array.from({ length: to - from }, (_, k) => digits.map((d) => +`${d}e${from + k}`)).flat();
  const inNumbers = (value) => value.toLocaleString("en", { maximumSignificantDigits: 2 });

  // The place of the value that is nearest to the wanted one.
  const nearest = (values, wanted) => {
    const gaps = values.map((value) => Math.abs(Math.log(value / wanted)));
    return gaps.indexOf(Math.min(...gaps));
  };

  const slider = (name, { label, values }, wanted) =>
    `<label>${label}: <b></b><input type="range" name="${name}" min="0"
      max="${values.length - 1}" value="${nearest(values, wanted)}"></label>`;

  const menu = (name, { label, choices }, wanted) => {
    const options = Object.entries(choices).map(([key, words]) =>
      `<option value="${key}"${key === String(wanted) ? " selected" : ""}>${words}</option>`);
    return `<label>${label} <select name="${name}">${options.join("")}</select></label>`;
  };

  // With autocomplete, a browser that goes back would change the fields once the picture is drawn.
  const controls = (fields, start, tries) => `<form autocomplete="off">
    ${Object.entries(fields).map(([name, field]) =>
      (field.values ? slider : menu)(name, field, start[name])).join("")}
    <div class="tries">${Object.keys(tries).map((words) =>
      `<button type="button" class="try">${words}</button>`).join("")}
    <button type="reset">Reset</button></div></form>`;

  // Set some fields, and the others to where they started.
  const tryOut = (fields, form, changes) => {
    form.reset();
    for (const [name, value] of Object.entries(changes)) {
      const { values } = fields[name];
      form.elements[name].value = values ? nearest(values, value) : value;
    }
  };

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

  // Fill an element. A field with `values` is a slider, one with `choices` a menu; each of `tries` is
  // a button that sets some of them. `show` returns the picture for the settings, its description and
  // its numbers; it may change the form. What moves in the picture starts when it is drawn.
  const mount = (element, { size, title, fields, start, tries = {}, file, link }, show) => {
    element.innerHTML = `<svg viewBox="0 0 ${size.join(" ")}" role="img"></svg>
      ${controls(fields, start, tries)}<p role="status"></p><a download="${file}">${link} (CSV)</a>`;
    const [svg, form, status, download] = element.children;
    const draw = () => {
      const settings = settingsOf(fields, form);
      showValues(fields, form, settings);
      const { picture, words, csv } = show(settings, form);
      svg.innerHTML = picture;
      svg.querySelectorAll("animateMotion").forEach((motion) => motion.beginElement());
      svg.setAttribute("aria-label", `${title}. ${words}`);
      status.textContent = words;
      download.href = `data:text/csv,${encodeURIComponent(csv)}`;
    };
    form.addEventListener("input", draw);
    form.addEventListener("submit", (event) => event.preventDefault());
    form.addEventListener("reset", () => setTimeout(draw)); // once the fields are back
    form.querySelectorAll(".try").forEach((button) => button.addEventListener("click", () => {
      tryOut(fields, form, tries[button.textContent]);
      setTimeout(draw); // after that of the reset
    }));
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
