// Slides: one is shown at a time. Arrow keys, space, Page Up and Down, Home and End, swipes and two
// buttons move; two more show the notes and turn dark. Without this script all slides are shown.
"use strict";

{
    const slides = [...document.querySelectorAll("main > section")];
    const root = document.documentElement;
    const find = name => document.getElementById(name);
    const EMPTY = 30; // height of the empty end of a slide above the buttons, in pixels
    const SMALLEST = 55; // percent of the size of type, on a slide that would be taller than the window
    let at = 0;

    // On a screen a slide fits the window; with notes, or on a phone, it is scrolled.
    const fit = () => {
        const scrolls = root.clientWidth < 960 || root.classList.contains("with-notes");
        slides[at].style.zoom = 1;
        for (let percent = 95; percent >= SMALLEST && !scrolls; percent -= 5) {
            if (root.scrollHeight <= root.clientHeight) return;
            slides[at].style.zoom = `${percent}%`;
        }
    };

    const show = number => {
        at = Math.min(Math.max(number, 0), slides.length - 1);
        slides.forEach((slide, i) => slide.classList.toggle("shown", i === at));
        find("count").textContent = `${at + 1} of ${slides.length}`;
        find("back").disabled = at === 0;
        find("on").disabled = at === slides.length - 1;
        history.replaceState(null, "", `#${at + 1}`);
        fit();
        window.scrollTo(0, 0);
    };
    const numberInAddress = () => (parseInt(location.hash.slice(1), 10) || 1) - 1;

    // A slide that is taller than the window is scrolled to its end, or start, before it turns.
    const turn = direction => {
        const below = root.scrollHeight - root.clientHeight - window.scrollY;
        const left = direction > 0 ? below : window.scrollY;
        if (left < EMPTY) show(at + direction);
        else window.scrollBy(0, direction * 0.8 * root.clientHeight);
    };

    const toggleNotes = () => {
        const shown = root.classList.toggle("with-notes");
        find("notes").setAttribute("aria-pressed", shown);
        fit();
    };
    const preference = matchMedia("(prefers-color-scheme: dark)");
    const isDark = () => root.dataset.theme
        ? root.dataset.theme === "dark"
        : preference.matches;
    const showDark = () => find("dark").setAttribute("aria-pressed", isDark());
    const toggleDark = () => {
        root.dataset.theme = isDark() ? "light" : "dark";
        showDark();
    };

    const keys = {
        ArrowRight: () => show(at + 1),
        ArrowLeft: () => show(at - 1),
        PageDown: () => turn(1),
        PageUp: () => turn(-1),
        " ": event => turn(event.shiftKey ? -1 : 1),
        Home: () => show(0),
        End: () => show(slides.length - 1),
    };
    document.addEventListener("keydown", event => {
        const own = event.key === " " && event.target.closest("button, summary, a");
        if (own || event.ctrlKey || event.altKey || event.metaKey || !keys[event.key]) return;
        if (event.key.startsWith("Arrow") && scrolls(event.target)) return;
        event.preventDefault();
        keys[event.key](event);
    });

    // Keys and swipes on an element that is wider than the slide scroll it and do not turn the slide.
    const scrolls = element => {
        const wide = element.closest?.(".wide, pre, mjx-container");
        return Boolean(wide) && wide.scrollWidth > wide.clientWidth;
    };
    let start = null;
    document.addEventListener("touchstart", event => {
        const alone = event.touches.length === 1 && !scrolls(event.target);
        start = alone ? [event.touches[0].clientX, event.touches[0].clientY] : null;
    }, {passive: true});
    document.addEventListener("touchend", event => {
        if (!start) return;
        const [across, down] = [event.changedTouches[0].clientX - start[0],
            event.changedTouches[0].clientY - start[1]];
        if (Math.abs(across) > 50 && Math.abs(across) > 2 * Math.abs(down)) {
            show(at - Math.sign(across));
        }
    });

    find("back").addEventListener("click", () => show(at - 1));
    find("on").addEventListener("click", () => show(at + 1));
    find("notes").addEventListener("click", toggleNotes);
    find("dark").addEventListener("click", toggleDark);
    preference.addEventListener("change", showDark);
    window.addEventListener("resize", fit);
    window.addEventListener("load", () => window.MathJax?.startup?.promise.then(fit));
    window.addEventListener("hashchange", () => show(numberInAddress()));
    root.classList.add("one-at-a-time");
    showDark();
    show(numberInAddress());
}
