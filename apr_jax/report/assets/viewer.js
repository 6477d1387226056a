// The thread-tree viewer: one problem, one or two evaluations of it side by side, one time for both.
"use strict";

class Pane {
  constructor(side, viewer) {
    const pick = (thread_index) => { this.pick(thread_index); };
    const hooks = { pick, seek: (time) => viewer.seek(time), tip: showTip };
    Object.assign(this, { side, viewer, lanes: new Lanes(hooks), text: new ThreadText(hooks), thread_index: 0, tree: null });
    this.choice = element("select", { "aria-label": `evaluation on the ${side}` });
    this.verdict = element("span", { class: "verdict" });
    this.facts = element("p", { class: "facts soft" });
    this.rest = [this.facts, this.lanes.host, this.text.path, this.text.text, this.text.children];
    this.host = element("section", { class: "card pane", "aria-label": side }, element("header", {}, this.choice, this.verdict), ...this.rest);
    this.choice.addEventListener("change", () => viewer.choose(side, this.choice.value));
  }

  show(trace, pieces, time) {
    this.tree = trace ? makeTree(trace, pieces) : null;
    for (const part of this.rest) part.hidden = !trace;
    this.verdict.className = `verdict ${trace ? (trace.correct ? "right" : "wrong") : "soft"}`;
    if (!trace) { this.verdict.textContent = "no tree of this problem here"; return; }
    const said = trace.stated || "no answer", why = trace.failure || trace.reason;
    this.verdict.textContent = `${trace.correct ? "✓" : "✗"} ${said}${trace.correct || !why ? "" : ` (${trace.failure && trace.reason ? `${trace.failure}: ${trace.reason}` : why})`}`;
    this.facts.textContent = `${trace.total_tokens} tokens, ${trace.sequential_tokens} in sequence, ${trace.children} children, longest thread ${trace.max_thread_tokens}`;
    this.thread_index = 0;
    this.lanes.show(this.tree, 0, time, this.viewer.steps);
    this.text.show(this.tree, 0, time);
  }

  pick(thread_index) {
    this.thread_index = thread_index;
    this.lanes.select(thread_index);
    this.text.show(this.tree, thread_index, this.viewer.time);
  }

  setTime(time) {
    if (!this.tree) return;
    this.lanes.setTime(time);
    this.text.setTime(time);
  }

  repaint() {
    this.lanes.paint = undefined;
    this.lanes.request();
  }
}

class Viewer {
  constructor(data) {
    this.evaluations = new Map(data.evaluations.map(({ name, pieces, traces }) => [name, { pieces, traces: new Map(traces.map((trace) => [trace.id, trace])) }]));
    this.names = [...this.evaluations.keys()];
    this.panes = ["left", "right"].slice(0, this.names.length).map((side) => new Pane(side, this));
    this.chosen = {};
    this.chooser = new Chooser({ trees: (problem) => this.panes.map(({ side }) => this.trace(side, problem)), open: (problem) => this.open(problem) });
    [this.slider, this.count, this.speed] = ["step", "clock", "speed"].map((id) => document.getElementById(id));
    this.clock = new Clock({ button: document.getElementById("play"), speed: () => Number(this.speed.value), show: (time) => this.setTime(time) });
    document.getElementById("panes").append(...this.panes.map((pane) => pane.host));
    const presses = { first: () => this.seek(0), back: () => this.seek(this.time - 1), forth: () => this.seek(this.time + 1), last: () => this.seek(this.steps) };
    for (const [id, press] of Object.entries(presses)) document.getElementById(id).addEventListener("click", press);
    this.slider.addEventListener("input", () => this.seek(Number(this.slider.value)));
    document.addEventListener("keydown", (event) => this.key(event));
    addEventListener("hashchange", () => { this.follow(); document.getElementById("viewer").scrollIntoView(); });
    for (const pane of this.panes) pane.choice.append(...this.names.map((name) => element("option", { value: name }, name)));
    const single = Math.max(...[...this.evaluations.values()].map(({ traces }) => traces.size)) < 2;
    document.getElementById("chooser").hidden = single;
    document.querySelector(".viewer").classList.toggle("single", single);
    this.follow();
  }

  get time() { return this.clock.time; }
  get steps() { return this.clock.steps; }
  get playing() { return this.clock.playing; }

  trace(side, problem) { return this.evaluations.get(this.chosen[side])?.traces.get(problem); }

  // The address names evaluations, filter and problem, so that a link can: #left=apr-rl&show=wrong&problem=test-7
  follow() {
    const asked = new URLSearchParams(location.hash.slice(1));
    // A name also stands for those that begin with it: apr-rl for apr-rl-t1.
    const prefer = (...names) => names.filter(Boolean).map((name) => this.names.find((one) => one === name) ?? this.names.find((one) => one.startsWith(`${name}-`))).find(Boolean);
    this.chosen.left = prefer(asked.get("left"), this.chosen.left, "apr-rl", "apr-sft", this.names[0]);
    this.chosen.right = prefer(asked.get("right"), this.chosen.right, "sos+-rl", "sos+-sft", this.names.at(-1));
    if (this.chosen.right === this.chosen.left) this.chosen.right = this.names.find((name) => name !== this.chosen.left);
    if (asked.has("left")) this.chooser.search.value = "";
    this.refill(asked.get("show") ?? (asked.has("problem") ? "all" : undefined), asked.get("problem") ?? undefined);
  }

