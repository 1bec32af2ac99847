// Runs before Gradio's own scripts. Gradio's first progress indicator goes on asking for frames when it is long gone
// (6.31), which keeps the browser drawing sixty times a second. All of ours are hidden, so once a second is enough for
// what they count.
"use strict";

(() => {
  const nextFrame = window.requestAnimationFrame.bind(window);
  window.requestAnimationFrame = (act) =>
    new Error().stack?.includes("/statustracker") ? setTimeout(act, 1000, performance.now()) : nextFrame(act);
})();
