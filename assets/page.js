// What moves on the page by itself: live figures, progress, notices, the memory bar. Words and numbers come from
// app/views.py as JSON; this file puts them into place, always as text and never as HTML.
"use strict";

window.MoEpic ??= (() => {
  const POLL_MS = { soon: 200, busy: 500, idle: 1500, loading: 250, hidden: 2000, longest: 8000 };
  const listeners = new Set(); // called with every answer of the server, or with null when there is none
  let latest = null; // the newest answer of the server
  let failures = 0;
  let timer = 0;

  // ---- asking the server ----

  async function poll() {
    clearTimeout(timer);
    let wait = POLL_MS.hidden;
    if (!document.hidden) {
      const live = await ask();
      for (const listener of listeners) listener(live);
      if (live === null) wait = Math.min(POLL_MS.longest, 500 * 2 ** ++failures);
      else {
        failures = 0;
        wait = live.progress.text ? POLL_MS.loading : live.busy ? POLL_MS.busy : POLL_MS.idle;
      }
    }
    timer = setTimeout(poll, wait);
  }

  async function ask() {
    try {
      const seen = encodeURIComponent(latest?.version ?? "");
      const answer = await fetch(new URL(`ui/live?seen=${seen}`, document.baseURI), { cache: "no-store" });
      const live = answer.ok ? await answer.json() : null;
      if (live) live.see ??= latest?.see; // left out when it is what we have seen already
      latest = live;
    } catch {
      latest = null; // the server is gone; the header says so until it is back
    }
    return latest;
  }

  // Calls `draw` with what the server said last, now and whenever it says something new.
  function listen(draw) {
    listeners.add(draw);
    if (latest) draw(latest);
  }

  function pollSoon() {
    clearTimeout(timer);
    timer = setTimeout(poll, POLL_MS.soon);
  }

  // What the user does probably changes what the server will say.
  document.addEventListener("click", pollSoon);
  document.addEventListener("keydown", (event) => event.key === "Enter" && pollSoon());
  document.addEventListener("visibilitychange", () => document.hidden || poll());

  // ---- small helpers ----

  function make(tag, className, text) {
    const element = document.createElement(tag);
    if (className) element.className = className;
    if (text !== undefined) element.textContent = text;
    return element;
  }

  // Writes only what has changed, so that screen readers and selections are left in peace.
  function say(element, text) {
    if (element.textContent !== text) element.textContent = text;
  }

  function show(element, text) {
    element.hidden = !text;
    if (text) say(element, text);
  }

  // Calls `draw` with the JSON in a gr.HTML component's value, now and whenever Python sets a new one.
  function follow(props, watch, draw) {
    const read = () => draw(JSON.parse(props.value));
    watch("value", read);
    read();
  }

  // ---- header: status, figures, notices, theme ----

  function header(element) {
    const find = (name) => element.querySelector(`[data-live=${name}]`);
    const pill = element.querySelector(".pill");
    const notice = element.querySelector(".notice");
    let dismissed = 0;
    let number = 0;
    notice.querySelector("button").onclick = () => {
      dismissed = number;
      notice.hidden = true;
    };
    listeners.add((live) => {
      pill.classList.toggle("busy", Boolean(live?.busy));
      pill.classList.toggle("off", live === null);
      say(find("status"), live ? live.status : "server not reachable");
      document.body.classList.toggle("is-loading", Boolean(live?.progress.text));
      if (live === null) return;
      for (const [key, text] of Object.entries(live.figures)) say(element.querySelector(`[data-figure=${key}]`), text);
      show(find("link"), live.link);
      show(find("warning"), live.warning);
      number = live.notice?.number ?? 0;
      notice.hidden = number === 0 || number === dismissed;
      if (notice.hidden) return;
      notice.dataset.kind = live.notice.kind;
      say(find("notice"), live.notice.text);
    });
    theme(element.querySelector(".theme"));
    poll();
  }

  function theme(button) {
    const chosen = localStorage.getItem("moepic-theme");
    const asked = new URLSearchParams(location.search).has("__theme"); // Gradio's own way wins
    if (chosen && !asked) document.body.classList.toggle("dark", chosen === "dark");
    button.onclick = () => {
      const dark = document.body.classList.toggle("dark");
      localStorage.setItem("moepic-theme", dark ? "dark" : "light");
    };
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
    let shownLoads = null; // how many models had been loaded when the card was written; null before the first card
    let askedLoads = null;

    follow(props, watch, (card) => {
      shownLoads = card.loads ?? null;
      askedLoads = null;
      verdict.dataset.step = card.step ?? "";
      const mark = make("i", "", MARKS[card.step] ?? "");
      mark.setAttribute("aria-hidden", "true");
      verdict.replaceChildren(mark, make("span", "", card.verdict ?? ""));
      const rows = (card.facts ?? []).flatMap(([name, fact]) => [make("dt", "", name), make("dd", "", fact)]);
      facts.replaceChildren(...rows);
      notes.replaceChildren(...(card.notes ?? []).map((note) => make("li", "", note)));
    });
    listeners.add((live) => {
      if (live === null) {
        shownLoads = -1; // the server that comes back may be another one
        return;
      }
      progress.hidden = !live.progress.text;
      verdict.hidden = !progress.hidden;
      say(words, live.progress.text);
      if (live.progress.share === null) bar.removeAttribute("value");
      else bar.value = live.progress.share;
      // Another model is loaded, perhaps through another tab: ask Python for what the panels show now.
      if (shownLoads !== null && live.loads !== shownLoads && live.loads !== askedLoads) {
        askedLoads = live.loads;
        document.querySelector("#refresh")?.click();
      }
    });
  }

  // ---- memory bar ----

  function memory(element, props, watch) {
    const root = element.querySelector(".memory");
    const head = make("p", "budget");
    const bar = make("div", "bar");
    bar.setAttribute("role", "img");
    const legend = make("ul", "legend");
    const reason = make("p", "reason");
    const forecast = make("div", "forecast");
    forecast.id = "forecast";
    root.replaceChildren(head, forecast, bar, legend, reason);

    follow(props, watch, (memory) => {
      root.hidden = memory === null;
      if (memory === null) return;
      head.replaceChildren(
        make("b", "", memory.budget),
        make("span", "", ` of ${memory.everything} for everything`),
        make("em", "", memory.state),
      );
      forecast.hidden = !memory.forecast;
      if (memory.forecast) forecast.replaceChildren(...predicted(memory.forecast));
      bar.replaceChildren(...memory.parts.map((part) => {
        const piece = make("i", part.kind);
        piece.style.width = `${100 * part.share}%`;
        piece.title = `${part.label}: ${part.text}`;
        return piece;
      }));
      bar.setAttribute("aria-label", memory.parts.map((part) => `${part.label} ${part.text}`).join(", "));
      legend.replaceChildren(...memory.parts.map((part) => {
        const row = make("li");
        row.append(make("i", part.kind), make("span", "", part.label), make("b", "", part.text));
        return row;
      }));
      say(reason, memory.reason);
    });
  }

  // The predicted speed, its range, and how it would change with the budget.
  function predicted(forecast) {
    const number = make("p", "speed");
    number.title = forecast.definition;
    const value = make("b", "", forecast.speed);
    value.dataset.t = "predicted";
    number.append(make("span", "", "Predicted"), value, make("span", "", `tokens/s (${forecast.range})`));
    const svg = document.createElementNS("http://www.w3.org/2000/svg", "svg");
    svg.setAttribute("viewBox", "0 0 100 30");
    svg.setAttribute("preserveAspectRatio", "none");
    svg.setAttribute("role", "img");
    svg.setAttribute("aria-label", forecast.label);
    const line = document.createElementNS(svg.namespaceURI, "polyline");
    line.setAttribute("points", forecast.points.map(([x, y]) => `${100 * x},${28 - 26 * y}`).join(" "));
    const now = document.createElementNS(svg.namespaceURI, "line");
    for (const [name, at] of [["x1", 100 * forecast.at], ["x2", 100 * forecast.at], ["y1", 0], ["y2", 30]]) now.setAttribute(name, at);
    svg.append(line, now);
    return [number, svg];
  }

  // Gradio's sliders tell Python about a release of the mouse only; here the keys of a keyboard count as well.
  document.addEventListener("keyup", (event) => {
    if (event.target.matches?.("#slider input[type=range]") && event.key !== "Tab") {
      event.target.dispatchEvent(new PointerEvent("pointerup", { bubbles: true }));
    }
  });

  return { header, card, memory, listen, say, make, follow };
})();
