// Threads as lanes over time, on a canvas that is as large as what one sees of it. A frame looks at the lanes in view and at the
// ancestors of the first of them, no others: it costs the same for five threads and for five thousand.
"use strict";

const ROW = 20, BAR = 12, HEAD = 50, PROFILE = 28, GUTTER = 62, MARGIN = 14, MOST_ZOOM = 64;
const PAINT = ["card", "sunk", "ink", "soft", "line", "accent", "good", "bad", "spawn", "joined", "join", "bar-search", "bar-spawn", "bar-join"];

class Lanes {
  // pick(thread_index): a thread was chosen; seek(time): a time was chosen; tip(text, x, y): what is under the pointer ("" is nothing).
  constructor({ pick, seek, tip }) {
    Object.assign(this, { pick, seek, tip, zoom: 1, drawn: 0, left: 0, above: 0, frame: 0, hover: -1, seeking: false });
    this.canvas = element("canvas", { "aria-hidden": "true" });
    this.room = element("div", {}, this.canvas);
    this.host = element("div", { class: "lanes", tabIndex: 0, role: "group" }, this.room);
    this.host.addEventListener("scroll", () => this.request());
    this.host.addEventListener("keydown", (event) => this.key(event));
    this.host.addEventListener("wheel", (event) => this.wheel(event), { passive: false });
    this.canvas.addEventListener("pointerdown", (event) => this.press(event));
    this.canvas.addEventListener("pointermove", (event) => this.move(event));
    this.canvas.addEventListener("pointerup", () => { this.seeking = false; });
    this.canvas.addEventListener("pointerleave", () => { this.hover = -1; this.tip(""); this.request(); });
    new ResizeObserver(() => this.fit()).observe(this.host);
  }

  // steps: that the width stands for, the same in both panes.
  show(tree, thread_index, time, steps) {
    Object.assign(this, { tree, time, steps, zoom: 1 });
    const wanted = HEAD + tree.rows.length * ROW + 6;
    this.host.style.height = `${Math.min(wanted, 430) + 2}px`;
    this.host.setAttribute("aria-label", `${tree.rows.length} threads over ${tree.steps} steps; up and down choose a thread`);
    this.host.scrollTo(0, 0);
    this.select(thread_index);
    this.fit();
  }

  select(thread_index) {
    this.thread_index = thread_index;
    const top = this.tree.threads.get(thread_index).row * ROW, view = this.host.clientHeight - HEAD;
    if (top < this.host.scrollTop) this.host.scrollTop = top;
    else if (top + ROW > this.host.scrollTop + view) this.host.scrollTop = top + ROW - view;
    this.request();
  }

  setTime(time) {
    this.time = time;
    this.request();
  }

  // The canvas takes the size of its host, the room in which it slides that of the whole drawing.
  fit() {
    if (!this.tree) return;
    const width = this.host.clientWidth, height = this.host.clientHeight, dense = devicePixelRatio || 1;
    Object.assign(this, { width, height });
    this.canvas.width = Math.round(width * dense);
    this.canvas.height = Math.round(height * dense);
    Object.assign(this.canvas.style, { width: `${width}px`, height: `${height}px` });
    const span = (width - GUTTER - MARGIN) * this.zoom;
    this.scale = span / this.steps;
    Object.assign(this.room.style, { width: `${GUTTER + span + MARGIN}px`, height: `${Math.max(height, HEAD + this.tree.rows.length * ROW + 6)}px` });
    this.request();
  }

  zoomTo(zoom, x = this.width / 2) {
    const step = this.stepAt(x);
    this.zoom = Math.max(1, Math.min(MOST_ZOOM, zoom));
    this.fit();
    this.host.scrollLeft = GUTTER + step * this.scale - x;
  }

  // Within a frame; the browser is asked once for how far the drawing is scrolled.
  x(step) { return GUTTER + step * this.scale - this.left; }
  stepAt(x) { return Math.max(0, Math.min(this.steps, (x + this.host.scrollLeft - GUTTER) / this.scale)); }
  rowAt(y) { return y < HEAD ? -1 : Math.floor((y - HEAD + this.host.scrollTop) / ROW); }

