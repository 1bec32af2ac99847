// Choosing a model and steering it: the model's card with verdict and progress, the memory bar with its forecast, and
// the settings behind the button "More". Words and numbers come from app/cards.py as JSON.
"use strict";

Object.assign(window.MoEpic, (() => {
  const { listen, say, make, follow } = window.MoEpic;
  const CALM_MS = 1000; // after a change by hand, in which nothing else changes
  const NARROW_PX = 700; // of the column, below which settings and panels need another arrangement
  const find = (selector) => document.querySelector(selector);

  // Components come in any order.
  function whenThere(selector, act) {
    const found = find(selector);
    if (found) act(found);
    else requestAnimationFrame(() => whenThere(selector, act));
  }

  // ---- model card: verdict, facts, progress ----

  const MARKS = { "fits whole": "✓", "fits with offloading": "✓", "will not run": "✕", download: "↓" };

  function card(element, props, watch) {
    const root = element.querySelector(".card");
    const verdict = make("p", "verdict");
    verdict.setAttribute("role", "status");
    const progress = make("div", "progress");
    const bar = make("progress");
    bar.max = 1;
    bar.setAttribute("aria-label", "Loading");
    const words = make("span");
    progress.append(bar, words);
    progress.hidden = true;
    const facts = make("dl", "facts");
    const notes = make("ul", "notes");
    root.replaceChildren(verdict, progress, facts, notes);
    let shown = null; // what the card is of; null before the first one
    let asked = null;

    follow(props, watch, (card) => {
      shown = card.shown === undefined ? null : { loads: card.loads, shown: card.shown };
      asked = null;
      verdict.dataset.step = card.step ?? "";
      const mark = make("i", "", MARKS[card.step] ?? "");
      mark.setAttribute("aria-hidden", "true");
      verdict.replaceChildren(mark, make("span", "", card.verdict ?? ""));
      verdict.dataset.tip = card.verdict ?? "";
      facts.replaceChildren(...(card.facts ?? []).flatMap(([name, fact]) => {
        const words = make("dd", "", fact);
        words.dataset.tip = fact; // it may be cut off
        return [make("dt", "", name), words];
      }));
      notes.replaceChildren(...(card.notes ?? []).map((note) => make("li", "", note)));
    });
    listen((live) => {
      if (live === null) {
        if (shown) shown.loads = -1; // the server that comes back may be another one
        return;
      }
      progress.hidden = !live.progress.text;
      verdict.hidden = !progress.hidden;
      say(words, live.progress.text);
      if (live.progress.share === null) bar.removeAttribute("value");
      else bar.value = live.progress.share;
      if (shown === null || live.shown === asked || isHeld()) return;
      // Another model is loaded, or something else has changed, perhaps in another tab: ask Python what to show now.
      const button = live.loads !== shown.loads ? "#refresh" : live.shown !== shown.shown ? "#renew" : null;
      if (button) asked = live.shown;
      find(button ?? "nothing")?.click();
    });
  }

  // Whether the user has a control in hand, which new values would take away.
  let isPressed = false;
  let changedAt = -CALM_MS;
  document.addEventListener("input", (event) => event.target.closest?.("#controls") && (changedAt = performance.now()), true);
  document.addEventListener("pointerdown", (event) => (isPressed = Boolean(event.target.closest?.("#controls"))), true);
  for (const name of ["pointerup", "pointercancel"]) document.addEventListener(name, () => (isPressed = false), true);

  function isHeld() {
    if (isPressed || performance.now() < changedAt + CALM_MS) return true;
    return Boolean(document.activeElement?.matches("#controls :is(input:not([type=range]):not([type=checkbox]))"));
  }

  // ---- memory bar and forecast ----

  function memory(element, props, watch) {
    const root = element.querySelector(".memory");
    const head = make("p", "budget");
    const bar = make("div", "bar");
    bar.setAttribute("role", "img");
    bar.tabIndex = 0;
    const legend = make("ul", "legend");
    const reason = make("p", "reason");
    const forecast = make("div", "forecast");
    forecast.id = "forecast";
    const none = make("p", "none", "The budget and what it buys are shown here for a checkpoint that can be read.");
    let curve = null; // [bytes, seconds] along the slider
    let unit = 0; // bytes of one on the slider

    // Shows at once what the curve says where the slider is; all the rest comes when Python answers.
    function move() {
      const slider = find("#slider input[type=range]");
      if (!curve || !slider || !Number.isFinite(slider.valueAsNumber)) return;
      const bytes = Math.min(Math.max(unit * slider.valueAsNumber, curve[0][0]), curve.at(-1)[0]);
      const right = Math.max(1, curve.findIndex(([at]) => at >= bytes));
      const [[from, early], [to, late]] = [curve[right - 1], curve[right]];
      const seconds = early + ((late - early) * (bytes - from)) / (to - from);
      say(forecast.querySelector("b"), (1 / seconds).toFixed(1));
      place(forecast, (bytes - curve[0][0]) / (curve.at(-1)[0] - curve[0][0]), seconds, curve);
    }
    document.addEventListener("input", (event) => event.target.closest?.("#slider") && move());

    follow(props, watch, (memory) => {
      curve = memory?.forecast?.curve ?? null;
      unit = memory?.forecast?.unit ?? 0;
      if (memory === null) return root.replaceChildren(none);
      if (none.isConnected || !head.isConnected) root.replaceChildren(head, forecast, bar, legend, reason);
      head.replaceChildren(
        make("b", "", memory.budget),
        make("span", "", ` of ${memory.everything} for everything`),
        make("em", "", memory.state),
      );
      forecast.hidden = !memory.forecast;
      if (memory.forecast) forecast.replaceChildren(...predicted(memory.forecast));
      if (isPressed) move(); // this answers where the slider was
      bar.replaceChildren(...memory.parts.map((part) => {
        const piece = make("i", part.kind);
        piece.style.width = `${100 * part.share}%`;
        piece.dataset.tip = `${part.label}: ${part.text}`;
        return piece;
      }));
      bar.setAttribute("aria-label", memory.parts.map((part) => `${part.label} ${part.text}`).join(", "));
      legend.replaceChildren(...memory.parts.map((part) => {
        const row = make("li");
        row.append(make("i", part.kind), make("span", "", part.label), make("b", "", part.text));
        return row;
      }));
      say(reason, memory.reason);
      reason.dataset.tip = memory.reason;
    });
  }

  // The predicted speed, its range, and how the time per token would change with the budget.
  function predicted(forecast) {
    const number = make("p", "speed");
    number.dataset.tip = `${forecast.time}. ${forecast.definition}`;
    number.tabIndex = 0;
    const value = make("b", "", forecast.speed);
    value.dataset.t = "predicted";
    number.append(value, make("span", "", `tokens/s predicted (${forecast.range})`));
    const plot = make("div", "curve");
    plot.setAttribute("role", "img");
    plot.setAttribute("aria-label", forecast.label);
    plot.tabIndex = 0;
    plot.dataset.tip = forecast.label;
    plot.dataset.explore = "budgets"; // there for every strategy
    const svg = draw("svg", { viewBox: "0 0 100 30", preserveAspectRatio: "none" });
    const points = forecast.points.map(([x, y]) => `${100 * x},${28 - 26 * y}`).join(" ");
    svg.append(draw("polyline", { points }), draw("line", { y1: 0, y2: 30 }));
    plot.append(make("span", "most", forecast.most), svg, make("span", "least", forecast.least), make("i"));
    place(plot, forecast.at, forecast.seconds, forecast.curve);
    plot.onpointermove = (event) => {
      const at = event.offsetX / plot.clientWidth;
      const near = forecast.points.reduce((best, each) => (Math.abs(each[0] - at) < Math.abs(best[0] - at) ? each : best));
      plot.dataset.tip = near[2];
      plot.dispatchEvent(new PointerEvent("pointerover", { bubbles: true })); // shows the tip anew
    };
    return [number, plot];
  }

  // Puts the present point on the curve: `at` of its width.
  function place(plot, at, seconds, curve) {
    const times = curve.map(([, each]) => each);
    const [least, most] = [Math.min(...times), Math.max(...times)];
    const line = plot.querySelector("line");
    const dot = plot.querySelector("i");
    for (const name of ["x1", "x2"]) line.setAttribute(name, 100 * at);
    dot.style.left = `${100 * at}%`;
    dot.style.top = `${(100 * (28 - (26 * (seconds - least)) / Math.max(most - least, 1e-9))) / 30}%`;
  }

  function draw(tag, attributes) {
    const element = document.createElementNS("http://www.w3.org/2000/svg", tag);
    for (const [name, value] of Object.entries(attributes)) element.setAttribute(name, value);
    return element;
  }

  // ---- the settings behind "More" ----

  function steer(element, props, watch) {
    const root = element.querySelector(".why");
    const rows = make("dl", "rows");
    const close = make("button", "close", "×");
    close.type = "button";
    close.setAttribute("aria-label", "Close the settings");
    root.replaceChildren(rows, close);
    follow(props, watch, (decided) => {
      rows.replaceChildren(...(decided ?? []).flatMap(([name, words]) => [make("dt", "", name), make("dd", "", words)]));
    });
    whenThere("#controls", (column) => new ResizeObserver(([{ contentRect }]) => {
      document.body.classList.toggle("is-narrow", contentRect.width < NARROW_PX);
    }).observe(column));
    whenThere("#more", (more) => whenThere("#steer", (panel) => openAndClose(more, panel, close)));
    for (const [id, text] of Object.entries(JSON.parse(root.dataset.tips))) whenThere(`#${id}`, (place) => explain(place, text));
    whenThere("#checkpoint", picker);
  }

  function openAndClose(more, panel, close) {
    panel.setAttribute("role", "group");
    panel.setAttribute("aria-label", "More settings, and what was decided");
    more.setAttribute("aria-controls", "steer");
    const open = (isOpen) => {
      document.body.classList.toggle("steering", isOpen);
      more.setAttribute("aria-expanded", String(isOpen));
    };
    open(false);
    more.addEventListener("click", () => open(more.getAttribute("aria-expanded") === "false"));
    const leave = () => {
      open(false);
      more.focus();
    };
    close.onclick = leave;
    document.addEventListener("keydown", (event) => {
      const isOpen = document.body.classList.contains("steering") && !find("dialog[open]");
      // In an open list Escape closes the list alone.
      if (event.key === "Escape" && isOpen && !event.target.matches("input[aria-expanded=true]")) leave();
    }, true);
  }

  // What each setting means: under the pointer, and for screen readers.
  function explain(place, text) {
    const label = place.querySelector("[data-testid=block-info]") ?? place;
    label.dataset.tip = text;
    for (const control of place.querySelectorAll("input")) control.setAttribute("aria-description", text);
  }

  // A line of the picker is "name · facts · verdict"; the style sheet shows the parts apart.
  function picker(place) {
    const tellApart = () => {
      for (const option of place.querySelectorAll("[role=option]:not([data-name])")) {
        const [name, ...facts] = option.getAttribute("aria-label").split(" · ");
        option.dataset.name = name;
        option.dataset.facts = facts.join(" · ");
        option.dataset.step = facts.at(-1) ?? "";
      }
    };
    new MutationObserver(tellApart).observe(place, { childList: true, subtree: true });
  }

  // Gradio's sliders tell Python about a release of the mouse only; here the keys of a keyboard count as well.
  document.addEventListener("keyup", (event) => {
    if (event.target.matches?.("#controls input[type=range]") && event.key !== "Tab") {
      event.target.dispatchEvent(new PointerEvent("pointerup", { bubbles: true }));
    }
  });
  document.addEventListener("keydown", (event) => {
    if (event.key === "Enter" && event.target.matches?.("#controls .block:has(input[type=range]) input[type=number]")) {
      event.target.blur();
    }
  });

  return { card, memory, steer };
})());
