"use strict";
(() => {
  const linked = new Map(); // key -> a token and its bar, in every column of the page
  for (const element of document.querySelectorAll("[data-k]")) {
    const key = element.dataset.k;
    linked.has(key) ? linked.get(key).push(element) : linked.set(key, [element]);
  }

  let active = null;
  const activate = (key) => {
    if (key === active) return;
    for (const element of linked.get(active) || []) element.classList.remove("on");
    for (const element of linked.get(key) || []) element.classList.add("on");
    active = key;
  };
  const show = (element) => {
    const box = element.getClientRects()[0];
    activate(element.dataset.k);
    frame.say(element.dataset.v, element.dataset.d, box.left + box.width / 2, box.top);
  };
  const hide = () => { activate(null); frame.hush(); };

  document.addEventListener("mouseover", (event) => {
    const element = event.target.closest("[data-k]");
    if (element) show(element); else if (!event.target.closest("[data-shades], .experts")) hide();
  });
  document.addEventListener("focusin", (event) => {
    const element = event.target.closest("[data-k]");
    if (element) show(element); else if (!event.target.closest(".experts")) hide();
  });

  // One tab stop per text and per bar list; arrow keys move inside, Escape puts the tooltip away.
  for (const list of document.querySelectorAll(".words, .bars")) {
    const items = [...list.querySelectorAll("[data-k]")];
    if (items.length) items[0].tabIndex = 0;
    list.addEventListener("keydown", (event) => {
      const at = items.indexOf(event.target.closest("[data-k]"));
      const to = { ArrowRight: at + 1, ArrowDown: at + 1, ArrowLeft: at - 1, ArrowUp: at - 1,
                   Home: 0, End: items.length - 1 }[event.key];
      if (event.key === "Escape") hide();
      if (to === undefined || !items[to]) return;
      event.preventDefault();
      items[at].tabIndex = -1;
      items[to].tabIndex = 0;
      items[to].focus();
    });
  }

  for (const pictures of document.querySelectorAll(".pictures")) {
    const { shades, width, height, full } = pictures.querySelector("[data-width]").dataset;
    const values = Uint8Array.from(atob(shades), (character) => character.charCodeAt(0));
    for (const frame of pictures.querySelectorAll("[data-shades]")) {
      frame.addEventListener("mousemove", (event) => {
        const box = frame.getBoundingClientRect();
        const row = Math.min(height - 1, Math.max(0, Math.floor((event.clientY - box.top) / box.height * height)));
        const column = Math.min(width - 1, Math.max(0, Math.floor((event.clientX - box.left) / box.width * width)));
        const shade = values[row * width + column] - 127;
        const sign = shade > 0 ? "+" : shade < 0 ? "−" : "";
        const least = Math.abs(shade) === 127 ? "≥ " : "≈ ";
        frame.say(least + sign + (Math.abs(shade) / 127 * full).toPrecision(2), `row ${row}, column ${column}`,
            event.clientX, event.clientY);
      });
      frame.addEventListener("mouseleave", hide);
    }
    const slider = pictures.querySelector("input");
    if (slider) slider.addEventListener("input", () => pictures.style.setProperty("--o", slider.value / 100));
  }
})();