  choose(side, name) {
    this.chosen[side] = name;
    this.refill();
  }

  refill(show, problem) {
    const sides = this.panes.map(({ side }) => this.chosen[side]), titles = new Map();
    for (const name of sides) for (const [id, trace] of this.evaluations.get(name).traces) titles.set(id, trace.problem);
    for (const pane of this.panes) pane.choice.value = this.chosen[pane.side];
    if (problem !== undefined && titles.has(problem)) this.chooser.problem = problem;
    const before = this.opened;
    this.chooser.setProblems([...titles].map(([id, title]) => ({ id, title })), sides, show);
    if (this.opened === before && this.chooser.problem !== null) this.open(this.chooser.problem);
  }

  open(problem) {
    this.clock.play(false);
    const traces = this.panes.map(({ side }) => this.trace(side, problem));
    this.clock.steps = Math.max(1, ...traces.map((trace) => trace?.sequential_tokens ?? 0));
    this.slider.max = this.steps;
    this.panes.forEach((pane, place) => pane.show(traces[place], this.evaluations.get(this.chosen[pane.side]).pieces, this.steps));
    this.opened = {};
    this.seek(this.steps);
    const state = new URLSearchParams({ ...this.chosen, show: this.chooser.filter.value, problem });
    try { history.replaceState(null, "", `#${state}`); } catch { /* Some browsers forbid it to files: the page works without. */ }
  }

  seek(time) { this.clock.seek(time); }

  setTime(time) {
    this.slider.value = time;
    const busy = this.panes.map(({ tree }) => (tree && time < tree.steps ? tree.busy[time] : 0));
    this.count.textContent = `step ${time} of ${this.steps}`;
    this.slider.setAttribute("aria-valuetext", `step ${time} of ${this.steps}, threads at work: ${busy.join(" and ")}`);
    for (const pane of this.panes) pane.setTime(time);
  }

  key(event) {
    if (event.ctrlKey || event.altKey || event.metaKey) return;
    const { tagName, type } = event.target;
    if (tagName === "SELECT" || (tagName === "INPUT" && type !== "checkbox")) return;
    if (event.key === " " && ["BUTTON", "SUMMARY", "INPUT", "A"].includes(tagName)) return;
    const by = event.shiftKey ? 10 : 1;
    const act = {
      ArrowRight: () => this.seek(this.time + by), ArrowLeft: () => this.seek(this.time - by), Home: () => this.seek(0), End: () => this.seek(this.steps),
      " ": () => this.clock.play(), n: () => this.chooser.move(1), p: () => this.chooser.move(-1), "/": () => this.chooser.search.focus(),
    }[event.key];
    if (!act) return;
    act();
    event.preventDefault();
  }
}

function showTip(text, x, y) {
  const tip = document.getElementById("tip");
  tip.hidden = !text;
  if (!text) return;
  tip.textContent = text;
  const { width, height } = tip.getBoundingClientRect();
  tip.style.left = `${Math.max(6, Math.min(x + 12, innerWidth - width - 6))}px`;
  tip.style.top = `${y + 18 + height > innerHeight ? y - height - 12 : y + 18}px`;
}

// The switch and the system's own choice; what was switched to is kept where the browser lets a file keep anything.
function watchTheme(changed) {
  const button = document.getElementById("theme"), system = matchMedia("(prefers-color-scheme: dark)"), style = document.documentElement.style;
  const dark = () => (style.colorScheme ? style.colorScheme === "dark" : system.matches);
  const say = () => { button.setAttribute("aria-pressed", String(dark())); document.documentElement.classList.toggle("dark", dark()); changed(); };
  try { style.colorScheme = localStorage.getItem("apr-theme") ?? ""; } catch { /* Then it is the system's. */ }
  button.addEventListener("click", () => {
    style.colorScheme = dark() ? "light" : "dark";
    try { localStorage.setItem("apr-theme", style.colorScheme); } catch { /* It lasts as long as the page. */ }
    say();
  });
  system.addEventListener("change", say);
  say();
}

const data = JSON.parse(document.getElementById("data").textContent);
const viewer = new Viewer(data), place = document.getElementById("opening");
const opening = place && data.opening.trees ? new Opening(place, data.opening, viewer.evaluations) : null;
watchTheme(() => [...viewer.panes, opening].forEach((drawn) => drawn?.repaint()));
const surprise = document.getElementById("surprise");
const underline = () => document.getElementById("panes").classList.toggle("surprise", surprise.checked);
surprise.addEventListener("change", underline);
underline();
