// The list of conversations, what stands under each message, and the keyboard. Conversations come from our own routes
// (app/conversation_routes.py) and are put into place as text, never as HTML; the window itself is Gradio's.
"use strict";

Object.assign(window.MoEpic, (() => {
  const { make, say, follow, listen } = window.MoEpic;
  const OPENED = "moepic-opened"; // in sessionStorage for this tab, in localStorage for the next one
  const DRAFT = "moepic-draft";
  const SIDE = "moepic-side";
  const UNDO_MS = 12_000;
  const CALM_MS = 1000;
  const WIDE_PX = 1000;
  const tabs = new BroadcastChannel("moepic-conversations");

  const find = (selector) => document.querySelector(selector);
  const stopButton = () => find("#message button.stop-button");
  const messageBox = () => find("#message textarea");

  // ---- what a new page shows ----

  function wanted() {
    return (sessionStorage.getItem(OPENED) ?? localStorage.getItem(OPENED)) || null;
  }

  function keepDraft() {
    sessionStorage.setItem(DRAFT, messageBox()?.value ?? "");
  }

  function bringDraft() {
    const draft = sessionStorage.getItem(DRAFT);
    if (!draft || messageBox().value) return;
    messageBox().value = draft;
    messageBox().dispatchEvent(new Event("input", { bubbles: true }));
  }

  // An answer that is being written ends first, so that it does not come after what is shown next.
  function whenIdle(act) {
    const stop = stopButton();
    if (!stop) return act();
    stop.click();
    const wait = setInterval(() => {
      if (stopButton()) return;
      clearInterval(wait);
      act();
    }, 50);
  }

  // ---- the panel at the side ----

  function conversations(element, props, watch, trigger) {
    const part = (selector) => element.querySelector(selector);
    const [list, search, file] = [part("ul"), part("input[type=search]"), part("input[type=file]")];
    const items = new Map(); // id → line of the list
    let opened = { id: null, changed: 0, rows: [] };
    let version = null;
    let server = null;
    let lastAct = -CALM_MS; // when the user last did something
    let asked = null; // the state of the open conversation that Python was last asked to show

    let question = 0; // to Python; its answer carries the same number
    let isWaiting = false; // for that answer: what is sent before it would go to the conversation that is left
    let sendLater = false;

    function open(id, more = {}) {
      isWaiting = true;
      whenIdle(() => show(id, more));
    }

    function show(id, more) {
      isWaiting = true;
      trigger("select", { id, question: ++question, ...more });
    }

    function arrived(answered) {
      if (answered !== question) return;
      isWaiting = false;
      if (sendLater) find("#message .submit-button")?.click();
      sendLater = false;
    }

    // While an answer comes one may write on, but the next message waits. One that goes is seen going.
    function holdBack(event) {
      if (!isWaiting && !stopButton()) return seeNewest();
      event.preventDefault();
      event.stopImmediatePropagation();
      sendLater = isWaiting;
    }

    async function load() {
      const query = new URLSearchParams({ search: search.value, opened: opened.id ?? "" });
      const found = await request(`ui/conversations?${query}`);
      if (!found) return;
      version = found.version;
      const none = part(".none");
      none.hidden = found.entries.length > 0;
      say(none, search.value ? "Nothing found" : "Conversations are kept here, on this machine");
      part(".unsaved").hidden = !found.problem;
      say(part(".unsaved"), found.problem ?? "");
      draw(found.entries);
      // Another tab has changed what is shown here, unless something that was just done here is still on its way.
      if (!opened.id || found.opened === opened.changed || found.opened === asked || stopButton() || isWaiting) return;
      if (performance.now() - lastAct < CALM_MS) setTimeout(load, CALM_MS);
      else {
        asked = found.opened;
        show(found.opened === null ? null : opened.id, { same: true });
      }
    }

    function draw(entries) {
      for (const entry of entries) {
        if (!items.has(entry.id)) items.set(entry.id, line(entry.id));
        items.get(entry.id).update(entry);
      }
      const wantedOrder = entries.map((entry) => items.get(entry.id).root);
      const isSame = wantedOrder.length === list.children.length && wantedOrder.every((row, i) => list.children[i] === row);
      if (!isSame) list.replaceChildren(...wantedOrder); // not otherwise: it would take the focus away
    }

    function line(id) {
      const root = make("li");
      const button = make("button", "open");
      button.type = "button";
      const [title, when, excerpt] = [make("span", "title"), make("time"), make("span", "excerpt")];
      button.append(title, when, excerpt);
      button.onclick = () => open(id);
      const menu = make("details", "menu");
      const summary = make("summary", "", "⋯");
      const rename = make("button", "", "Rename");
      const remove = make("button", "", "Delete");
      menu.append(summary, make("div"));
      menu.lastChild.append(
        rename,
        link("Export as Markdown", `ui/conversations/${id}/md`),
        link("Export as JSON", `ui/conversations/${id}/json`),
        remove,
      );
      menu.onclick = (event) => {
        if (event.target !== summary) menu.open = false;
      };
      rename.onclick = () => edit(root, title.textContent, (text) => change(id, "PATCH", { title: text }));
      remove.onclick = async () => {
        await change(id, "DELETE");
        tell(`“${title.textContent}” is deleted`, () => change(`${id}/restore`, "POST"));
        if (id === opened.id) open(null);
      };
      root.append(button, menu);

      function update(entry) {
        say(title, entry.title || "New chat");
        say(when, moment(entry.updated));
        say(excerpt, entry.excerpt);
        summary.setAttribute("aria-label", `Actions for ${entry.title}`);
        button.title = entry.title;
        if (id === opened.id) root.setAttribute("aria-current", "true");
        else root.removeAttribute("aria-current");
      }
      return { root, update };
    }

    async function change(path, method, body) {
      await request(`ui/conversations/${path}`, {
        method,
        headers: { "Content-Type": "application/json" },
        body: body && JSON.stringify(body),
      });
      changed();
    }

    // This tab or another one: the list is asked for anew everywhere.
    function changed() {
      tabs.postMessage("changed");
      load();
    }

    async function request(path, options) {
      try {
        const answer = await fetch(new URL(path, document.baseURI), { cache: "no-store", ...options });
        const found = answer.status === 204 ? {} : await answer.json();
        if (answer.ok && !found.error) return found;
        tell(found.error ?? "the server refused that");
      } catch {
        // The server is gone; the header says so until it is back.
      }
      return null;
    }

    let forget = 0;
    function tell(text, undo) {
      const root = part(".undo");
      const button = root.querySelector("button");
      say(root.querySelector("span"), text);
      button.hidden = !undo;
      button.onclick = () => {
        root.hidden = true;
        undo();
      };
      root.hidden = false;
      clearTimeout(forget);
      forget = setTimeout(() => (root.hidden = true), UNDO_MS);
    }

    async function importFile() {
      const [chosen] = file.files;
      file.value = "";
      if (!chosen) return;
      const query = new URLSearchParams({ name: chosen.name });
      const found = await request(`ui/conversations?${query}`, { method: "POST", body: chosen });
      if (!found) return;
      tell(found.ids.length === 1 ? "One conversation is imported" : `${found.ids.length} conversations are imported`);
      if (found.ids.length) open(found.ids[0]);
      changed();
    }

    part(".new").onclick = startNew;
    part(".import").onclick = () => file.click();
    part(".keys").onclick = () => part("dialog").showModal();
    file.onchange = importFile;
    let typing = 0;
    search.oninput = () => {
      clearTimeout(typing);
      typing = setTimeout(load, 120);
    };

    function startNew() {
      open(null);
      messageBox()?.focus();
    }

    follow(props, watch, (value) => {
      const before = opened.id;
      opened = { id: null, changed: 0, rows: [], ...value };
      if (!("rows" in value)) return; // the page has only just begun
      sessionStorage.setItem(OPENED, opened.id ?? "");
      localStorage.setItem(OPENED, opened.id ?? "");
      arrived(opened.question);
      if (before !== opened.id && window.innerWidth < WIDE_PX) side(false);
      underMessages(opened, trigger, open, part("nav").dataset.figures);
      changed();
    });
    tabs.onmessage = load;
    listen((live) => {
      if (live === null) return;
      if (server !== null && live.server !== server) {
        keepDraft(); // another server: it knows nothing of this page
        location.reload();
      }
      if (server === null) {
        show(wanted(), {});
        bringDraft();
      }
      server = live.server;
      if (live.conversations !== version) load();
    });
    window.addEventListener("pagehide", keepDraft);
    for (const kind of ["click", "keydown"]) {
      document.addEventListener(kind, () => (lastAct = performance.now()), true);
    }
    document.addEventListener("click", (event) => {
      if (event.target.closest?.("#message .submit-button")) holdBack(event);
    }, true);
    document.addEventListener("keydown", (event) => {
      const sends = event.key === "Enter" && !event.shiftKey && !event.isComposing;
      if (sends && event.target.matches?.("#message textarea")) holdBack(event);
    }, true);
    keyboard(part, startNew);
    whenThere(["#message", "#side .toggle-button", "#side .sidebar-content", ".top .aside"], () => {
      nameButtons();
      new MutationObserver(nameButtons).observe(find("#message"), { childList: true, subtree: true });
      setUpSide();
    });
  }

  // Gradio builds its components in an order of its own: acts as soon as all that `selectors` name is on the page.
  function whenThere(selectors, act) {
    if (selectors.every((selector) => find(selector))) act();
    else requestAnimationFrame(() => whenThere(selectors, act));
  }

  function link(text, address) {
    const element = make("a", "", text);
    element.href = address;
    element.download = "";
    return element;
  }

  // A field in the place of a line of the list. Enter or leaving it takes the words, Escape does not.
  function edit(root, text, take) {
    const field = make("input");
    field.value = text;
    field.setAttribute("aria-label", "Title of the conversation");
    const end = (isTaken) => {
      field.onblur = null;
      field.remove();
      root.classList.remove("editing");
      if (isTaken && field.value.trim() && field.value !== text) take(field.value);
      root.querySelector("button.open").focus();
    };
    field.onkeydown = (event) => {
      if (event.key !== "Enter" && event.key !== "Escape") return;
      event.stopPropagation();
      end(event.key === "Enter");
    };
    field.onblur = () => end(true);
    root.classList.add("editing");
    root.prepend(field);
    field.select();
  }

  function moment(seconds) {
    const [date, now] = [new Date(1000 * seconds), new Date()];
    if (date.toDateString() === now.toDateString()) return date.toLocaleTimeString("en-GB", { timeStyle: "short" });
    const isThisYear = date.getFullYear() === now.getFullYear();
    return date.toLocaleDateString("en-GB", { day: "numeric", month: "short", ...(!isThisYear && { year: "numeric" }) });
  }

  // Gradio's window follows what is added only where its end is on the screen.
  function seeNewest() {
    const window_ = find("#conversation .bubble-wrap");
    const grown = new MutationObserver(() => {
      window_.scrollTop = window_.scrollHeight;
      grown.disconnect();
    });
    if (window_) grown.observe(window_, { childList: true, subtree: true });
  }

  // ---- under each message: figures, versions, branch, continue ----

  let drawUnder = null;

  function underMessages(opened, trigger, open, definitions) {
    const isNew = drawUnder === null;
    drawUnder = () => {
      const window_ = find("#conversation");
      window_.querySelectorAll(".message-row").forEach((message, place) => {
        const buttons = message.nextElementSibling;
        if (!buttons?.matches(".message-buttons")) return;
        const row = opened.rows[place];
        const key = JSON.stringify([opened.id, row]);
        const old = buttons.querySelector(".under-message");
        if (old?.dataset.key === key) return;
        old?.remove();
        if (!row) return;
        const under = make("div", "under-message");
        under.dataset.key = key;
        under.append(...actions(row));
        buttons.append(under);
      });
    };
    whenThere(["#conversation"], () => {
      drawUnder();
      if (isNew) new MutationObserver(() => drawUnder()).observe(find("#conversation"), { childList: true, subtree: true });
    });

    function actions(row) {
      const button = (text, label, act, isOff = false) => {
        const element = make("button", "", text);
        element.type = "button";
        element.title = label;
        element.setAttribute("aria-label", label);
        element.disabled = isOff;
        element.onclick = act;
        return element;
      };
      const made = [];
      const [here, all] = [row.versions.indexOf(row.number), row.versions.length];
      if (all > 1) {
        const show = (step) => open(opened.id, { number: row.versions[here + step] });
        made.push(
          button("‹", "Previous version", () => show(-1), here === 0),
          make("span", "place", `${here + 1}/${all}`),
          button("›", "Next version", () => show(1), here === all - 1),
        );
      }
      const acts = [button("Branch", "Branch from here into a new conversation", () =>
        open(opened.id, { number: row.number, branch: true }))];
      if (row.continues) acts.push(button("Continue", "Continue this answer", () => stopButton() || trigger("submit")));
      for (const act of acts) act.classList.add("act");
      made.push(...acts);
      if (row.note) {
        const note = make("span", row.failed ? "note failed" : "note", row.note);
        if (row.role === "assistant") note.title = definitions;
        made.push(note);
      }
      return made;
    }
  }

  // ---- keyboard and the sidebar ----

  function keyboard(part, startNew) {
    const dialog = part("dialog");
    const actions = {
      KeyN: startNew,
      KeyM: () => messageBox()?.focus(),
      KeyL: () => side(!isSideOpen()),
      KeyE: () => find(".top .fold").click(),
      KeyK: () => {
        side(true);
        part("input[type=search]").focus();
      },
    };
    document.addEventListener("keydown", (event) => {
      const writes = event.target.matches?.("input, textarea, [contenteditable]");
      if (event.key === "Escape" && !dialog.open) stopButton()?.click();
      else if (event.key === "?" && !writes) dialog.showModal();
      else if (event.altKey && !event.ctrlKey && !event.metaKey && actions[event.code]) {
        event.preventDefault();
        actions[event.code]();
      }
    });
    document.addEventListener("click", (event) => {
      for (const menu of document.querySelectorAll(".talks .menu[open]")) {
        if (!menu.contains(event.target)) menu.open = false;
      }
    });
  }

  // Gradio makes these two anew whenever one takes the place of the other, with a picture and no name.
  function nameButtons() {
    find("#message .submit-button")?.setAttribute("aria-label", "Send");
    stopButton()?.setAttribute("aria-label", "Stop");
  }

  const isSideOpen = () => find("#side")?.classList.contains("open") ?? false;

  function side(isOpen) {
    if (isSideOpen() !== isOpen) find("#side .toggle-button").click();
  }

  // Remembers whether it was open, and keeps the keyboard out of it while it is not. The header's button opens it,
  // Gradio's own closes it: closed, that one would lie over the page.
  function setUpSide() {
    const [root, toggle, opener] = [find("#side"), find("#side .toggle-button"), find(".top .aside")];
    const update = () => {
      const isOpen = isSideOpen();
      const leaves = !isOpen && root.contains(document.activeElement);
      document.body.classList.toggle("is-side-open", isOpen);
      root.querySelector(".sidebar-content").inert = !isOpen;
      for (const button of [toggle, opener]) button.setAttribute("aria-expanded", isOpen);
      toggle.setAttribute("aria-label", opener.getAttribute("aria-label"));
      if (leaves) opener.focus();
      if (window.innerWidth >= WIDE_PX) localStorage.setItem(SIDE, isOpen ? "open" : "");
    };
    opener.onclick = () => side(true);
    const wasOpen = localStorage.getItem(SIDE) === "open";
    if (wasOpen && window.innerWidth >= WIDE_PX) side(true);
    new MutationObserver(update).observe(root, { attributes: true, attributeFilter: ["class"] });
    update();
  }

  return { conversations };
})());