  press(event) {
    if (event.offsetY < HEAD) {
      this.seeking = true;
      this.canvas.setPointerCapture(event.pointerId);
      this.seek(Math.round(this.stepAt(event.offsetX)));
      return;
    }
    const thread = this.tree.rows[this.rowAt(event.offsetY)];
    if (thread) this.pick(thread.thread_index);
  }

  move(event) {
    if (this.seeking) { this.seek(Math.round(this.stepAt(event.offsetX))); return; }
    const row = this.rowAt(event.offsetY), thread = this.tree.rows[row], step = Math.floor(this.stepAt(event.offsetX));
    if (row !== this.hover) { this.hover = row; this.request(); }
    if (thread) this.tip(`${thread.thread_index ? `thread ${thread.thread_index}, child of ${thread.parent ? `thread ${thread.parent}` : "root"}` : "root"}\n${describe(thread)}`, event.clientX, event.clientY);
    else if (event.offsetY < HEAD) this.tip(`step ${step}: ${this.tree.busy[step] ?? 0} threads at work`, event.clientX, event.clientY);
    else this.tip("");
  }

  wheel(event) {
    if (!event.ctrlKey) return;
    event.preventDefault();
    this.zoomTo(this.zoom * Math.exp(-event.deltaY / 200), event.offsetX);
  }

  key(event) {
    const row = this.tree.threads.get(this.thread_index).row, page = Math.max(1, Math.floor((this.height - HEAD) / ROW) - 1);
    const move = { ArrowDown: 1, ArrowUp: -1, PageDown: page, PageUp: -page }[event.key];
    if (move) this.pick(this.tree.rows[Math.max(0, Math.min(this.tree.rows.length - 1, row + move))].thread_index);
    else if (event.key === "+" || event.key === "=") this.zoomTo(this.zoom * 1.5);
    else if (event.key === "-") this.zoomTo(this.zoom / 1.5);
    else return;
    event.preventDefault();
    event.stopPropagation();
  }

  request() {
    if (!this.frame) this.frame = requestAnimationFrame(() => { this.frame = 0; this.draw(); });
  }

  draw() {
    if (!this.tree || !this.width) return;
    const pen = this.canvas.getContext("2d"), dense = devicePixelRatio || 1;
    this.paint ??= readPaint(this.host);
    Object.assign(this, { drawn: 0, left: this.host.scrollLeft, above: this.host.scrollTop });
    pen.setTransform(dense, 0, 0, dense, 0, 0);
    pen.clearRect(0, 0, this.width, this.height);
    const first = Math.floor(this.above / ROW);
    const last = Math.min(this.tree.rows.length, Math.ceil((this.above + this.height - HEAD) / ROW));
    pen.save();
    pen.beginPath();
    pen.rect(0, HEAD, this.width, this.height - HEAD);
    pen.clip();
    for (let row = first; row < last; row++) this.drawBand(pen, row);
    this.drawLinks(pen, first, last);
    for (let row = first; row < last; row++) this.drawLane(pen, this.tree.rows[row]);
    for (let row = first; row < last; row++) this.drawName(pen, this.tree.rows[row]);
    pen.restore();
    this.drawHead(pen);
    this.drawNow(pen);
  }

  top(row) { return HEAD + row * ROW - this.above; }

  box(pen, colour, x, y, width, height) {
    pen.fillStyle = colour;
    pen.fillRect(x, y, width, height);
    this.drawn += 1;
  }

  line(pen, colour, x1, y1, x2, y2, dash = []) {
    pen.strokeStyle = colour;
    pen.setLineDash(dash);
    pen.beginPath();
    pen.moveTo(x1, y1);
    pen.lineTo(x2, y2);
    pen.stroke();
    this.drawn += 1;
  }

