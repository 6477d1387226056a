// Which problem: a search, a filter by what came of it, and the list.
"use strict";

class Chooser {
  // trees(problem): the trees of the problem in the panes, undefined where there is none; open(problem): one was chosen.
  constructor({ trees, open }) {
    Object.assign(this, { trees, open, listed: [], problem: null });
    [this.search, this.filter, this.found, this.list] = ["search", "show", "found", "problems"].map((id) => document.getElementById(id));
    this.search.addEventListener("input", () => this.fill());
    this.search.addEventListener("keydown", (event) => { if (event.key === "ArrowDown") { this.list.focus(); event.preventDefault(); } });
    this.filter.addEventListener("change", () => this.fill());
    this.list.addEventListener("click", (event) => this.choose(event.target.closest("li")?.dataset.problem));
    this.list.addEventListener("keydown", (event) => this.key(event));
    document.getElementById("chooser").addEventListener("submit", (event) => event.preventDefault());
  }

  // problems: [{id, title}]; names: of the evaluations in the panes.
  setProblems(problems, names, show = this.filter.value) {
    this.problems = problems;
    const count = (test) => problems.filter(({ id }) => test(...this.trees(id))).length;
    const kinds = [...new Set(problems.map(({ id }) => this.trees(id)[0]?.failure).filter(Boolean))].sort();
    this.tests = new Map([["all", () => true], ["right", (one) => one?.correct], ["wrong", (one) => one && !one.correct]]);
    for (const kind of kinds) this.tests.set(kind, (one) => one?.failure === kind);
    const labels = new Map([["all", "all"], ["right", `${names[0]} right`], ["wrong", `${names[0]} wrong`]]);
    if (names.length > 1) {
      this.tests.set("only left", (one, other) => one?.correct && other && !other.correct);
      this.tests.set("only right", (one, other) => one && !one.correct && other?.correct);
      labels.set("only left", `only ${names[0]} right`).set("only right", `only ${names[1]} right`);
    }
    this.filter.replaceChildren(...[...this.tests].map(([name, test]) =>
      element("option", { value: name }, `${labels.get(name) ?? `wrong: ${name}`} (${count(test)})`)));
    this.filter.value = this.tests.has(show) ? show : "all";
    this.fill();
  }

  fill() {
    const test = this.tests.get(this.filter.value), asked = this.search.value.trim().toLowerCase().split(/\s+/);
    const words = (text) => text.toLowerCase().split(/[^\p{L}\p{N}]+/u).filter(Boolean);
    this.listed = this.problems.filter(({ id, title }) => {
      const have = words(title);
      const found = (word) => id.toLowerCase() === word || words(word).every((one) => have.includes(one));
      return test(...this.trees(id)) && asked.every(found);
    });
    this.list.replaceChildren(...this.listed.map(({ id, title }, place) => element("li", { role: "option", id: `problem-${place}`, data: { problem: id } },
      element("span", { class: "name" }, title), ...this.trees(id).map(mark))));
    this.found.textContent = `${this.listed.length} of the ${this.problems.length} problems on this page`;
    if (this.listed.length && !this.listed.some(({ id }) => id === this.problem)) this.choose(this.listed[0].id);
    else this.point();
  }

  choose(problem) {
    if (problem === undefined) return;
    this.problem = problem;
    this.point();
    this.open(problem);
  }

  // Marks the chosen one and scrolls the list, never the page.
  point() {
    this.list.removeAttribute("aria-activedescendant");
    for (const item of this.list.children) {
      const chosen = item.dataset.problem === this.problem;
      item.setAttribute("aria-selected", String(chosen));
      if (!chosen) continue;
      this.list.setAttribute("aria-activedescendant", item.id);
      const top = item.offsetTop, view = this.list.clientHeight;
      if (top < this.list.scrollTop || top + item.offsetHeight > this.list.scrollTop + view) this.list.scrollTop = top - view / 2;
    }
  }

  move(by) {
    const place = this.listed.findIndex(({ id }) => id === this.problem);
    this.choose(this.listed[Math.max(0, Math.min(this.listed.length - 1, place + by))]?.id);
  }

  key(event) {
    const by = { ArrowDown: 1, ArrowUp: -1, PageDown: 10, PageUp: -10, Home: -1e9, End: 1e9 }[event.key];
    if (by === undefined) return;
    this.move(by);
    event.preventDefault();
    event.stopPropagation();
  }
}

function mark(trace) {
  if (!trace) return element("span", { class: "soft", title: "no tree" }, "·");
  return element("span", { class: trace.correct ? "right" : "wrong", title: trace.failure || (trace.correct ? "right" : "wrong") }, trace.correct ? "✓" : "✗");
}
