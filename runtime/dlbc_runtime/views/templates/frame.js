"use strict";
/** What every page has: the tooltip, and the button between light and dark. */
const frame = (() => {
  const tip = document.getElementById("tip");
  const say = (value, detail, x, y) => {
    tip.firstChild.textContent = value;
    tip.lastChild.textContent = detail;
    tip.hidden = false;
    const box = tip.getBoundingClientRect();
    const left = Math.max(8, Math.min(x - box.width / 2, innerWidth - box.width - 8));
    tip.style.transform = `translate(${left}px,${y > box.height + 16 ? y - box.height - 10 : y + 26}px)`;
  };
  const hush = () => { tip.hidden = true; };
  document.addEventListener("scroll", hush, { passive: true, capture: true });

  const button = document.getElementById("theme");
  const dark = matchMedia("(prefers-color-scheme: dark)");
  const root = document.documentElement;
  const repaints = [];
  button.hidden = false;
  button.addEventListener("click", () => {
    const now = root.dataset.theme || (dark.matches ? "dark" : "light");
    root.dataset.theme = now === "dark" ? "light" : "dark";
    for (const repaint of repaints) repaint();
  });
  dark.addEventListener("change", () => { for (const repaint of repaints) repaint(); });
  return { say, hush, onTheme: (repaint) => repaints.push(repaint) };
})();
