// Accuracy of runs: the line below the picture names the run of the point under the pointer.
"use strict";

document.querySelectorAll(".swd-runs").forEach((figure) => {
  const [svg, status] = figure.children;
  const points = [...svg.querySelectorAll(".run")];

  const show = (shown) => {
    points.forEach((point) => point.classList.toggle("shown", shown.includes(point)));
    points.forEach((point) => { point.tabIndex = point === shown[0] ? 0 : -1; });
    status.textContent = shown.map((point) => point.getAttribute("aria-label")).join("\n");
  };

  const SAME = 2; // points that are so close to each other cannot be told apart by a finger

  const gap = (point, { x, y }) => Math.hypot(point.cx.baseVal.value - x, point.cy.baseVal.value - y);

  // The nearest point, at any distance, and those that coincide with it.
  const pick = ({ clientX, clientY }) => {
    const at = new DOMPoint(clientX, clientY).matrixTransform(svg.getScreenCTM().inverse());
    const gaps = points.map((point) => gap(point, at));
    const { cx, cy } = points[gaps.indexOf(Math.min(...gaps))];
    show(points.filter((point) => gap(point, { x: cx.baseVal.value, y: cy.baseVal.value }) < SAME));
  };

  const move = (event) => {
    const [at, last] = [points.indexOf(event.target), points.length - 1];
    const goals = { Home: 0, End: last, ArrowLeft: at - 1, ArrowUp: at - 1, ArrowRight: at + 1, ArrowDown: at + 1 };
    if (at < 0 || !(event.key in goals) || event.ctrlKey || event.altKey || event.metaKey) return;
    event.preventDefault();
    points[Math.min(Math.max(goals[event.key], 0), last)].focus();
  };

  if (!points.length) return;
  points.forEach((point) => point.querySelector("title").remove()); // the line says it
  svg.addEventListener("pointermove", (event) => { if (event.pointerType !== "touch") pick(event); });
  svg.addEventListener("click", pick);
  // Not on the picture: Chromium makes an SVG focusable that listens to focus events.
  figure.addEventListener("focusin", (event) => show([event.target]));
  figure.addEventListener("keydown", move);
});
