// What one thread wrote and was given, token by token, and what its children returned.
"use strict";

const UNLIKELY = [Math.log(0.8), Math.log(0.5), Math.log(0.2)]; // Below these a token is underlined once, twice, thrice as thick.

class ThreadText {
  // pick(thread_index), seek(time) and tip(text, x, y) as in Lanes.
  constructor({ pick, seek, tip }) {
    Object.assign(this, { pick, seek, tip, touched: 0, cursor: -1 });
    this.path = element("nav", { class: "path", "aria-label": "thread" });
    this.text = element("div", { class: "thread", tabIndex: 0, role: "group" });
    this.children = element("div", { class: "children" });
    this.text.addEventListener("click", (event) => this.click(event));
    this.text.addEventListener("keydown", (event) => this.key(event));
    this.text.addEventListener("pointerover", (event) => {
      const place = event.target.dataset.place;
      if (place === undefined) this.tip(""); else this.tip(this.say(Number(place)), event.clientX, event.clientY);
    });
    for (const gone of ["pointerleave", "blur"]) this.text.addEventListener(gone, () => this.tip(""));
  }

  show(tree, thread_index, time) {
    const thread = tree.threads.get(thread_index);
    Object.assign(this, { tree, thread, cursor: -1, there: thread.ids.length });
    this.tokens = thread.ids.map((id, place) => this.token(id, place));
    this.text.replaceChildren(...this.tokens);
    this.text.setAttribute("aria-label", `text of ${thread_index ? `thread ${thread_index}` : "the root"}; left and right go token by token`);
    this.text.scrollTop = 0;
    this.showPath();
    this.showChildren();
    this.setTime(time);
  }

  token(id, place) {
    const kind = this.thread.kind[place], piece = this.tree.pieces[id] ?? "�";
    let style = `t ${kind}`, text = piece;
    if (id < CONTROLS) style += " control";
    if (id === MSG || (id < CONTROLS && /joined|join|spawn/.test(piece) && !piece.startsWith("</"))) style += place ? " line" : "";
    if (piece === "\n") text = "↵\n";
    if (this.thread.child.has(place)) style += " child";
    if (kind !== "given" && kind !== "joined") {
      const level = UNLIKELY.filter((limit) => this.thread.logprobs[place] < limit).length;
      if (level) style += ` u${level}`;
    }
    const made = element("span", { class: style, data: { place } }, text);
    return made;
  }

  // Tokens that are still to come and children that have not ended are faint; only those that change are touched.
  setTime(time) {
    const there = written(this.thread, time), ended = upTo(this.ends, time);
    this.touched = this.fade(this.tokens, this.there, there) + this.fade(this.rows, this.ended, ended);
    Object.assign(this, { there, ended });
    if (there && there < this.tokens.length) this.reveal(this.tokens[there - 1]);
  }

  // So many of the elements, in the order of their time, were there, and so many are now; returns how many that changes.
  fade(elements, before, now) {
    const [from, to] = [Math.min(before, now), Math.max(before, now)];
    for (let place = from; place < to; place++) elements[place].classList.toggle("later", place >= now);
    return to - from;
  }

  // Scrolls the text, never the page.
  reveal(token) {
    const top = token.offsetTop, view = this.text.clientHeight;
    if (top < this.text.scrollTop + 4 || top > this.text.scrollTop + view - 34) this.text.scrollTop = top - view / 2;
  }

  say(place) {
    const { thread, tree } = this, id = thread.ids[place], kind = thread.kind[place], nats = thread.logprobs[place];
    const piece = id < CONTROLS ? tree.pieces[id] : JSON.stringify(tree.pieces[id]);
    const given = kind === "given" || kind === "joined";
    const odds = given ? "given" : `sampled with p ${percent(Math.exp(nats))}, log-prob ${nats.toFixed(3)}`;
    const block = { spawn: ", spawn block", joined: ", joined back", join: ", answer" }[kind] ?? "";
    const child = thread.child.has(place) ? `\n${kind === "spawn" ? "starts" : "from"} thread ${thread.child.get(place)}: click to go there` : "";
    return `${piece} (id ${id}), ${odds}${block}\ntoken ${place + 1} of ${thread.ids.length}, position ${thread.position[place]}, step ${thread.at[place]}${child}`;
  }

