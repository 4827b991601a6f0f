/** What pages with numbers are made of: how numbers and tokens are written, bars, colours. */
const parts = (() => {
  // Numbers as the library writes them: three significant digits and a true minus sign.
  const number = (value) => {
    if (!Number.isFinite(value)) return Number.isNaN(value) ? "not a number" : value > 0 ? "∞" : "−∞";
    const size = Math.abs(value);
    const text = size >= 1000 && size < 1e6 ? value.toFixed(0)
      : size && (size < 1e-4 || size >= 1e6) ? value.toExponential(2).replace(/\.?0+e/, "e").replace("e+", "e")
      : String(Number(value.toPrecision(3)));
    return text.replace(/-/g, "−");
  };
  const signed = (value) => (value > 0 ? "+" : "") + number(value);
  const percent = (share) => Number.isNaN(share) ? "not a number" : share > 0 && share < 0.001 ? "<0.1 %"
    : share > 0.999 && share < 1 ? ">99.9 %"
    : (100 * share).toFixed((share >= 0.1 && share < 0.995) || share === 0 || share === 1 ? 0 : 1) + " %";
  const make = (kind, classes, text) => {
    const element = document.createElement(kind);
    if (classes) element.className = classes;
    if (text !== undefined) element.textContent = text;
    return element;
  };
  const token = ([text, space, breaks]) => text + "⏎".repeat(breaks) || (space ? "␣" : "∅");
  const bar = (name, value, relevance, t, classes) => {
    const row = make("div", "bar " + (classes || ""));
    row.setAttribute("role", "listitem");
    row.append(make("span", "bar-name", name));
    if (value !== null) row.append(make("span", "bar-value", value));
    const track = make("span", "track");
    const fill = make("i", t > 0 ? "f" : "a");
    fill.style.setProperty("--t", Math.abs(t).toFixed(4));
    track.append(fill);
    row.append(track, make("span", "bar-relevance", relevance));
    return row;
  };
  return { number, signed, percent, make, token, bar };
})();