  text(pen, colour, text, x, y, font, align = "left") {
    Object.assign(pen, { fillStyle: colour, font, textAlign: align, textBaseline: "middle" });
    pen.fillText(text, x, y);
    this.drawn += 1;
  }

  drawBand(pen, row) {
    const chosen = this.tree.rows[row].thread_index === this.thread_index;
    if (!chosen && row !== this.hover) return;
    pen.globalAlpha = chosen ? 0.18 : 0.08;
    this.box(pen, this.paint.accent, 0, this.top(row), this.width, ROW);
    pen.globalAlpha = 1;
  }

  // A spawn goes down from the parent to the last of its children, a join comes up again where the last of them has ended. Rows
  // are in depth-first order, so what links a lane above the view to one in it or below belongs to an ancestor of the first.
  drawLinks(pen, first, last) {
    const clip = (row) => this.top(Math.max(first - 1, Math.min(last, row))) + ROW / 2, linked = this.tree.rows.slice(first, last);
    for (let above = linked[0]; (above = this.tree.threads.get(above?.parent)); ) linked.push(above);
    for (const thread of linked) {
      for (const { children, from, to } of thread.rounds) {
        if (!children.length || children.at(-1).row < first) continue;
        const low = clip(children.at(-1).row), high = clip(thread.row);
        pen.globalAlpha = from <= this.time ? 1 : 0.25;
        this.line(pen, this.paint.spawn, this.x(from) + 0.5, high, this.x(from) + 0.5, low);
        pen.globalAlpha = to <= this.time ? 1 : 0.25;
        this.line(pen, this.paint.joined, this.x(to) + 0.5, high, this.x(to) + 0.5, low, [3, 2]);
      }
    }
    pen.globalAlpha = 1;
  }

  drawLane(pen, thread) {
    const y = this.top(thread.row) + (ROW - BAR) / 2, colours = { sampled: "bar-search", spawn: "bar-spawn", join: "bar-join" };
    let edge = -1, before = "";
    for (const { kind, from, to } of thread.segments) {
      const left = this.x(from), right = Math.max(left + 1, this.x(to));
      if (right < GUTTER || left > this.width || (right <= edge && kind === before)) continue;
      [edge, before] = [right, kind];
      // What is past stands out, what is still to come is faint.
      const now = Math.max(left, Math.min(right, this.x(this.time)));
      for (const [begin, end, alpha] of [[left, now, 1], [now, right, 0.22]]) {
        if (end <= begin) continue;
        pen.globalAlpha = alpha;
        if (kind === "wait") this.line(pen, this.paint.soft, begin, y + BAR / 2, end, y + BAR / 2, [1, 4]);
        else this.box(pen, this.paint[colours[kind]], begin, y, end - begin, BAR);
      }
    }
    pen.globalAlpha = thread.end <= this.time ? 1 : 0.25;
    this.drawEnd(pen, thread, y);
    pen.globalAlpha = 1;
  }

  // A dot for an answer, a ring for none, a cross for a thread that was cut off or broke the protocol; then what it joined.
  drawEnd(pen, thread, y) {
    const x = this.x(thread.end) + 6, middle = y + BAR / 2;
    if (x < GUTTER || x > this.width) return;
    pen.setLineDash([]);
    pen.lineWidth = 1.5;
    if (thread.status !== "DONE") {
      this.line(pen, this.paint.bad, x - 3, middle - 3, x + 3, middle + 3);
      this.line(pen, this.paint.bad, x - 3, middle + 3, x + 3, middle - 3);
    } else {
      pen.beginPath();
      pen.arc(x, middle, 3, 0, 2 * Math.PI);
      if (thread.answer) { pen.fillStyle = this.paint["bar-join"]; pen.fill(); } else { pen.strokeStyle = this.paint.soft; pen.stroke(); }
      this.drawn += 1;
    }
    pen.lineWidth = 1;
    const letters = Math.floor((this.width - x - 12) / 6.2);
    if (!thread.answer || letters < 8) return;
    const said = thread.answer.length > letters ? `${thread.answer.slice(0, letters - 1)}…` : thread.answer;
    this.text(pen, this.paint.join, said, x + 7, middle, "10px ui-monospace, monospace");
  }