  click(event) {
    const place = event.target.dataset.place;
    if (place === undefined) return;
    const child = this.thread.child.get(Number(place));
    if (child !== undefined) this.pick(child);
    else { this.point(Number(place)); this.seek(this.thread.at[place]); }
  }

  key(event) {
    const last = this.tokens.length - 1;
    const goal = { ArrowRight: this.cursor + 1, ArrowLeft: this.cursor - 1, Home: 0, End: last }[event.key];
    if (event.key === "Enter" && this.thread.child.has(this.cursor)) this.pick(this.thread.child.get(this.cursor));
    else if (goal === undefined || event.ctrlKey || event.altKey || event.metaKey) return;
    else {
      const place = Math.max(0, Math.min(last, goal));
      this.seek(this.thread.at[place]);
      this.point(place);
      const { left, bottom } = this.tokens[place].getBoundingClientRect();
      this.tip(this.say(place), left, bottom);
    }
    event.preventDefault();
    event.stopPropagation();
  }

  point(place) {
    this.tokens[this.cursor]?.classList.remove("cursor");
    this.cursor = place;
    this.tokens[place].classList.add("cursor");
    this.reveal(this.tokens[place]);
  }

  // root › 3 › 7, each a button, and what the thread came to.
  showPath() {
    const way = [];
    for (let thread = this.thread; thread; thread = this.tree.threads.get(thread.parent)) way.unshift(thread);
    const parts = way.flatMap((thread, place) => [
      ...(place ? ["›"] : []),
      element("button", { type: "button", "aria-current": String(thread === this.thread), onclick: () => this.pick(thread.thread_index) }, thread.name),
    ]);
    this.path.replaceChildren(...parts, element("span", { class: "soft grow" }, describe(this.thread)));
  }

  // Adds `rows` of the table and their `ends`, the child that ends first before the others.
  showChildren() {
    const all = this.thread.rounds.flatMap((round, place) => round.children.map((child) => [child, place]));
    Object.assign(this, { rows: [], ends: [], ended: 0 });
    this.children.hidden = !all.length;
    if (!all.length) { this.children.replaceChildren(); return; }
    const rows = all.map(([child, place]) => [child, element("tr", { class: "later" },
      element("td", {}, element("button", { type: "button", onclick: () => this.pick(child.thread_index), "aria-label": `to thread ${child.thread_index}` }, child.name)),
      ...(this.thread.rounds.length > 1 ? [element("td", {}, String(place + 1))] : []),
      element("td", { class: "words" }, child.message),
      element("td", { class: "words" }, child.answer ? element("span", { class: "t join" }, child.answer) : element("span", { class: "soft" }, ending(child))),
      element("td", {}, `${child.start} to ${child.end}`))]);
    const head = ["child", ...(this.thread.rounds.length > 1 ? ["spawn"] : []), "message", "returned", "steps"];
    this.children.replaceChildren(element("table", {},
      element("thead", {}, element("tr", {}, ...head.map((name) => element("th", { class: ["message", "returned"].includes(name) ? "words" : "" }, name)))),
      element("tbody", {}, ...rows.map(([, row]) => row))));
    rows.sort(([one], [other]) => one.end - other.end);
    this.rows = rows.map(([, row]) => row);
    this.ends = rows.map(([child]) => child.end);
  }
}

function percent(share) {
  const value = 100 * share;
  return value > 99.95 ? "100%" : value >= 10 ? `${value.toFixed(1)}%` : `${value.toPrecision(2)}%`;
}
