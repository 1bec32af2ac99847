// What moves on the page by itself: asks the server, and shows status, live figures and notices. Words and numbers come
// from app/views.py as JSON; this file puts them into place, always as text and never as HTML.
"use strict";

window.MoEpic ??= (() => {
  const POLL_MS = { soon: 200, busy: 500, idle: 1500, loading: 250, hidden: 2000, longest: 8000 };
  const listeners = new Set(); // called with every answer of the server, or with null when there is none
  let latest = null; // the newest answer of the server
  let failures = 0;
  let timer = 0;
  let arePanelsSeen = false; // else the server is asked for the header alone

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
      const query = new URLSearchParams({ seen: latest?.version ?? "", panels: arePanelsSeen });
      const answer = await fetch(new URL(`ui/live?${query}`, document.baseURI), { cache: "no-store" });
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

  // Whether any of the panels that show the engine is on the screen.
  function seePanels(areSeen) {
    const isNew = areSeen && !arePanelsSeen;
    arePanelsSeen = areSeen;
    if (isNew) poll();
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
    fold(element.querySelector(".fold"));
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

  // The column of model and engine, and the room that it takes from the chat.
  function fold(button) {
    const draw = (isFolded) => {
      document.body.classList.toggle("is-folded", isFolded);
      button.setAttribute("aria-expanded", String(!isFolded));
    };
    draw(localStorage.getItem("moepic-engine") === "hidden");
    button.onclick = () => {
      const isFolded = !document.body.classList.contains("is-folded");
      localStorage.setItem("moepic-engine", isFolded ? "hidden" : "");
      draw(isFolded);
    };
  }

  return { header, listen, seePanels, say, make, follow };
})();
