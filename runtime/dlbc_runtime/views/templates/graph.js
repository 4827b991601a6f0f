(() => {
  const scenes = new Map([...document.querySelectorAll("[data-scene]")].map((one) => [one.dataset.scene, one]));
  const openers = [...document.querySelectorAll("[data-open]")].filter((one) => !one.classList.contains("cell"));
  for (const one of document.querySelectorAll(".cell[data-open]")) one.removeAttribute("tabindex");
  let came = null; // where the focus goes back to

  const mark = () => {
    for (const one of openers) {
      const opened = scenes.get(one.dataset.open);
      one.classList.toggle("at", opened !== undefined && !opened.hidden);
      one.setAttribute("aria-expanded", opened !== undefined && !opened.hidden);
    }
  };
  const open = (path, from) => {
    const next = scenes.get(path);
    if (!next) return;
    // What is opened from the whole takes the place of what was open; what is opened inside of that stands above it.
    const outer = from && from.closest("[data-scene]");
    for (const scene of scenes.values()) if (scene !== outer) scene.hidden = true;
    next.hidden = false;
    next.parentElement.prepend(next);
    next.scrollIntoView({ block: "nearest" });
    came = from;
    mark();
  };
  const close = (scene) => {
    scene.hidden = true;
    mark();
    if (came) came.focus();
  };

  document.addEventListener("click", (event) => {
    const opener = event.target.closest("[data-open]");
    if (opener) open(opener.dataset.open, opener);
    if (event.target.closest(".close")) close(event.target.closest("[data-scene]"));
  });
  document.addEventListener("keydown", (event) => {
    const at = openers.indexOf(event.target);
    if (event.key === "Escape") {
      frame.hush();
      for (const scene of scenes.values()) if (!scene.hidden) close(scene);
    }
    if (at < 0) return;
    if (event.key === "Enter" || event.key === " ") {
      event.preventDefault();
      open(event.target.dataset.open, event.target);
    }
    const to = openers[{ ArrowDown: at + 1, ArrowRight: at + 1, ArrowUp: at - 1, ArrowLeft: at - 1 }[event.key]];
    if (!to) return;
    event.preventDefault();
    to.focus();
  });

  const show = (event) => {
    const element = event.target.closest && event.target.closest("[data-d]");
    if (!element) { frame.hush(); return; }
    const box = element.getBoundingClientRect();
    const x = event.clientX || box.left + box.width / 2;
    frame.say(element.dataset.v || "", element.dataset.d, x, Math.max(box.top, (event.clientY || box.top) - 12));
  };
  document.addEventListener("mousemove", show);
  document.addEventListener("focusin", show);
  mark();
})();
