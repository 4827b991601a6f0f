(() => {
  const data = JSON.parse(document.getElementById("data").textContent);
  const at = (id) => document.getElementById(id);
  const bytes = (text) => Uint8Array.from(atob(text), (character) => character.charCodeAt(0));
  const floats = (text) => new Float32Array(bytes(text).buffer);
  const { tokens, first, source, explained, probabilities } = data; // positions count the source's tokens first
  const size = tokens.length;
  const base = floats(data.relevance);
  const sinks = data.sinks && floats(data.sinks);
  const shades = data.layers.length ? bytes(data.shades) : null;
  const form = document.querySelector(".controls");
  const slider = form.elements.layer;

  const { number, signed, percent, make, bar, token: shown } = parts;

  // Units: tokens, or words made of them. Each has its tokens, and the rows that explain it.
  const rowsOf = new Map(explained.map((token, row) => [first + token, row]));
  const unit = (from, to) => {
    const places = Array.from({ length: to - from }, (_, i) => from + i);
    const made = places.length === 1 ? tokens[from] : [places.map((place, i) =>
      (i && tokens[place][1] ? " " : "") + tokens[place][0]).join(""), tokens[from][1], tokens[to - 1][2]];
    const likely = (place) => probabilities[place - first] ?? NaN;
    return { from, to, text: made[0], space: made[1], breaks: made[2], label: shown(made), fresh: from >= first,
             rows: places.filter((place) => rowsOf.has(place)).map((place) => rowsOf.get(place)),
             chance: from >= first ? places.reduce((product, place) => product * likely(place), 1) : NaN };
  };
  const levels = { tokens: tokens.map((_, place) => unit(place, place + 1)) };
  if (data.words) levels.words = data.words.map((from, i) => unit(from, data.words[i + 1] ?? size));

  const state = { level: "tokens", way: "from", sink: form.elements.sink ? form.elements.sink.checked : true,
                  layer: 0, kept: null, near: null };
  const units = () => levels[state.level];
  const unitOf = (place) => units().findIndex((one) => place >= one.from && place < one.to);

  // Relevance of one token by another at the layer that is chosen.
  const raw = (row, place) => {
    if (state.layer) {
      const shade = shades[((state.layer - 1) * explained.length + row) * size + place];
      if (place === source && data.sink && !state.sink) return 0;
      return (shade - 127) / 127 * data.limits[state.layer - 1][row];
    }
    if (place === source && data.sink) return state.sink ? (sinks ? sinks[row] : base[row * size + place]) : 0;
    return base[row * size + place];
  };
  let table = null; // what the matrix shows: for each column (a unit that is explained) a number per unit
  const prepare = () => {
    const list = units();
    const columns = list.map((one, i) => i).filter((i) => list[i].rows.length);
    const values = columns.map((i) => Float64Array.from(list, (one) => {
      let sum = 0;
      for (const row of list[i].rows) for (let place = one.from; place < one.to; place++) sum += raw(row, place);
      return sum / list[i].rows.length;
    }));
    const sizes = values.flatMap((column) => [...column].map(Math.abs).filter(Number.isFinite)).sort((a, b) => a - b);
    const full = sizes[Math.min(sizes.length - 1, Math.floor(sizes.length * (sizes.length < 40 ? 1 : 0.98)))] || 0;
    table = { columns, values, full, columnOf: new Map(columns.map((i, column) => [i, column])) };
  };

  // The text

  let spans = [];
  const write = () => {
    spans = units().map((one, i) => {
      const classes = "word" + (one.fresh ? one.rows.length ? " new" : " new mute" : "");
      const span = make("span", classes, one.text || (one.breaks ? "" : one.label));
      span.setAttribute("role", "option");
      span.tabIndex = -1;
      span.dataset.i = i;
      if (one.fresh) span.style.setProperty("--p", Number.isFinite(one.chance) ? one.chance : 0);
      if (one.breaks) {
        const mark = make("span", "break", "⏎");
        mark.setAttribute("aria-hidden", "true");
        span.append(mark);
      }
      return span;
    });
    const boxes = [at("source"), at("text")];
    for (const box of boxes) if (box) box.replaceChildren();
    units().forEach((one, i) => {
      const box = boxes[one.from < source ? 0 : 1];
      if (one.from === first) {
        const mark = make("span", "begin");
        mark.setAttribute("role", "presentation");
        box.append(mark);
      }
      if (one.space && box.childNodes.length) box.append(" ");
      box.append(spans[i]);
      for (let line = 0; line < Math.min(one.breaks, 3); line++) box.append(document.createElement("br"));
    });
    for (const box of boxes) { const one = box && box.querySelector(".word"); if (one) one.tabIndex = 0; }
  };

  // What is chosen: numbers for every unit, and what they are numbers of.
  const look = () => {
    const place = state.near ?? state.kept;
    if (place === null) return null;
    const i = unitOf(place);
    const one = units()[i];
    const column = table.columnOf.get(i);
    if (column !== undefined && state.way === "from") {
      const values = table.values[column];
      const sizes = [...values].map(Math.abs).filter(Number.isFinite);
      return { i, one, from: true, values, full: Math.max(0, ...sizes) };
    }
    const values = new Float64Array(units().length);
    table.columns.forEach((target, k) => { values[target] = target > i ? table.values[k][i] : 0; });
    return { i, one, from: false, values, full: table.full };
  };
  const strength = (value, full) => full > 0 && !Number.isNaN(value) ? Math.max(-1, Math.min(1, value / full)) : 0;

  const paint = () => {
    const now = look();
    const keptUnit = state.kept === null ? -1 : unitOf(state.kept);
    spans.forEach((span, i) => {
      const t = now ? strength(now.values[i], now.full) : 0;
      span.style.setProperty("--t", Math.abs(t).toFixed(3));
      span.classList.toggle("f", t > 0);
      span.classList.toggle("chosen", now !== null && i === now.i);
      span.setAttribute("aria-selected", i === keptUnit);
      const name = units()[i].label;
      const owes = now && i !== now.i && now.values[i] !== 0;
      span.setAttribute("aria-label", owes ? `${name}: ${signed(now.values[i])}` : name);
    });
    for (const span of [...at("map").querySelectorAll(".on")]) span.classList.remove("on");
    if (!now) return;
    at("low").textContent = signed(-now.full);
    at("high").textContent = signed(now.full);
    at("sum").textContent = signed([...now.values].filter(Number.isFinite).reduce((a, b) => a + b, 0));
    const row = now.from ? now.one.rows : [];
    const sunk = row.reduce((sum, r) => sum + (sinks ? sinks[r] : base[r * size + source]), 0) / row.length;
    at("apart").textContent = data.sink && !state.sink && row.length && !state.layer
      ? `first token ${shown(tokens[source])}, shown apart: ${signed(sunk)}` : "";
    detail(now);
    outline(now);
  };

  const position = (one) => String(one.from < source ? one.from : one.from - source);
  const quoted = (one) => `“${one.label}”`;
  const detail = ({ i, one, from, values, full }) => {
    const against = one.rows.length === 1 && data.against ? data.against[one.rows[0]] : null;
    at("kind").textContent = from ? data.target === "probability" ? "why so likely" : "why"
      : one.fresh ? "what this led to" : "what this token of the prompt led to";
    at("name").textContent = from && against ? `${one.label} rather than ${shown(against)}` : one.label;
    at("where").textContent = `${one.from < source ? "source token" : "position"} ${position(one)}`
      + (from && one.rows.length === 1 ? ` · value ${number(data.values[one.rows[0]] ?? NaN)}` : "")
      + (state.layer ? ` · ${layerName()}` : "") + (one.fresh && !one.rows.length ? " · not explained" : "");
    const chance = at("chance");
    chance.hidden = !one.fresh;
    if (one.fresh) {
      chance.setAttribute("aria-label", "probability " + percent(one.chance));
      chance.querySelector("b").textContent = percent(one.chance);
      chance.querySelector("i").style.width = (100 * one.chance).toFixed(2) + "%";
    }
    at("bars-name").textContent = from ? "Where it came from" : "What it led to";
    const order = [...values.keys()].filter((k) => values[k] && Number.isFinite(values[k]))
      .sort((a, b) => Math.abs(values[b]) - Math.abs(values[a])).slice(0, 8);
    at("bars").replaceChildren(...order.map((k) => {
      const other = units()[k];
      const row = bar(other.label, position(other), signed(values[k]), strength(values[k], full));
      row.addEventListener("click", () => { keep(other.from); spans[k].focus({ preventScroll: true }); });
      return row;
    }));
    if (!order.length) {
      const none = from ? "Nothing before it has relevance." : "No token that came later is explained by it.";
      at("bars").append(make("p", "note", none));
    }
    const others = from && one.to - one.from === 1 && data.alternatives[one.from - first] || [];
    at("others").hidden = !others.length;
    document.querySelector(".two").classList.toggle("one", !others.length);
    at("alternatives").replaceChildren(...others.map(([token, likely, mark]) => {
      const row = bar(shown(token), null, percent(likely ?? NaN), likely ?? 0, ["", "it", "not"][mark]);
      if (mark) row.firstChild.append(make("span", "tag", mark === 1 ? "chosen" : "not this"));
      return row;
    }));
  };

  // The matrix

  const matrix = document.querySelector(".matrix");
  const canvas = matrix.querySelector("canvas");
  const pen = canvas.getContext("2d");
  let side = 20, cursor = null; // pixels of a cell; [row, column] under the pointer or the arrow keys
  const palette = () => {
    const style = getComputedStyle(document.documentElement);
    const [none, favouring, against] = ["none", "bar-for", "bar-against"].map((name) => style.getPropertyValue("--" + name));
    const share = (t) => (Math.abs(t) * 100).toFixed(1) + "%";
    return (t) => t === 0 ? none : `color-mix(in oklab, ${t > 0 ? favouring : against} ${share(t)}, ${none})`;
  };
  const draw = () => {
    const list = units();
    const { columns, values, full } = table;
    const most = Math.floor(12000 / Math.max(list.length, columns.length)); // a canvas may not be much longer
    side = Math.max(2, Math.min(columns.length > 24 ? 20 : 26, most));
    matrix.style.setProperty("--s", side + "px");
    const labels = side >= 12;
    matrix.querySelector(".heads").replaceChildren(...columns.map((i) => {
      const head = make("div");
      if (labels) head.append(make("b", "", list[i].label));
      const meter = make("span", "meter"), fill = make("i");
      fill.style.setProperty("--p", Number.isFinite(list[i].chance) ? list[i].chance : 0);
      meter.append(fill);
      const chance = list[i].chance;
      const rounded = !Number.isFinite(chance) ? "" : chance < 0.005 ? "<1" : String(Math.round(100 * chance));
      if (labels) head.append(make("small", "", rounded));
      head.append(meter);
      return head;
    }));
    matrix.querySelector(".side").replaceChildren(...list.map((one) =>
      make("div", one.from === first ? "first" : "", labels ? one.label : "")));
    const ratio = list.length * columns.length > 20000 ? 1 : Math.min(2, devicePixelRatio || 1);
    [canvas.width, canvas.height] = [columns.length * side * ratio, list.length * side * ratio];
    [canvas.style.width, canvas.style.height] = [columns.length * side + "px", list.length * side + "px"];
    pen.setTransform(ratio, 0, 0, ratio, 0, 0);
    const colour = palette(), gap = side >= 8 ? 1 : 0;
    pen.fillStyle = colour(0);
    pen.fillRect(0, 0, columns.length * side, list.length * side);
    const past = getComputedStyle(document.documentElement).getPropertyValue("--page");
    columns.forEach((i, column) => list.forEach((one, row) => {
      const t = strength(values[column][row], full);
      if (Math.abs(t) < 0.004 && (row < i || (row === i && t !== 0))) return; // would not be seen
      pen.fillStyle = row > i || row === i && t === 0 ? past : colour(t);
      pen.fillRect(column * side, row * side, side - gap, side - gap);
    }));
    at("map-note").textContent = "A column for each generated token, with its probability in percent; down the column, "
      + `where it came from. Full colour is ±${number(full)}${state.layer ? ", " + layerName() : ""}.`;
    at("map").hidden = !columns.length;
  };
  const outline = (now) => {
    const box = matrix.querySelector(".column");
    const column = table.columnOf.get(now.i);
    box.hidden = column === undefined || !now.from;
    const height = units().length * side;
    if (!box.hidden) box.style.cssText = `left:${column * side}px;top:0;width:${side - 1}px;height:${height}px`;
    if (now.from && column !== undefined) matrix.querySelector(".heads").children[column].classList.add("on");
    else matrix.querySelector(".side").children[now.i].classList.add("on");
  };
  const point = (row, column, x, y) => {
    const box = matrix.querySelector(".cell");
    cursor = row === null ? null : [row, column];
    box.hidden = row === null;
    if (row === null) { frame.hush(); return; }
    box.style.cssText = `left:${column * side}px;top:${row * side}px;width:${side - 1}px;height:${side - 1}px`;
    const list = units();
    state.near = list[table.columns[column]].from;
    const before = state.way;
    state.way = "from";
    paint();
    state.way = before;
    matrix.querySelector(".side").children[row].classList.add("on");
    const said = `${quoted(list[row])} for ${quoted(list[table.columns[column]])}`;
    frame.say(signed(table.values[column][row]), said, x, y);
  };
  canvas.addEventListener("mousemove", (event) => {
    const box = canvas.getBoundingClientRect();
    const row = Math.min(units().length - 1, Math.max(0, Math.floor((event.clientY - box.top) / side)));
    const column = Math.min(table.columns.length - 1, Math.max(0, Math.floor((event.clientX - box.left) / side)));
    point(row, column, box.left + (column + 0.5) * side, box.top + row * side);
  });
  const leave = () => { if (state.kept !== null) state.near = null; point(null); paint(); };
  canvas.addEventListener("mouseleave", leave);
  canvas.addEventListener("click", () => { if (cursor) take(units()[table.columns[cursor[1]]].from); });
  matrix.addEventListener("keydown", (event) => {
    const [row, column] = cursor || [0, 0];
    const step = { ArrowDown: [1, 0], ArrowUp: [-1, 0], ArrowRight: [0, 1], ArrowLeft: [0, -1] }[event.key];
    if (event.key === "Enter" && cursor) take(units()[table.columns[column]].from);
    if (event.key === "Escape") leave();
    if (!step) return;
    event.preventDefault();
    const to = [Math.max(0, Math.min(units().length - 1, row + (cursor ? step[0] : 0))),
                Math.max(0, Math.min(table.columns.length - 1, column + (cursor ? step[1] : 0)))];
    const box = canvas.getBoundingClientRect(), view = matrix.getBoundingClientRect();
    const x = box.left + to[1] * side, y = box.top + to[0] * side;
    const corner = matrix.firstElementChild;
    const edges = { left: view.left + corner.offsetWidth, top: view.top + corner.offsetHeight };
    if (x < edges.left) matrix.scrollLeft += x - edges.left;
    if (x + side > view.right) matrix.scrollLeft += x + side - view.right;
    if (y < edges.top) matrix.scrollTop += y - edges.top;
    if (y + side > view.bottom) matrix.scrollTop += y + side - view.bottom;
    const moved = canvas.getBoundingClientRect();
    point(to[0], to[1], moved.left + (to[1] + 0.5) * side, moved.top + to[0] * side);
  });
  matrix.addEventListener("blur", leave);

  // Choosing

  // What the pointer or the focus is on is looked at until something else is; a click keeps it, and then the pointer
  // reads its numbers.
  const keep = (place) => {
    state.near = place === null ? state.kept : null;
    state.kept = place;
    paint();
    const experts = document.querySelector("article.experts"), row = place === null ? undefined : rowsOf.get(place);
    if (experts && row !== undefined) experts.dispatchEvent(new CustomEvent("explains", { detail: row }));
  };
  const take = (place) => keep(state.kept !== null && unitOf(state.kept) === unitOf(place) ? null : place);
  const over = (event) => event.target.closest && event.target.closest(".generation .word");
  const reader = at("reader");
  reader.addEventListener("mouseover", (event) => {
    const span = over(event);
    if (!span) return;
    const now = look();
    const i = Number(span.dataset.i);
    const box = span.getClientRects()[0];
    if (state.kept === null) { state.near = units()[i].from; paint(); }
    const one = units()[i], x = box.left + box.width / 2;
    if (state.kept !== null && now && i !== now.i) {
      const [source, target] = now.from ? [one, now.one] : [now.one, one];
      frame.say(signed(now.values[i]), `${quoted(source)} for ${quoted(target)}`, x, box.top);
    } else {
      const likely = "probability " + percent(one.chance);
      frame.say(quoted(one), one.fresh ? likely : "click to see what it led to", x, box.top);
    }
  });
  reader.addEventListener("mouseout", (event) => { if (over(event)) { frame.hush(); } });
  reader.addEventListener("click", (event) => {
    const span = over(event);
    if (span) take(units()[span.dataset.i].from);
  });
  reader.addEventListener("focusin", (event) => {
    const span = over(event);
    if (span && state.kept === null) { state.near = units()[span.dataset.i].from; paint(); }
  });
  reader.addEventListener("keydown", (event) => {
    const span = over(event);
    if (!span) return;
    const own = spans.filter((one) => one.parentElement === span.parentElement);
    const i = own.indexOf(span);
    const to = own[{ ArrowRight: i + 1, ArrowDown: i + 1, ArrowLeft: i - 1, ArrowUp: i - 1,
                     Home: 0, End: own.length - 1 }[event.key]];
    if (event.key === "Enter" || event.key === " ") { event.preventDefault(); take(units()[span.dataset.i].from); }
    if (event.key === "Escape") { frame.hush(); state.kept = null; state.near = units()[span.dataset.i].from; paint(); }
    if (!to) return;
    event.preventDefault();
    span.tabIndex = -1;
    to.tabIndex = 0;
    to.focus();
  });

  const layerName = () => state.layer ? "at " + data.layers[state.layer - 1] : "at the input";
  const refresh = () => { prepare(); write(); draw(); paint(); };
  form.addEventListener("submit", (event) => event.preventDefault());
  form.addEventListener("input", () => {
    state.way = form.elements.way.value;
    if (form.elements.level) state.level = form.elements.level.value;
    if (form.elements.sink) state.sink = form.elements.sink.checked;
    if (slider) {
      state.layer = Number(slider.value);
      const name = state.layer ? data.layers[state.layer - 1] : "the input";
      slider.nextElementSibling.textContent = name;
      slider.setAttribute("aria-valuetext", name);
    }
    cursor = null;
    matrix.querySelector(".cell").hidden = true;
    refresh();
  });
  frame.onTheme(draw);
  for (const id of ["reader", "detail"]) at(id).hidden = false;
  state.near = explained.length ? first + explained[0] : size ? 0 : null;
  refresh();
})();
