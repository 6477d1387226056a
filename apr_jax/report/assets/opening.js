// The one tree that plays at the top of a report: lanes, a slider, and what the chosen thread wrote.
"use strict";

class Opening {
  // host: where it stands; problem: the id of its problem; trees: name on a button -> evaluation.
  constructor(host, { problem, trees }, evaluations) {
    const hooks = { pick: (thread_index) => this.pick(thread_index), seek: (time) => this.seek(time), tip: showTip };
    Object.assign(this, { problem, evaluations, lanes: new Lanes(hooks), text: new ThreadText(hooks) });
    this.verdict = element("p", { class: "verdict" });
    this.slider = element("input", { type: "range", min: 0, "aria-label": "step of the tree" });
    this.slider.addEventListener("input", () => this.seek(Number(this.slider.value)));
    const button = element("button", { type: "button", class: "play", "aria-label": "play" });
    button.append(document.querySelector("#play svg").cloneNode(true));
    this.clock = new Clock({ button, speed: () => 1, show: (time) => this.setTime(time) });
    this.buttons = Object.entries(trees).map(([name, evaluation]) =>
      element("button", { type: "button", data: { evaluation }, onclick: () => { this.show(evaluation); this.clock.play(true); } }, name));
    host.append(element("div", { class: "controls" }, button, this.slider, ...this.buttons), this.verdict, this.lanes.host, this.text.path, this.text.text);
    this.show(Object.values(trees)[0]);
    // It plays once by itself, unless the reader's system asks for rest.
    if (!matchMedia("(prefers-reduced-motion: reduce)").matches) this.clock.play(true);
  }

  show(evaluation) {
    const { pieces, traces } = this.evaluations.get(evaluation), trace = traces.get(this.problem);
    this.tree = makeTree(trace, pieces);
    for (const button of this.buttons) button.setAttribute("aria-pressed", String(button.dataset.evaluation === evaluation));
    this.verdict.className = `verdict ${trace.correct ? "right" : "wrong"}`;
    this.verdict.textContent = `${trace.correct ? "✓" : "✗"} ${trace.stated || "no answer"}${trace.correct || !trace.reason ? "" : ` (${trace.reason})`}`;
    this.clock.play(false);
    this.clock.steps = Math.max(1, trace.sequential_tokens);
    this.slider.max = this.clock.steps;
    this.lanes.show(this.tree, 0, this.clock.steps, this.clock.steps);
    this.text.show(this.tree, 0, this.clock.steps);
    this.clock.seek(this.clock.steps);
  }

  pick(thread_index) {
    this.lanes.select(thread_index);
    this.text.show(this.tree, thread_index, this.clock.time);
  }

  seek(time) { this.clock.seek(time); }

  setTime(time) {
    this.slider.value = time;
    this.lanes.setTime(time);
    this.text.setTime(time);
  }

  repaint() {
    this.lanes.paint = undefined;
    this.lanes.request();
  }
}
