// Paper is white: a page prints as in the light theme, whatever it has on the screen. Browsers
// differ in which of the two they tell; some tell both, and a page may print twice.
{
  const root = document.documentElement;
  const paper = matchMedia("print");
  let shown = null;

  const print = () => {
    shown ??= root.dataset.theme;
    root.dataset.theme = "light";
  };
  const show = () => {
    if (shown !== null) root.dataset.theme = shown;
    shown = null;
  };

  addEventListener("beforeprint", print);
  addEventListener("afterprint", show);
  paper.addEventListener("change", () => (paper.matches ? print() : show()));
}
