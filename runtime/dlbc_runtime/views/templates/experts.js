/** Experts: two maps of layer by expert, one layer token by expert, and where one token's relevance went. */
(() => {
  const { signed, percent, make, token: shown } = parts;
  const bytes = (text) => Uint8Array.from(atob(text), (character) => character.charCodeAt(0));
  const strength = (value, full) => full > 0 && Number.isFinite(value) ? Math.max(-1, Math.min(1, value / full)) : 0;
  const summed = (values) => { let sum = 0; for (const one of values) sum += one; return sum; };
  /** The |value| that gets the full colour: the largest, or of many that of 98 % of them; `clipped` says which. */
  const scaleOf = (values) => {
    const sizes = values.map(Math.abs).filter((one) => Number.isFinite(one) && one > 0).sort((a, b) => a - b);
    const most = sizes[sizes.length - 1] || 0;
    const full = sizes.length < 40 ? most : sizes[Math.floor((sizes.length - 1) * 0.98)];
    return { full, clipped: full < most };
  };
  const largest = (values) => {
    let place = 0;
    values.forEach((one, i) => { if (Math.abs(one) > (Math.abs(values[place]) || 0)) place = i; });
    return place;
  };
  const limit = (values) => scaleOf(values).full;
  const legend = (section, { full, clipped }) => {
    section.querySelector(".low").textContent = signed(-full);
    section.querySelector(".high").textContent = signed(full);
    section.querySelector(".clipped").hidden = !clipped;
  };
  const svg = (kind, attributes, text) => {
    const element = document.createElementNS("http://www.w3.org/2000/svg", kind);
    for (const [name, value] of Object.entries(attributes)) element.setAttribute(name, value);
    if (text !== undefined) element.textContent = text;
    return element;
  };

  /**
   * A canvas of rows and columns with names beside and numbers above: columns 0 to experts - 1, then the shared experts,
   * then a bar. `colour(row, column)` answers a colour, "" where nothing was routed to; `bar(row)` a length from -1 to 1;
   * `say(row, column)` the two lines of the tooltip, null where there is no cell.
   */
  const grid = (section, spec) => {
    const box = section.querySelector(".grid"), canvas = box.querySelector("canvas"), pen = canvas.getContext("2d");
    const line = box.querySelector(".line"), mark = box.querySelector(".cell");
    let cursor = null, s = 10, h = 16, every = 1; // the size of a cell, and how many rows share a name
    const sharedAt = () => spec.experts * s + 8, sharedWidth = () => Math.max(s, 12);
    const barAt = () => spec.shared ? sharedAt() + sharedWidth() + 12 : spec.experts * s + 12;
    const left = (column) => column < spec.experts ? column * s : column === spec.experts ? sharedAt() : barAt();
    const wide = (column) => column < spec.experts ? s : column === spec.experts ? sharedWidth() : spec.bars;
    const at = (x) => {
      if (x < spec.experts * s) return Math.max(0, Math.floor(x / s));
      return x >= barAt() - 6 || !spec.shared ? spec.experts + 1 : spec.experts;
    };
    const step = (column, by) => {
      const to = column + by;
      return to === spec.experts && !spec.shared ? to + by : Math.max(0, Math.min(spec.experts + 1, to));
    };
    const draw = (side) => {
      const rows = spec.rows();
      [s, h] = [side, spec.height()];
      every = Math.ceil(12 / h);
      const ratio = Math.min(2, devicePixelRatio || 1, Math.max(1, 12000 / (rows * h)));
      const width = barAt() + spec.bars, height = rows * h;
      [canvas.width, canvas.height] = [width * ratio, height * ratio];
      [canvas.style.width, canvas.style.height] = [width + "px", height + "px"];
      pen.setTransform(ratio, 0, 0, ratio, 0, 0);
      pen.clearRect(0, 0, width, height);
      const style = getComputedStyle(section), [faint, grey, favouring, against] =
        ["--faint", "--kept", "--bar-for", "--bar-against"].map((name) => style.getPropertyValue(name));
      const mixed = (end, t) => `color-mix(in oklab, ${end} ${(100 * t).toFixed(1)}%, ${faint})`;
      const colour = (t) => spec.oneSided ? mixed(grey, t) : mixed(t > 0 ? favouring : against, Math.abs(t));
      const gap = s >= 6 ? 1 : 0, under = h >= 6 ? 1 : 0;
      for (let row = 0; row < rows; row++) {
        for (let column = 0; column <= spec.experts; column++) {
          if (column === spec.experts && !spec.shared) continue;
          const found = spec.colour(row, column, colour);
          if (!found) continue;
          pen.fillStyle = found;
          pen.fillRect(left(column), row * h, wide(column) - (column < spec.experts ? gap : 0), h - under);
        }
        const length = spec.bar(row), middle = spec.oneSided ? barAt() : barAt() + spec.bars / 2;
        const room = spec.oneSided ? spec.bars : spec.bars / 2;
        pen.fillStyle = spec.oneSided ? grey : length > 0 ? favouring : against;
        pen.globalAlpha = spec.oneSided ? 0.5 : 1;
        const thick = Math.max(1, Math.min(h - 2, 11)), top = row * h + (h - under - thick) / 2;
        pen.fillRect(length < 0 ? middle + length * room : middle, top, Math.abs(length) * room, thick);
        pen.globalAlpha = 1;
        pen.fillStyle = style.getPropertyValue("--line");
        pen.fillRect(middle - (spec.oneSided ? 1 : 0.5), row * h, 1, h);
      }
      const ticks = box.querySelector(".ticks");
      const apart = [1, 2, 4, 8, 16, 32, 64, 128].find((one) => one * s >= 30) || 256;
      const tick = (x, text, classes) => {
        const span = make("span", classes, text);
        span.style.left = x + "px";
        return span;
      };
      const marks = spec.ranked() ? [tick(0, "strongest", "begin")]
        : Array.from({ length: Math.ceil(spec.experts / apart) }, (_, i) => i * apart)
          .map((one) => tick((one + 0.5) * s, String(one), one || s > 14 ? "" : "begin"));
      if (spec.shared) marks.push(tick(sharedAt() + sharedWidth() / 2, spec.experts * s > 120 ? "shared" : "sh.", ""));
      box.querySelector(".corner").textContent = spec.rowName;
      ticks.replaceChildren(...marks, tick(barAt() + spec.bars / 2, spec.barName, ""));
      box.querySelector(".side").replaceChildren(...Array.from({ length: rows }, (_, row) => {
        const name = make("div");
        name.style.cssText = `height:${h}px;line-height:${Math.max(h - 1, 11)}px`;
        return name;
      }));
      outline();
    };
    const reveal = (row) => { // within its box: the page stays where it is
      const head = box.querySelector(".corner").offsetHeight, top = row * h;
      if (top < box.scrollTop) box.scrollTop = top;
      if (top + h + head > box.scrollTop + box.clientHeight) box.scrollTop = top + h + head - box.clientHeight;
    };
    const outline = () => {
      const row = spec.chosen();
      line.hidden = row < 0;
      if (row >= 0) reveal(row);
      if (row >= 0) line.style.cssText = `left:0;top:${row * h}px;width:${barAt() + spec.bars}px;height:${h - 1}px`;
      [...box.querySelector(".side").children].forEach((name, i) => {
        const named = i === row || (i % every === 0 && (row < 0 || Math.abs(i - row) >= every));
        name.textContent = named ? spec.name(i) : "";
        name.classList.toggle("on", i === row);
      });
    };
    const point = (row, column) => {
      const lines = row === null ? null : spec.say(row, column);
      cursor = row === null ? null : [row, column];
      mark.hidden = lines === null;
      if (lines === null) { frame.hush(); return; }
      mark.style.cssText = `left:${left(column)}px;top:${row * h}px;width:${wide(column)}px;height:${h - 1}px`;
      const view = canvas.getBoundingClientRect();
      frame.say(lines[0], lines[1], view.left + left(column) + wide(column) / 2, view.top + row * h);
    };
    canvas.addEventListener("mousemove", (event) => {
      const view = canvas.getBoundingClientRect();
      const row = Math.max(0, Math.min(spec.rows() - 1, Math.floor((event.clientY - view.top) / h)));
      point(row, at(event.clientX - view.left));
    });
    canvas.addEventListener("mouseleave", () => point(null));
    box.addEventListener("click", (event) => {
      const view = canvas.getBoundingClientRect(), row = Math.floor((event.clientY - view.top) / h);
      if (row >= 0 && row < spec.rows()) spec.choose(row);
    });
    box.addEventListener("blur", () => point(null));
    box.addEventListener("keydown", (event) => {
      const [row, column] = cursor || [Math.max(0, spec.chosen()), 0];
      const by = { ArrowDown: [1, 0], ArrowUp: [-1, 0], ArrowRight: [0, 1], ArrowLeft: [0, -1] }[event.key];
      if ((event.key === "Enter" || event.key === " ") && cursor) { event.preventDefault(); spec.choose(row); }
      if (event.key === "Escape") point(null);
      if (!by) return;
      event.preventDefault();
      const to = cursor ? [Math.max(0, Math.min(spec.rows() - 1, row + by[0])), by[1] ? step(column, by[1]) : column]
        : [row, column];
      const view = box.getBoundingClientRect(), x = canvas.getBoundingClientRect().left + left(to[1]);
      const edge = box.querySelector(".corner").getBoundingClientRect();
      if (x < edge.right) box.scrollLeft += x - edge.right;
      if (x + wide(to[1]) > view.right) box.scrollLeft += x + wide(to[1]) - view.right;
      reveal(to[0]);
      point(...to);
    });
    return { draw, outline };
  };

  const card = (article) => {
    const data = JSON.parse(article.querySelector(".experts-data").textContent);
    const find = (selector) => article.querySelector(selector);
    const { layers, rows } = data;
    const most = Math.max(...layers.map((layer) => layer.experts)), shared = layers.some((layer) => layer.shared);
    const state = { row: 0, seed: 0, layer: 0, token: 0, ranked: false, all: false };

    // Numbers of one row: for each layer what the file holds, and what is counted of it.
    const decoded = new Map();
    const raw = (row) => {
      if (!decoded.has(row)) decoded.set(row, rows[row].layers.map((one) => ({
        ids: new Int16Array(bytes(one.ids).buffer), weights: new Int16Array(bytes(one.weights).buffer), full: one.full,
        relevance: new Float32Array(bytes(one.relevance).buffer),
        shared: one.shared === null ? null : new Float32Array(bytes(one.shared).buffer) })));
      return decoded.get(row);
    };
    let found = [], byToken = [], full = {};
    const count = () => {
      found = raw(state.row).map((one, i) => {
        const { k, experts } = layers[i], tokens = one.ids.length / k;
        const relevance = one.relevance.subarray(state.seed * one.ids.length, (state.seed + 1) * one.ids.length);
        const own = one.shared && one.shared.subarray(state.seed * tokens, (state.seed + 1) * tokens);
        const totals = new Float64Array(experts), counts = new Float64Array(experts), of = new Float64Array(tokens);
        let routed = 0;
        one.ids.forEach((id, place) => {
          if (id < 0) return;
          totals[id] += relevance[place];
          of[Math.floor(place / k)] += relevance[place];
          counts[id] += 1;
        });
        for (let token = 0; token < tokens; token++) {
          if (one.ids[token * k] >= 0) routed += 1;
          if (own) of[token] += own[token];
        }
        const all = summed(counts), shares = [...counts].filter((n) => n).map((n) => n / all);
        const spread = experts > 1 ? -summed(shares.map((share) => share * Math.log(share))) / Math.log(experts) : 1;
        const order = Array.from(totals.keys()).sort((a, b) => Math.abs(totals[b]) - Math.abs(totals[a])
          || counts[b] - counts[a] || a - b);
        const of_shared = own ? summed(own) : 0;
        return { tokens, ids: one.ids, weights: one.weights, weightFull: one.full, relevance, own, totals, counts, of,
                 routed, spread: Math.max(0, spread), order, shared: of_shared, entering: summed(totals) + of_shared };
      });
      const tokens = rows[state.row].tokens.length;
      byToken = Array.from({ length: tokens }, (_, token) =>
        summed(found.filter((one) => one.tokens === tokens).map((one) => one.of[token])));
      full = { totals: limit(found.flatMap(columnsOf)),
               load: Math.max(0, ...found.map((one) => Math.max(0, ...one.counts) / Math.max(1, one.routed))),
               entering: limit(found.map((one) => one.entering)), words: limit(byToken) };
    };
    const columnsOf = (one) => [...one.totals, one.shared];
    const expertAt = (layer, column) => state.ranked ? found[layer].order[column] : column;
    const short = (weight) => Math.abs(weight) < 0.005 && weight ? "<0.01" : weight.toFixed(2).replace("-", "−");
    const weight = (one, place) => one.weights[place] / 32767 * one.weightFull;
    const label = (token, layer) => {
      const texts = rows[state.row].tokens;
      return texts.length === found[layer].tokens ? shown(texts[token]) : String(token);
    };

    // The maps

    const room = () => Math.max(320, find(".drawn").clientWidth);
    const common = { rowName: "token", experts: most, shared, bars: 72, ranked: () => state.ranked };
    const twin = {
      ...common, rowName: "layer", rows: () => layers.length, name: (row) => layers[row].name,
      height: () => Math.max(8, Math.min(22, Math.floor(440 / layers.length))),
      chosen: () => state.layer, choose: (row) => { state.layer = row; refresh(); } };
    const where = (row, column) => {
      const layer = layers[row];
      if (column === most) return `shared experts of ${layer.place}`;
      return column < most ? `expert ${expertAt(row, column)} of ${layer.place}` : layer.place;
    };
    const routedTo = (row, column) => {
      const one = found[row], counts = one.counts[expertAt(row, column)];
      return `${counts} of ${one.routed} ${one.routed === 1 ? "token" : "tokens"}`;
    };
    const relevant = grid(find(".relevance"), {
      ...twin, barName: "all", bar: (row) => strength(found[row].entering, full.entering),
      colour: (row, column, colour) => {
        if (column === most) return layers[row].shared ? colour(strength(found[row].shared, full.totals)) : "";
        if (column >= layers[row].experts) return "";
        const expert = expertAt(row, column);
        return found[row].counts[expert] ? colour(strength(found[row].totals[expert], full.totals)) : "";
      },
      say: (row, column) => {
        if (column > most) return [signed(found[row].entering), `entered the experts of ${layers[row].place}`];
        if (column === most) return layers[row].shared ? [signed(found[row].shared), where(row, column)] : null;
        if (column >= layers[row].experts) return null;
        return [signed(found[row].totals[expertAt(row, column)]), `${where(row, column)}, ${routedTo(row, column)}`];
      } });
    const routed = grid(find(".frequency"), {
      ...twin, shared: false, bars: 56, oneSided: true, barName: "evenness", bar: (row) => found[row].spread,
      colour: (row, column, colour) => {
        if (column >= layers[row].experts) return "";
        const load = found[row].counts[expertAt(row, column)] / Math.max(1, found[row].routed);
        return load ? colour(load / full.load) : "";
      },
      say: (row, column) => {
        const one = found[row];
        if (column > most) return [percent(one.spread), "entropy of the routing, of its largest"];
        if (column >= layers[row].experts) return null;
        const load = one.counts[expertAt(row, column)] / Math.max(1, one.routed);
        return [percent(load), `${where(row, column)}: ${routedTo(row, column)}`];
      } });

    // One layer

    let cells = []; // of the chosen layer: for each token a map from column to the place of its choice
    let stripFull = 0, barFull = 0;
    const strip = grid(find(".strip"), {
      ...common, rows: () => found[state.layer].tokens, name: (row) => label(row, state.layer),
      height: () => Math.max(2, Math.min(18, Math.floor(12000 / found[state.layer].tokens))),
      barName: "all", bar: (row) => strength(found[state.layer].of[row], barFull),
      chosen: () => found[state.layer].tokens === rows[state.row].tokens.length ? state.token : -1,
      choose: (row) => { if (found[state.layer].tokens === rows[state.row].tokens.length) choose(row); },
      colour: (row, column, colour) => {
        const one = found[state.layer];
        if (column === most) return one.own ? colour(strength(one.own[row], stripFull)) : "";
        if (column >= layers[state.layer].experts) return "";
        const place = cells[row].get(expertAt(state.layer, column));
        return place === undefined ? "" : colour(strength(one.relevance[place], stripFull));
      },
      say: (row, column) => {
        const one = found[state.layer], word = `“${label(row, state.layer)}”`;
        if (column > most) return [signed(one.of[row]), `all experts, ${word}`];
        if (column === most) return one.own ? [signed(one.own[row]), `shared experts, ${word}`] : null;
        if (column >= layers[state.layer].experts) return null;
        const expert = expertAt(state.layer, column), place = cells[row].get(expert);
        return place === undefined ? ["0", `expert ${expert} was not chosen for ${word}`]
          : [signed(one.relevance[place]), `expert ${expert}, ${word}, weight ${short(weight(one, place))}`];
      } });
    const prepare = () => {
      const one = found[state.layer], k = layers[state.layer].k;
      cells = Array.from({ length: one.tokens }, () => new Map());
      one.ids.forEach((id, place) => { if (id >= 0) cells[Math.floor(place / k)].set(id, place); });
      const scale = scaleOf([...one.relevance, ...(one.own || [])]);
      stripFull = scale.full;
      barFull = limit([...one.of]);
      find(".strip-name").textContent = `${layers[state.layer].place}: token by expert`;
      legend(find(".strip"), scale);
      find(".strip .sum b").textContent = signed(one.entering);
    };

    // One token

    const words = find(".words");
    let spans = [];
    const write = () => {
      const list = rows[state.row].tokens;
      spans = list.map((token, i) => {
        const span = make("span", "word", token[0] || (token[2] ? "" : shown(token)));
        span.setAttribute("role", "option");
        span.tabIndex = -1;
        span.dataset.i = i;
        if (token[2]) span.append(make("span", "break", "⏎"));
        return span;
      });
      words.replaceChildren();
      list.forEach(([, space, breaks], i) => {
        if (space && i) words.append(" ");
        words.append(spans[i]);
        for (let line = 0; line < Math.min(breaks, 3); line++) words.append(document.createElement("br"));
      });
    };
    const paint = () => spans.forEach((span, i) => {
      const t = strength(byToken[i], full.words);
      span.style.setProperty("--t", Math.abs(t).toFixed(3));
      span.classList.toggle("f", t > 0);
      span.classList.toggle("chosen", i === state.token);
      span.setAttribute("aria-selected", i === state.token);
      span.setAttribute("aria-label", `${shown(rows[state.row].tokens[i])}: ${signed(byToken[i])}`);
      span.tabIndex = i === state.token ? 0 : -1;
    });
    const reveal = () => { // within the box of words
      const span = spans[state.token], top = span ? span.offsetTop - words.offsetTop : 0;
      if (span && (top < words.scrollTop || top + span.offsetHeight > words.scrollTop + words.clientHeight)) {
        words.scrollTop = top - words.clientHeight / 2;
      }
    };
    /** The experts of a layer at the token, the favouring ones first; weak ones together, where they are many. */
    const shares = (i, listed) => {
      const one = found[i], k = layers[i].k, own = [];
      for (let place = state.token * k; place < (state.token + 1) * k; place++) {
        if (one.ids[place] >= 0) own.push({ name: `expert ${one.ids[place]}`, value: one.relevance[place],
                                            more: `× ${short(weight(one, place))}` });
      }
      if (one.own) own.push({ name: "shared", value: one.own[state.token], more: "" });
      own.sort((a, b) => Math.abs(b.value) - Math.abs(a.value));
      const kept = own.length > listed + 1 ? own.slice(0, listed) : own, rest = own.slice(kept.length);
      for (const side of [1, -1]) {
        const folded = rest.filter((share) => share.value * side > 0);
        if (folded.length) kept.push({ name: folded.length === 1 ? folded[0].name : `${folded.length} others`,
                                       value: summed(folded.map((share) => share.value)), more: "" });
      }
      return kept.filter((share) => share.value && Number.isFinite(share.value)).sort((a, b) => b.value - a.value);
    };
    const river = () => {
      const box = find(".river"), tokens = rows[state.row].tokens.length;
      const there = found.map((_, i) => i).filter((i) => found[i].tokens === tokens);
      const amount = (i) => summed(shares(i, 99).map((share) => Math.abs(share.value)));
      const sizes = new Map(there.map((i) => [i, amount(i)])), size = summed(sizes.values());
      const name = shown(rows[state.row].tokens[state.token]);
      if (!(size > 0)) {
        box.replaceChildren(make("p", "note", `No relevance entered experts at “${name}”.`));
        box.setAttribute("aria-label", `no relevance entered experts at ${name}`);
        return;
      }
      const many = there.length > 12;
      find("input[name=all]").closest("form").hidden = !many;
      const strongest = new Set(many && !state.all
        ? [...there].sort((a, b) => sizes.get(b) - sizes.get(a)).slice(0, 10) : there);
      const called = (i) => (/^\d+$/.test(layers[i].name) ? "layer " : "") + layers[i].name;
      const groups = there.filter((i) => strongest.has(i) && sizes.get(i) > 0)
        .map((i) => ({ name: called(i), place: layers[i].place, list: shares(i, strongest.size > 6 ? 3 : 7) }));
      const rest = there.filter((i) => !strongest.has(i));
      if (rest.length) {
        const folded = rest.flatMap((i) => shares(i, 99)), side = (sign, text) => ({ name: text, more: "",
          value: summed(folded.filter((share) => share.value * sign > 0).map((share) => share.value)) });
        groups.push({ name: `${rest.length} more`, place: `${rest.length} other layers`,
                      list: [side(1, "for"), side(-1, "against")].filter((share) => share.value) });
      }
      const width = Math.max(600, room() - 2), scale = 300 / size, slot = 16, gap = groups.length > 6 ? 12 : 18;
      const thick = (share) => Math.abs(share.value) * scale, tall = (share) => Math.max(slot, thick(share) + 2);
      const height = summed(groups.flatMap((group) => group.list.map(tall))) + gap * (groups.length - 1) + 24;
      const [x0, x1, x2] = [Math.round(width * 0.15), Math.round(width * 0.47), width - 208];
      const picture = svg("svg", { width, height, viewBox: `0 0 ${width} ${height}` });
      const [ribbons, nodes, texts] = [svg("g", {}), svg("g", {}), svg("g", {})];
      const ribbon = (from, y0, to, y1, h, value, classes, key, said) => {
        const t = Math.max(h, 0.8), middle = (from + to) / 2;
        ribbons.append(svg("path", { class: `${value > 0 ? "f" : "a"} ${classes}`, "data-g": key,
          "data-v": signed(value), "data-d": said,
          d: `M${from} ${y0}C${middle} ${y0} ${middle} ${y1} ${to} ${y1}L${to} ${y1 + t}C${middle} ${y1 + t} ${middle} ${y0 + t} ${from} ${y0 + t}Z` }));
      };
      const block = (x, y, h, classes, key) => nodes.append(
        svg("rect", { x, y, width: 7, height: Math.max(h, 1), rx: Math.min(2, h / 2), class: classes, "data-g": key }));
      let y = 12, y0 = (height - 300) / 2;
      block(x0, y0, 300, "node", "");
      groups.forEach((group, g) => {
        const whole = summed(group.list.map(tall)), own = summed(group.list.map(thick));
        let at = y + (whole - own) / 2, slotAt = y;
        block(x1, at, own, "node", `${g}`);
        for (const sign of [1, -1]) {
          const value = summed(group.list.filter((share) => share.value * sign > 0).map((share) => share.value));
          if (!value) continue;
          const h = Math.abs(value) * scale, before = sign > 0 ? 0 : own - h;
          ribbon(x0 + 7, y0, x1, at + before, h, value, "", `${g}`, group.place);
          y0 += h;
        }
        const middle = at + own / 2 + 4, net = summed(group.list.map((share) => share.value));
        const title = svg("text", { x: x1 + 14, y: middle, class: "halo" }, group.name);
        title.append(svg("tspan", { dx: 7, class: "soft" }, signed(net)));
        texts.append(title);
        group.list.forEach((share, n) => {
          const h = thick(share), top = slotAt + (tall(share) - h) / 2, key = `${g}.${n}`;
          ribbon(x1 + 7, at, x2, top, h, share.value, "deep", key, `${share.name}, ${group.place}`);
          block(x2, top, h, share.value > 0 ? "f" : "a", key);
          const line = slotAt + tall(share) / 2 + 4;
          texts.append(svg("text", { x: x2 + 15, y: line }, share.name),
                       svg("text", { x: width - 62, y: line, "text-anchor": "end" }, signed(share.value)),
                       svg("text", { x: width - 2, y: line, "text-anchor": "end", class: "soft" }, share.more));
          at += h;
          slotAt += tall(share);
        });
        y += whole + gap;
      });
      const text = name.length > 13 ? name.slice(0, 12) + "…" : name, middle = height / 2;
      texts.append(svg("text", { x: x0 - 10, y: middle - 3, "text-anchor": "end", class: "big" }, text),
                   svg("text", { x: x0 - 10, y: middle + 15, "text-anchor": "end", class: "soft" },
                       signed(byToken[state.token])));
      picture.append(ribbons, nodes, texts);
      box.replaceChildren(picture);
      box.setAttribute("aria-label", `relevance of ${name}, ${signed(byToken[state.token])}: ` + groups.map((group) =>
        `${group.place}: ${group.list.map((share) => `${share.name} ${signed(share.value)}`).join(", ")}`).join("; "));
    };
    const flow = find(".river");
    const light = (path) => {
      const key = path && path.dataset.g;
      for (const one of flow.querySelectorAll("[data-g]")) {
        const own = one.dataset.g;
        one.classList.toggle("on", Boolean(path) && own !== "" && (own === key || key.startsWith(own + ".")
          || own.startsWith(key + ".")));
      }
    };
    flow.addEventListener("mousemove", (event) => {
      const path = event.target.closest("path");
      light(path);
      if (path) frame.say(path.dataset.v, path.dataset.d, event.clientX, event.clientY - 6);
      else frame.hush();
    });
    flow.addEventListener("mouseleave", () => { light(null); frame.hush(); });

    const choose = (token) => { state.token = token; paint(); reveal(); strip.outline(); river(); };
    words.addEventListener("click", (event) => {
      const span = event.target.closest(".word");
      if (span) { choose(Number(span.dataset.i)); span.focus({ preventScroll: true }); }
    });
    words.addEventListener("mouseover", (event) => {
      const span = event.target.closest(".word");
      if (!span) return;
      const place = span.getClientRects()[0], i = Number(span.dataset.i);
      frame.say(signed(byToken[i]), `entered experts at position ${rows[state.row].positions[i]}`, place.left + place.width / 2, place.top);
    });
    words.addEventListener("mouseout", () => frame.hush());
    words.addEventListener("keydown", (event) => {
      const to = { ArrowRight: state.token + 1, ArrowDown: state.token + 1, ArrowLeft: state.token - 1,
                   ArrowUp: state.token - 1, Home: 0, End: spans.length - 1 }[event.key];
      if (to === undefined || !spans[to]) return;
      event.preventDefault();
      choose(to);
      spans[to].focus();
    });

    // What is shown

    /** Pixels of a cell: as wide as the page allows; so wide that two maps stand side by side, where that will do. */
    const cellWidth = (names, beside) => {
      const side = Math.max(40, Math.min(150, 7.5 * Math.max(...names.map((name) => name.length))) + 10);
      const own = side + 72 + (shared ? 36 : 14), half = Math.floor(((room() - 36) / 2 - own) / most);
      return Math.max(3, Math.min(26, beside && half >= 9 ? half : Math.floor((room() - own) / most)));
    };
    const refresh = () => {
      prepare();
      const side = cellWidth(layers.map((layer) => layer.name), true);
      for (const one of [relevant, routed]) one.draw(side);
      const tokens = Array.from({ length: found[state.layer].tokens }, (_, token) => label(token, state.layer));
      strip.draw(Math.min(side, cellWidth(tokens, false)));
      paint();
      reveal();
      river();
      legend(find(".relevance"), scaleOf(found.flatMap(columnsOf)));
      find(".frequency .high").textContent = percent(full.load);
    };
    const look = () => {
      count();
      write();
      state.layer = largest(found.map((one) => one.entering));
      state.token = largest(byToken);
      refresh();
    };
    const [rowPick, seedPick] = [find("select[name=row]"), find("select[name=seed]")];
    const fill = (pick, names) => {
      pick.replaceChildren(...names.map((name, i) => { const one = make("option", "", name); one.value = i; return one; }));
      pick.closest("label").hidden = names.length < 2;
    };
    fill(rowPick, rows.map((row) => row.name));
    fill(seedPick, rows[0].targets);
    article.addEventListener("change", (event) => {
      const { name, value, checked } = event.target;
      if (name === "row") { state.row = Number(value); fill(seedPick, rows[state.row].targets); state.seed = 0; look(); }
      if (name === "seed") { state.seed = Number(value); count(); refresh(); }
      if (name === "ranked") { state.ranked = checked; refresh(); }
      if (name === "all") { state.all = checked; river(); }
    });
    for (const form of article.querySelectorAll("form")) form.addEventListener("submit", (event) => event.preventDefault());
    article.addEventListener("explains", (event) => {
      if (event.detail >= rows[state.row].targets.length || event.detail < 0) return;
      state.seed = event.detail;
      seedPick.value = event.detail;
      count();
      refresh();
    });
    find(".drawn").hidden = false;
    look();
    frame.onTheme(refresh);
    addEventListener("resize", refresh);
  };
  for (const article of document.querySelectorAll("article.experts")) card(article);
})();
