// The panels that show the engine at work. Python (app/live.py, app/gauges.py) makes every number and every word; this
// file puts words into place, as text, and draws the rest on canvases whenever the server has something new to show.
"use strict";

MoEpic.see = (() => {
  const LEFT = 30; // px for the axis of a plot
  const KINDS = ["compute", "stall", "demand", "prefetch"]; // as in EventKind
  const PARTS = ["whole expert", "top segment", "bottom segment"]; // as in Part
  const TIME_STEPS = 65535;
  const EVENT_BYTES = 10;
  const USE_BITS = 6;
  const NO_EXPERT = 3;
  const HOMES = ["on the host only", "top segment on the device", "whole on the device"]; // as in Outcome

  let root = null;
  let live = null; // what is shown
  let drawn = null; // the part `see` of what is drawn
  let palette = {}; // colours, patterns and the font, until the theme changes
  const chosen = { scope: "last", order: "use" };
  const onScreen = new Set(); // names of panels; the others are not drawn, and when there is none nothing is asked
  const sizes = new Map(); // canvas → its size in CSS pixels: asking for it would have the browser lay the page out
  const written = new Map(); // name → places of that text, panel by panel

  // ---- mounting ----

  function see(element) {
    root = element.querySelector(".see");
    for (const name of Object.keys(chosen)) {
      for (const button of root.querySelectorAll(`[data-${name}]`)) button.onclick = () => choose(name, button);
    }
    for (const [name, where] of Object.entries(UNDER_POINTER)) followPointer(canvas(name), where);
    for (const place of root.querySelectorAll("[data-t]")) {
      const { t } = place.dataset;
      written.set(t, [...(written.get(t) ?? []), place]);
    }
    const resized = new ResizeObserver((changes) => {
      for (const { target, contentRect } of changes) sizes.set(target, contentRect);
      repaint();
    });
    for (const place of root.querySelectorAll("canvas")) resized.observe(place);
    const seen = new IntersectionObserver((changes) => {
      for (const { target, isIntersecting } of changes) {
        onScreen[isIntersecting ? "add" : "delete"](target.dataset.p);
      }
      MoEpic.seePanels(onScreen.size > 0);
      repaint();
    }, { rootMargin: "100px" });
    for (const panel of root.querySelectorAll(".panel")) seen.observe(panel);
    let isDark = null;
    const lit = () => {
      if (isDark === (isDark = document.body.classList.contains("dark"))) return;
      palette = {};
      repaint();
    };
    lit();
    new MutationObserver(lit).observe(document.body, { attributeFilter: ["class"] });
    MoEpic.listen(update);
  }

  function choose(name, button) {
    chosen[name] = button.dataset[name];
    for (const other of root.querySelectorAll(`[data-${name}]`)) {
      other.setAttribute("aria-pressed", String(other === button));
    }
    repaint();
  }

  function update(answer) {
    root.classList.toggle("lost", answer === null);
    if (answer === null) return; // the header says that the server is gone; what was shown stays, paler
    live = answer;
    if (live.hardware && onScreen.has("hardware")) showHardware(live.hardware);
    if (live.see !== drawn) repaint();
  }

  function repaint() {
    if (!live?.see) return;
    drawn = live.see;
    for (const [name, draw] of Object.entries(PANELS)) {
      if (onScreen.has(name)) draw(live.see);
    }
  }

  const canvas = (name) => root.querySelector(`[data-c=${name}]`);

  function write(texts) {
    for (const [name, text] of Object.entries(texts)) {
      for (const place of written.get(name) ?? []) MoEpic.say(place, text);
    }
  }

  function clear(panel, keep = []) {
    for (const place of root.querySelectorAll(`[data-p=${panel}] [data-t]`)) {
      if (!keep.includes(place.dataset.t)) MoEpic.say(place, "–");
    }
  }

  // ---- drawing ----

  // A pen for the canvas `name`, cleared and sized to its place, in CSS pixels.
  function pen(name, label) {
    const place = canvas(name);
    const { width, height } = sizes.get(place) ?? { width: 0, height: 0 };
    const scale = devicePixelRatio || 1;
    if (place.width !== Math.round(width * scale) || place.height !== Math.round(height * scale)) {
      place.width = Math.round(width * scale);
      place.height = Math.round(height * scale);
    }
    const ink = place.getContext("2d");
    ink.setTransform(scale, 0, 0, scale, 0, 0);
    ink.clearRect(0, 0, width, height);
    ink.font = palette.font ??= `11px ${getComputedStyle(root).fontFamily}`;
    ink.textBaseline = "middle";
    if (place.getAttribute("aria-label") !== label) place.setAttribute("aria-label", label);
    return { ink, width, height };
  }

  function colour(name) {
    return (palette[name] ??= getComputedStyle(root).getPropertyValue(`--${name}`).trim());
  }

  function text(ink, words, x, y, align = "right", paint = "faint") {
    ink.fillStyle = colour(paint);
    ink.textAlign = align;
    ink.fillText(words, x, y);
  }

  function empty({ ink, width, height }, words) {
    text(ink, words, LEFT + (width - LEFT) / 2, height / 2, "center", "mute");
  }

  // Numbers of layers or experts below a plot, at distances that leave them room.
  function ticks({ ink, width, height }, count) {
    const room = (width - LEFT) / count;
    const step = [1, 2, 4, 8, 16, 32, 64].find((step) => step * room >= 26) ?? 128;
    for (let place = 0; place < count; place += step) {
      text(ink, String(place), LEFT + (place + 0.5) * room, height - 6, "center");
    }
  }

  function axis({ ink, width, height }, bottom, top, values, say) {
    const y = (share) => bottom - (bottom - top) * share;
    ink.strokeStyle = colour("line");
    ink.lineWidth = 1;
    for (const [share, value] of values) {
      ink.beginPath();
      ink.moveTo(LEFT, Math.round(y(share)) + 0.5);
      ink.lineTo(width, Math.round(y(share)) + 0.5);
      ink.stroke();
      text(ink, say(value), LEFT - 6, Math.min(height - 6, Math.max(6, y(share))));
    }
    return y;
  }

  // ---- speed ----

  function drawSpeed({ speed }) {
    write(speed.texts);
    const plot = pen("speed", speed.label);
    const { ink, width, height } = plot;
    const rates = speed.rates;
    if (!rates.length) return empty(plot, "fills in with the first tokens");
    const room = 240;
    const most = roundUp(percentile(rates, 0.98) * 1.15);
    const y = axis(plot, height - 4, 5, [[0, 0], [0.5, most / 2], [1, most]], (value) => String(+value.toPrecision(3)));
    const x = (place) => LEFT + ((width - LEFT) * (place + room - rates.length)) / (room - 1);
    const line = new Path2D();
    rates.forEach((rate, place) => {
      const isStart = place === 0 || speed.starts.includes(place);
      line[isStart ? "moveTo" : "lineTo"](x(place), y(Math.min(1, rate / most)));
    });
    ink.strokeStyle = colour("gpu");
    ink.lineWidth = 1.6;
    ink.lineJoin = "round";
    ink.stroke(line);
    ink.strokeStyle = colour("faint");
    ink.lineWidth = 1;
    ink.setLineDash([2, 3]);
    for (const start of speed.starts) {
      ink.beginPath();
      ink.moveTo(x(start - 0.5), 5);
      ink.lineTo(x(start - 0.5), height - 4);
      ink.stroke();
    }
    ink.setLineDash([]);
  }

  // A single quick token would flatten all others, so the axis leaves out the two quickest in a hundred.
  function percentile(values, share) {
    return Float64Array.from(values).sort()[Math.floor((values.length - 1) * share)];
  }

  function roundUp(value) {
    const unit = 10 ** Math.floor(Math.log10(value));
    return unit * [1, 2, 4, 6, 8, 10].find((step) => step * unit >= value);
  }

  // ---- layers ----

  function drawLayers({ layers }) {
    if (!layers) {
      clear("layers");
      empty(pen("layers", "Hits per layer: no model"), "no model is loaded");
      pen("plan", "Split ratio and slots per layer: no model");
      return;
    }
    const scope = layers[chosen.scope];
    write({ ...scope.texts, ...layers.texts });
    const plot = pen("layers", scope.label);
    const { ink, width, height } = plot;
    const count = scope.hits.length;
    const room = (width - LEFT) / count;
    const gap = room > 7 ? 2 : room > 3 ? 1 : 0;
    const y = axis(plot, height - 2, 4, [[0, 0], [0.5, 50], [1, 100]], (value) => `${value}`);
    const bars = [["gpu", scope.hits], ["gpu-light", scope.partial], ["bus", scope.misses]];
    let uses = 0;
    for (let layer = 0; layer < count; layer++) {
      const all = scope.hits[layer] + scope.partial[layer] + scope.misses[layer];
      uses += all;
      let below = 0;
      for (const [paint, numbers] of all ? bars : []) {
        const top = y((below + numbers[layer]) / all);
        ink.fillStyle = colour(paint);
        ink.fillRect(LEFT + layer * room, top, room - gap, Math.max(0, y(below / all) - top - (below ? 0.6 : 0)));
        below += numbers[layer];
      }
    }
    if (!uses) empty(plot, "fills in with the first token");
    else if (scope.ceiling) drawCeiling(ink, scope.ceiling, room, gap, y);
    drawPlan(layers, room, gap);
  }

  function drawCeiling(ink, ceiling, room, gap, y) {
    for (const [paint, thickness] of [["card", 4], ["ink", 2]]) {
      ink.fillStyle = colour(paint);
      ceiling.forEach((share, layer) => {
        if (share !== null) ink.fillRect(LEFT + layer * room, y(share) - thickness / 2, room - gap, thickness);
      });
    }
  }

  function drawPlan(layers, room, gap) {
    const plot = pen("plan", layers.label);
    const { ink, height } = plot;
    const y = axis(plot, height - 13, 5, [[0, 0], [1, 1]], String);
    layers.slots.forEach((slots, layer) => {
      const top = y(slots / layers.experts[layer]);
      ink.fillStyle = colour("violet");
      ink.fillRect(LEFT + layer * room, top, room - gap, y(0) - top);
    });
    ink.fillStyle = colour("ink");
    layers.split.forEach((split, layer) => ink.fillRect(LEFT + layer * room, y(split) - 1, room - gap, 2));
    ticks(plot, layers.slots.length);
  }

  function layerAt(x, width) {
    const { layers } = live.see;
    const layer = layers && Math.floor(((x - LEFT) / (width - LEFT)) * layers.slots.length);
    if (!layers || layer < 0 || layer >= layers.slots.length) return null;
    const scope = layers[chosen.scope];
    const [hits, partial, misses] = [scope.hits[layer], scope.partial[layer], scope.misses[layer]];
    const percent = (count) => `${Math.round((100 * count) / (hits + partial + misses))} %`;
    const lines = [`Layer ${layer}`];
    if (hits + partial + misses) {
      lines.push(`${percent(hits)} hits, ${percent(partial)} partial hits, ${percent(misses)} misses`);
      lines.push(`${hits} + ${partial} + ${misses} uses`);
    }
    if (scope.ceiling?.[layer] != null) lines.push(`ceiling ${Math.round(100 * scope.ceiling[layer])} %`);
    lines.push(`${layers.slots[layer]} slots for ${layers.experts[layer]} experts, split ratio ${layers.split[layer]}`);
    return lines;
  }

  // ---- experts ----

  const map = document.createElement("canvas"); // one pixel per expert
  let cells = null; // as drawn: upper two bits where it lives, lower six its use
  let ids = null; // which expert a cell is of

  function drawHeat({ heat }) {
    if (!heat) {
      clear("heat");
      empty(pen("heat", "Experts: no model"), "no model is loaded");
      return;
    }
    write(heat.texts);
    const { rows, columns } = heat;
    arrange(Uint8Array.from(atob(heat.cells), (letter) => letter.charCodeAt(0)), rows, columns);
    map.width = columns;
    map.height = rows;
    const small = map.getContext("2d");
    const image = small.createImageData(columns, rows);
    const pixels = new Uint32Array(image.data.buffer);
    const colours = cellColours();
    for (let place = 0; place < cells.length; place++) pixels[place] = colours[cells[place]];
    small.putImageData(image, 0, 0);
    const plot = pen("heat", heat.label);
    const { ink, width, height } = plot;
    ink.imageSmoothingEnabled = false;
    ink.drawImage(map, LEFT, 0, width - LEFT, height - 13);
    const room = (height - 13) / rows;
    if (columns <= 64 && rows <= 32) grid(ink, width, height - 13, rows, columns);
    text(ink, "L0", LEFT - 6, Math.max(6, room / 2));
    if (rows > 1) text(ink, `L${rows - 1}`, LEFT - 6, height - 13 - Math.max(5, room / 2));
    if (chosen.order === "number") ticks(plot, columns);
    else {
      text(ink, "most used", LEFT, height - 6, "left");
      text(ink, "least used", width, height - 6, "right");
    }
  }

  // Sorts every row by use, most used first (a counting sort: there are few steps of use), unless numbers are wanted.
  function arrange(bytes, rows, columns) {
    cells = new Uint8Array(bytes.length);
    ids = new Uint16Array(bytes.length);
    const mask = (1 << USE_BITS) - 1;
    for (let row = 0; row < rows; row++) {
      const first = row * columns;
      const starts = new Uint32Array(mask + 3);
      if (chosen.order === "use") {
        for (let place = 0; place < columns; place++) starts[rank(bytes[first + place], mask) + 1]++;
        for (let step = 1; step < starts.length; step++) starts[step] += starts[step - 1];
      }
      for (let place = 0; place < columns; place++) {
        const byte = bytes[first + place];
        const target = first + (chosen.order === "use" ? starts[rank(byte, mask)]++ : place);
        cells[target] = byte;
        ids[target] = place;
      }
    }
  }

  function rank(byte, mask) {
    return byte >> USE_BITS === NO_EXPERT ? mask + 1 : mask - (byte & mask);
  }

  // Of every byte that a cell can be, as the pixel of a little-endian image.
  function cellColours() {
    const ramps = ["host", "top", "whole"].map((home) => ["weak", "strong"].map((end) => rgb(colour(`${home}-${end}`))));
    ramps.push([rgb(colour("card")), rgb(colour("card"))]);
    return Uint32Array.from({ length: 256 }, (_, byte) => {
      const [weak, strong] = ramps[byte >> USE_BITS];
      const share = Math.sqrt((byte & 63) / 63);
      const [red, green, blue] = weak.map((value, part) => Math.round(value + (strong[part] - value) * share));
      return ((255 << 24) | (blue << 16) | (green << 8) | red) >>> 0;
    });
  }

  function rgb(hex) {
    return [1, 3, 5].map((start) => parseInt(hex.slice(start, start + 2), 16));
  }

  function grid(ink, width, height, rows, columns) {
    ink.fillStyle = colour("card");
    for (let row = 1; row < rows; row++) ink.fillRect(LEFT, (height * row) / rows - 0.5, width - LEFT, 1);
    for (let column = 1; column < columns; column++) {
      ink.fillRect(LEFT + ((width - LEFT) * column) / columns - 0.5, 0, 1, height);
    }
  }

  function expertAt(x, y, width, height) {
    const { heat } = live.see;
    if (!heat || !cells) return null;
    const column = Math.floor(((x - LEFT) / (width - LEFT)) * heat.columns);
    const row = Math.floor((y / (height - 13)) * heat.rows);
    if (column < 0 || column >= heat.columns || row < 0 || row >= heat.rows) return null;
    const byte = cells[row * heat.columns + column];
    if (byte >> USE_BITS === NO_EXPERT) return null;
    const use = byte & 63;
    return [
      `Layer ${row}, expert ${ids[row * heat.columns + column]}`,
      HOMES[byte >> USE_BITS],
      use ? `used about ${Math.round((100 * use) / 63)} % as often as the layer's most used` : "not used yet",
    ];
  }

  // ---- the last token ----

  const LANES = 62; // px for their names
  let events = []; // of the token that is shown

  function drawToken({ token }) {
    if (!token) {
      clear("token");
      events = [];
      empty(pen("token", "Timeline of the last token: nothing yet"), "appears with the second token of an answer");
      return;
    }
    write(token.texts);
    events = unpack(token);
    const { ink, width, height } = pen("token", token.label);
    const lane = (height - 14) / 3;
    const x = (share) => LANES + (width - LANES) * share;
    ["Compute", "Demand", "Prefetch"].forEach((name, number) => {
      ink.fillStyle = colour("track");
      ink.fillRect(LANES, number * lane + 2, width - LANES, lane - 4);
      text(ink, name, 0, (number + 0.5) * lane, "left", "mute");
    });
    for (const event of events) {
      const left = x(event.start);
      const wide = Math.max(0.7, x(event.end) - left - 0.3);
      ink.fillStyle = event.kind === "stall" ? stripes(ink) : colour(PAINTS[event.kind]);
      ink.fillRect(left, laneOf(event.kind) * lane + 2, wide, lane - 4);
    }
    for (const event of events) {
      if (event.kind === "stall") nameGap(ink, milliseconds(event, token), x(event.start), x(event.end), lane / 2);
    }
    const step = roundUp((1000 * token.seconds) / 8);
    for (let time = 0; time < 1000 * token.seconds; time += step) {
      const place = x(time / (1000 * token.seconds));
      if (place < width - 20) text(ink, time ? `${+time.toPrecision(4)}` : "0 ms", place, height - 6, time ? "center" : "left");
    }
  }

  const PAINTS = { compute: "gpu", demand: "bus", prefetch: "cpu" };

  function laneOf(kind) {
    return { compute: 0, stall: 0, demand: 1, prefetch: 2 }[kind];
  }

  // Events as the fields of WIRE in app/live.py say.
  function unpack(token) {
    const bytes = Uint8Array.from(atob(token.events), (letter) => letter.charCodeAt(0));
    const view = new DataView(bytes.buffer);
    return Array.from({ length: bytes.length / EVENT_BYTES }, (_, number) => {
      const first = number * EVENT_BYTES;
      const what = view.getUint8(first);
      return {
        kind: KINDS[what >> 2],
        part: PARTS[what & 3],
        size: token.sizes[view.getUint8(first + 1)],
        layer: view.getUint16(first + 2, true),
        expert: view.getInt16(first + 4, true),
        start: view.getUint16(first + 6, true) / TIME_STEPS,
        end: view.getUint16(first + 8, true) / TIME_STEPS,
      };
    });
  }

  function stripes(ink) {
    if (palette.stripes) return palette.stripes;
    const tile = document.createElement("canvas");
    tile.width = tile.height = 6;
    const small = tile.getContext("2d");
    small.fillStyle = colour("card");
    small.fillRect(0, 0, 6, 6);
    small.strokeStyle = colour("stall");
    small.lineWidth = 1.6;
    for (const shift of [-6, 0, 6]) {
      small.beginPath();
      small.moveTo(shift, 6);
      small.lineTo(shift + 6, 0);
      small.stroke();
    }
    return (palette.stripes = ink.createPattern(tile, "repeat"));
  }

  // Writes the length of a gap into it, where there is room.
  function nameGap(ink, words, left, right, y) {
    const room = ink.measureText(words).width + 6;
    if (right - left < room + 4) return;
    ink.fillStyle = colour("card");
    ink.fillRect((left + right - room) / 2, y - 7, room, 14);
    text(ink, words, (left + right) / 2, y, "center", "stall");
  }

  function milliseconds(event, token) {
    const value = 1000 * token.seconds * (event.end - event.start);
    return `${value >= 10 ? Math.round(value) : value.toPrecision(2)} ms`;
  }

  function eventAt(x, y, width, height) {
    const { token } = live.see;
    if (!token || x < LANES) return null;
    const lane = Math.floor(y / ((height - 14) / 3));
    const share = (x - LANES) / (width - LANES);
    const near = 1.5 / (width - LANES); // a short event is hard to meet
    const found = events.findLast(
      (event) => laneOf(event.kind) === lane && share >= event.start - near && share <= event.end + near,
    );
    if (!found) return lane === 0 ? [`${Math.round(1000 * token.seconds * share)} ms`, "no expert is computed"] : null;
    const length = milliseconds(found, token);
    if (found.kind === "stall") return [`Stall of ${length}`, `layer ${found.layer} waits for the link`];
    const what = { compute: "computed", demand: "demand load", prefetch: "prefetch" }[found.kind];
    const lines = [`Layer ${found.layer}, expert ${found.expert}`, `${found.part}, ${what}: ${length}`];
    return found.kind === "compute" ? lines : [...lines, found.size];
  }

  // ---- hardware ----

  function showHardware({ memory, meters, source, gpu }) {
    for (const [name, { text: words, share }] of Object.entries(meters)) {
      const meter = root.querySelector(`[data-m="${name}"]`);
      if (!meter) continue; // the one that the bar shows already
      meter.classList.toggle("absent", words === "not available");
      write({ [name]: words });
      const bar = meter.querySelector("i > b");
      const wanted = `scaleX(${(share ?? 0).toFixed(2)})`;
      if (bar.style.transform !== wanted) bar.style.transform = wanted;
      bar.classList.toggle("full", share > 0.97);
    }
    const named = root.querySelector("[data-t=source]");
    named.hidden = !source;
    MoEpic.say(named, source ?? "");
    MoEpic.say(root.querySelector("[data-t=device]"), gpu);
    showMemory(memory);
  }

  function showMemory(memory) {
    const bar = root.querySelector(".device .bar");
    const device = root.querySelector(".device");
    device.classList.toggle("absent", memory === null);
    MoEpic.say(device.querySelector("[data-t=memory]"), memory ? memory.text : "not available");
    if (memory === null) {
      delete bar.dataset.tip;
      return bar.replaceChildren();
    }
    MoEpic.say(device.querySelector(".term"), memory.name);
    const lines = memory.parts.filter((part) => part.share > 0).map((part) => `${part.label} ${part.text}`);
    if (memory.budget) lines.push(`Budget ${memory.budget.text}`);
    if (bar.dataset.tip === lines.join("\n")) return;
    bar.dataset.tip = lines.join("\n");
    bar.setAttribute("aria-label", `${memory.name}, ${memory.text} used: ${lines.join(", ")}`);
    const pieces = memory.parts.map((part) => {
      const piece = document.createElement("i");
      piece.className = part.kind;
      piece.style.width = `${100 * part.share}%`;
      return piece;
    });
    if (memory.budget) {
      const tick = document.createElement("u");
      tick.style.left = `${100 * memory.budget.share}%`;
      pieces.push(tick);
    }
    bar.replaceChildren(...pieces);
  }

  // ---- tooltips, for the whole page ----

  const tip = document.createElement("div");
  tip.className = "tip";
  tip.id = "tip";
  tip.setAttribute("role", "tooltip");
  tip.hidden = true;

  function showTip(lines, x, y) {
    const home = document.querySelector("dialog[open]") ?? document.body; // an open dialog lies above all else
    if (tip.parentNode !== home) home.append(tip);
    tip.replaceChildren(...lines.map((line) => Object.assign(document.createElement("p"), { textContent: line })));
    tip.hidden = false;
    const { offsetWidth: width, offsetHeight: height } = tip;
    tip.style.left = `${Math.max(6, Math.min(x + 12, innerWidth - width - 6))}px`;
    tip.style.top = `${y + 16 + height < innerHeight ? y + 16 : Math.max(6, y - height - 10)}px`;
  }

  function hideTip() {
    tip.hidden = true;
  }

  function followPointer(place, where) {
    place.onpointermove = (event) => {
      const lines = live?.see && where(event.offsetX, event.offsetY, place.clientWidth, place.clientHeight);
      if (lines) showTip(lines, event.clientX, event.clientY);
      else hideTip();
    };
    place.onpointerleave = hideTip;
  }

  function explain(event) {
    const place = event.target.closest?.("[data-tip], canvas[role=img]");
    if (!place || (place.matches("canvas") && event.type !== "focusin")) return;
    if (event.type === "focusin" && !place.matches(":focus-visible")) return;
    const box = place.getBoundingClientRect();
    const words = place.dataset.tip ?? place.getAttribute("aria-label");
    showTip(words.split("\n"), box.left - 12, box.bottom - 10);
  }

  document.addEventListener("pointerover", explain);
  document.addEventListener("focusin", explain);
  document.addEventListener("focusout", hideTip);
  document.addEventListener("pointerout", (event) => event.target.closest?.("[data-tip]") && hideTip());
  document.addEventListener("keydown", (event) => event.key === "Escape" && hideTip());
  document.addEventListener("close", hideTip, { capture: true });
  document.addEventListener("scroll", hideTip, { capture: true, passive: true });

  const PANELS = { speed: drawSpeed, layers: drawLayers, heat: drawHeat, token: drawToken };
  const UNDER_POINTER = {
    speed: (x, y, width) => {
      const { rates } = live.see.speed;
      const place = Math.round(((x - LEFT) / (width - LEFT)) * 239) - 240 + rates.length;
      return rates[place] === undefined ? null : [`${rates[place]} tokens/s`];
    },
    layers: (x, y, width) => layerAt(x, width),
    plan: (x, y, width) => layerAt(x, width),
    heat: expertAt,
    token: eventAt,
  };

  return see;
})();
