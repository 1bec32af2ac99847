// What is looked at on demand: the comparison, pictures to zoom into, and files to share. Python (app/helping.py,
// app/explore.py, app/share.py) makes every number and every word; Plotly draws, and is loaded with the first picture.
"use strict";

MoEpic.explore = (() => {
  const POLL_MS = 400;
  const PICTURES = ["timeline", "budgets", "sizes"];
  const { make, say } = MoEpic;

  let dialog = null;
  let plotly = null; // a promise of Plotly's script
  const drawn = {}; // view → the figure that is drawn
  const timers = {}; // view → of its next question

  function explore(element) {
    dialog = element.querySelector("dialog");
    const tabs = [...dialog.querySelectorAll("[role=tab]")];
    for (const tab of tabs) tab.onclick = () => open(nameOf(tab));
    dialog.querySelector("[role=tablist]").onkeydown = (event) => {
      const step = { ArrowRight: 1, ArrowLeft: -1 }[event.key];
      if (!step) return;
      const next = tabs[(tabs.indexOf(document.activeElement) + step + tabs.length) % tabs.length];
      next.focus();
      open(nameOf(next));
    };
    dialog.querySelector(".close").onclick = () => dialog.close();
    dialog.onclick = (event) => event.target === dialog && dialog.close(); // beside it
    document.addEventListener("click", (event) => {
      const button = event.target.closest?.("[data-explore]");
      if (button) open(button.dataset.explore);
    });
    new MutationObserver(repaint).observe(document.body, { attributeFilter: ["class"] }); // light or dark
    wireHelping();
    for (const name of PICTURES) {
      view(name).querySelector(".start").onclick = () => start(name, `ui/explore/${name}`);
      view(name).querySelector(".stop").onclick = () => post(`ui/explore/${name}/stop`);
    }
    wireShare();
  }

  const nameOf = (tab) => tab.id.slice("tab-".length);
  const view = (name) => dialog.querySelector(`#view-${name}`);

  function open(name) {
    for (const tab of dialog.querySelectorAll("[role=tab]")) {
      const isOpen = nameOf(tab) === name;
      tab.setAttribute("aria-selected", String(isOpen));
      tab.tabIndex = isOpen ? 0 : -1;
      view(nameOf(tab)).hidden = !isOpen;
    }
    if (!dialog.open) dialog.showModal();
    dialog.querySelector(`#tab-${name}`).scrollIntoView({ block: "nearest", inline: "nearest" });
    if (name === "helping") ask("helping", "ui/helping");
    else if (PICTURES.includes(name)) show(name);
  }

  // A picture that is there is shown, another one is begun.
  async function show(name) {
    const found = await ask(name, `ui/explore/${name}`);
    if (!found.figure && !found.running && found.error !== "stopped") start(name, `ui/explore/${name}`);
  }

  // ---- asking the server ----

  async function post(url, body) {
    const options = { method: "POST", body: body && JSON.stringify(body), headers: {} };
    if (body) options.headers["Content-Type"] = "application/json";
    return told(fetch(new URL(url, document.baseURI), options));
  }

  async function told(answer) {
    try {
      const found = await answer;
      return found.ok ? await found.json() : { error: "the server cannot do this" };
    } catch {
      return { error: "the server is not reachable" };
    }
  }

  // Shows what the server says about a piece of work, and asks again for as long as it goes on.
  async function ask(name, url) {
    clearTimeout(timers[name]);
    const found = await told(fetch(new URL(url, document.baseURI), { cache: "no-store" }));
    work(name, found);
    if (name === "helping") table(found.table);
    else if (found.figure) draw(name, found.figure);
    if (found.running && dialog.open) timers[name] = setTimeout(() => ask(name, url), POLL_MS);
    return found;
  }

  async function start(name, url, body) {
    const begun = await post(url, body);
    if (begun.error) return work(name, begun);
    return ask(name, url);
  }

  function work(name, { running = false, share = 0, text = "", error }) {
    const place = view(name).querySelector(".work");
    place.querySelector(".start").hidden = running;
    place.querySelector(".stop").hidden = !running;
    const bar = place.querySelector("progress");
    bar.hidden = !running;
    bar.value = share;
    const words = place.querySelector("[role=status]");
    words.classList.toggle("wrong", !running && Boolean(error) && error !== "stopped");
    say(words, running ? text || "starting" : (error ?? ""));
  }

  // ---- is it helping? ----

  function wireHelping() {
    const place = view("helping");
    place.querySelector(".start").onclick = () => {
      const text = document.querySelector("#message textarea")?.value ?? "";
      start("helping", "ui/helping", { text, opened: sessionStorage.getItem("moepic-opened") ?? "" });
    };
    place.querySelector(".stop").onclick = () => post("ui/helping/stop");
    place.querySelector(".use").onclick = async () => {
      const said = await post("ui/helping/use");
      await ask("helping", "ui/helping");
      say(place.querySelector(".work [role=status]"), said.error ?? said.done);
      document.querySelector("#refresh")?.click(); // the panels show the settings that hold now
    };
  }

  function table(found) {
    const place = view("helping");
    const verdict = place.querySelector(".verdict");
    verdict.hidden = place.querySelector("table").hidden = !found;
    say(place.querySelector(".foot"), found ? `Asked: “${found.question}”. ${found.tokens}.` : "");
    if (!found) return;
    verdict.dataset.kind = found.kind;
    say(verdict.querySelector("span"), found.verdict);
    verdict.querySelector(".use").hidden = !found.better;
    place.querySelector(".start").textContent = "Measure again";
    place.querySelector("tbody").replaceChildren(...found.rows.map((row, number) => {
      const line = make("tr", number === found.rows.length - 1 ? "yours" : "");
      const name = make("th", "", row.name);
      name.scope = "row";
      const speed = make("td", "speed");
      speed.dataset.tip = `passes: ${row.range} tokens/s`;
      const bar = make("i");
      bar.style.width = `${100 * row.share}%`;
      speed.append(make("b", "", row.speed), bar);
      line.append(name, speed, ...["ratio", "hits", "partial", "bytes", "stall"].map((key) => make("td", "", row[key])));
      return line;
    }));
  }

  // ---- pictures ----

  function script() {
    plotly ??= new Promise((resolve, reject) => {
      const element = document.createElement("script");
      element.src = new URL("ui/plotly.js", document.baseURI);
      element.onload = resolve;
      element.onerror = () => {
        plotly = null;
        reject(new Error("plotly is missing"));
      };
      document.head.append(element);
    });
    return plotly;
  }

  async function draw(name, figure) {
    const place = view(name).querySelector(".picture");
    view(name).querySelector(".start").textContent = "Draw anew";
    say(view(name).querySelector(".foot"), figure.note);
    place.setAttribute("aria-label", figure.note);
    try {
      await script();
    } catch {
      return work(name, { error: "Plotly is not installed with MoEpic; start it with launch.py, which installs it" });
    }
    drawn[name] = figure;
    if (view(name).hidden || !dialog.open) return;
    const axis = { gridcolor: "--line", zerolinecolor: "--line", ticklen: 4, tickcolor: "--line" };
    const isNarrow = place.clientWidth < 600;
    const layout = {
      margin: { l: 56, r: 10, t: 8, b: 46 },
      paper_bgcolor: "#0000",
      plot_bgcolor: "#0000",
      font: { color: "--ink", family: getComputedStyle(document.body).fontFamily, size: 12 },
      hoverlabel: { font: { size: 12 } },
      hovermode: "closest",
      legend: isNarrow ? { orientation: "h", y: -0.22 } : {},
      ...figure.layout,
      xaxis: { ...axis, ...figure.layout.xaxis },
      yaxis: { ...axis, ...figure.layout.yaxis },
    };
    const config = { responsive: true, displaylogo: false, scrollZoom: true, modeBarButtonsToRemove: ["select2d", "lasso2d"] };
    await Plotly.react(place, painted(figure.data), painted(layout), config);
  }

  // Names of CSS variables as the colours that they stand for now.
  function painted(value) {
    if (Array.isArray(value)) return value.map(painted);
    if (value && typeof value === "object") {
      return Object.fromEntries(Object.entries(value).map(([key, part]) => [key, painted(part)]));
    }
    if (typeof value !== "string" || !value.startsWith("--")) return value;
    return getComputedStyle(document.body).getPropertyValue(value).trim();
  }

  function repaint() {
    for (const [name, figure] of Object.entries(drawn)) if (!view(name).hidden) draw(name, figure);
  }

  // ---- share ----

  function wireShare() {
    const place = view("share");
    const file = place.querySelector("input[type=file]");
    for (const button of place.querySelectorAll("[data-file]")) button.onclick = () => download(button.dataset.file);
    place.querySelector(".import").onclick = () => file.click();
    file.onchange = async () => {
      const [chosen] = file.files;
      file.value = "";
      if (!chosen) return;
      const said = await told(fetch(new URL("ui/share/settings", document.baseURI), { method: "POST", body: chosen }));
      report(said.error ?? said.done, said.error);
      if (!said.error) document.querySelector("#refresh")?.click();
    };
  }

  function report(words, isWrong) {
    const status = view("share").querySelector(".status");
    status.classList.toggle("wrong", Boolean(isWrong));
    say(status, words);
  }

  async function download(name) {
    report("preparing …");
    if (name === "report.html" && !(await isReportMade())) return;
    try {
      const answer = await fetch(new URL(`ui/share/${name}`, document.baseURI), { cache: "no-store" });
      const blob = await answer.blob();
      const isFile = answer.headers.get("Content-Disposition") !== null;
      if (!isFile) return report(JSON.parse(await blob.text()).error, true);
      const link = make("a");
      link.href = URL.createObjectURL(blob);
      link.download = `moepic-${name}`;
      link.click();
      setTimeout(() => URL.revokeObjectURL(link.href), 10_000);
      report(`moepic-${name} was handed to the browser`);
    } catch {
      report("the server is not reachable", true);
    }
  }

  async function isReportMade() {
    const begun = await post("ui/explore/report");
    if (begun.error) return report(begun.error, true) ?? false;
    for (;;) {
      const { running, text, error } = await told(fetch(new URL("ui/explore/report", document.baseURI)));
      if (error) return report(error, true) ?? false;
      if (!running) return true;
      report(`preparing the report: ${text} …`);
      await new Promise((resolve) => setTimeout(resolve, POLL_MS));
    }
  }

  return explore;
})();