  drawName(pen, thread) {
    const y = this.top(thread.row), chosen = thread.thread_index === this.thread_index;
    this.box(pen, this.paint.sunk, 0, y, GUTTER - 4, ROW);
    if (chosen) this.box(pen, this.paint.accent, 0, y, 3, ROW);
    const ink = chosen ? this.paint.ink : this.paint.soft;
    this.text(pen, ink, thread.name, 8 + Math.min(5, thread.depth) * 8, y + ROW / 2, `${chosen ? 600 : 400} 11px system-ui, sans-serif`);
  }

  // How many threads are at work, and the steps below.
  drawHead(pen) {
    this.box(pen, this.paint.sunk, 0, 0, this.width, HEAD);
    const { busy, most } = this.tree, { steps } = this, base = PROFILE + 4;
    const from = Math.floor(this.stepAt(GUTTER)), to = Math.min(steps, Math.ceil(this.stepAt(this.width)));
    pen.fillStyle = this.paint["bar-search"];
    for (const [begin, end, alpha] of [[from, Math.min(to, this.time), 0.75], [Math.max(from, this.time), to, 0.22]]) {
      if (end <= begin) continue;
      pen.globalAlpha = alpha;
      pen.beginPath();
      pen.moveTo(this.x(begin), base);
      // One column of pixels takes the largest of its steps.
      const stride = Math.max(1, Math.floor(1 / this.scale));
      for (let step = begin; step < end; step += stride) {
        let height = 0;
        for (let one = step; one < Math.min(end, step + stride); one++) height = Math.max(height, busy[one] ?? 0);
        const y = base - (height / most) * PROFILE;
        pen.lineTo(this.x(step), y);
        pen.lineTo(this.x(Math.min(end, step + stride)), y);
      }
      pen.lineTo(this.x(end), base);
      pen.fill();
      this.drawn += 1;
    }
    pen.globalAlpha = 1;
    this.line(pen, this.paint.line, 0, base + 0.5, this.width, base + 0.5);
    const every = niceStride(64 / this.scale);
    for (let step = Math.ceil(from / every) * every; step <= to; step += every) {
      this.line(pen, this.paint.soft, this.x(step) + 0.5, base, this.x(step) + 0.5, base + 4);
      this.text(pen, this.paint.soft, String(step), this.x(step), base + 11, "10px system-ui, sans-serif", "center");
    }
    this.box(pen, this.paint.sunk, 0, 0, GUTTER - 4, HEAD);
    this.text(pen, this.paint.soft, "at work", 8, 9, "10px system-ui, sans-serif");
    this.text(pen, this.paint.soft, `up to ${most}`, 8, 22, "10px system-ui, sans-serif");
    this.text(pen, this.paint.soft, "step", 8, base + 11, "10px system-ui, sans-serif");
  }

  drawNow(pen) {
    const x = this.x(this.time);
    if (x < GUTTER - 4 || x > this.width) return;
    pen.lineWidth = 1.5;
    this.line(pen, this.paint.bad, x, 2, x, this.height);
    pen.lineWidth = 1;
    this.box(pen, this.paint.bad, x - 4, 0, 8, 5);
  }
}

// Canvas knows no light-dark(): what the style sheet means now is read off an element.
function readPaint(host) {
  const probe = element("span");
  host.append(probe);
  const paint = {};
  for (const name of PAINT) {
    probe.style.color = `var(--${name})`;
    paint[name] = getComputedStyle(probe).color;
  }
  probe.remove();
  return paint;
}

// The smallest of 1, 2, 5, 10, 20, ... that is no less.
function niceStride(least) {
  const power = 10 ** Math.floor(Math.log10(Math.max(1, least)));
  return power * [1, 2, 5, 10].find((factor) => factor * power >= least);
}
