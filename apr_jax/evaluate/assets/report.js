// The thread-tree viewer. Data: {evaluations: {name: [trace, ...]}}; a trace is a line of traces.jsonl.
"use strict";
(() => {
  const data = JSON.parse(document.getElementById("traces").textContent);
  const names = Object.keys(data.evaluations);
  const byId = Object.fromEntries(names.map((n) => [n, new Map(data.evaluations[n].map((t) => [t.id, t]))]));
  const $ = (id) => document.getElementById(id);
  const SVG = "http://www.w3.org/2000/svg";
  const ROW = 16, BAR = 11, LEFT = 34;
  const state = { id: null, step: 0, last: 0, timer: null, chosen: {} };

  function node(tag, attributes, ...children) {
    const element = document.createElement(tag);
    for (const [key, value] of Object.entries(attributes)) element.setAttribute(key, value);
    element.append(...children);
    return element;
  }
  function shape(tag, attributes) {
    const element = document.createElementNS(SVG, tag);
    for (const [key, value] of Object.entries(attributes)) element.setAttribute(key, value);
    return element;
  }

  // Depth first: a child's lane stands below its parent's.
  function ordered(trace) {
    const children = new Map();
    for (const t of trace.threads) {
      if (!children.has(t.parent)) children.set(t.parent, []);
      children.get(t.parent).push(t);
    }
    const rows = [];
    const walk = (t) => { rows.push(t); (children.get(t.slot) || []).forEach(walk); };
    (children.get(-1) || []).forEach(walk);
    return rows;
  }

  // A parent waits while the children of a round run: its bar has a gap there.
  function stretches(thread, trace) {
    const rounds = new Map();
    for (const t of trace.threads) {
      if (t.parent !== thread.slot) continue;
      const r = rounds.get(t.round) || { from: t.start, to: t.start };
      r.to = Math.max(r.to, t.end);
      rounds.set(t.round, r);
    }
    const parts = [];
    let at = thread.start;
    for (const r of [...rounds.values()].sort((a, b) => a.from - b.from)) { parts.push([at, r.from]); at = r.to; }
    parts.push([at, thread.end]);
    return parts;
  }

  function drawLanes(pane, name, trace) {
    const rows = ordered(trace);
    const row = new Map(rows.map((t, i) => [t.slot, i]));
    const width = Math.max(360, pane.clientWidth - 4);
    const scale = (width - LEFT - 12) / Math.max(1, trace.sequential_tokens);
    const x = (clock) => LEFT + clock * scale;
    const svg = shape("svg", { width, height: rows.length * ROW + 22, role: "img", "aria-label": `${rows.length} threads over time` });
    for (const t of rows) {
      const y = row.get(t.slot) * ROW + 4;
      const label = shape("text", { x: 2, y: y + 9, class: "label" });
      label.textContent = t.slot === 0 ? "root" : String(t.slot);
      svg.append(label);
      if (t.parent >= 0) {
        const py = row.get(t.parent) * ROW + 4 + BAR / 2;
        svg.append(shape("path", { class: "link", d: `M${x(t.start)} ${py}V${y + BAR / 2}`, "data-at": t.start }));
        svg.append(shape("path", { class: "link", d: `M${x(t.end)} ${y + BAR / 2}V${py}`, "data-at": t.end, "stroke-dasharray": "2 2" }));
      }
      const join = t.spans.find((s) => s[0] === "join");
      const answered = join && join[1].length > "<join>".length;
      const kind = t.parent < 0 ? "root" : t.status.startsWith("OUT") || t.status === "MALFORMED" ? "cut" : answered ? "found" : "";
      for (const [from, to] of stretches(t, trace)) {
        const bar = shape("rect", { x: x(from), y, width: Math.max(2, (to - from) * scale), height: BAR, rx: 3,
          class: `lane ${kind}`, "data-slot": t.slot, "data-at": from, "data-to": to });
        const title = shape("title", {});
        title.textContent = `thread ${t.slot}: ${t.tokens} tokens, ${t.status}`;
        bar.append(title);
        svg.append(bar);
      }
    }
    svg.append(shape("line", { class: "now", y1: 0, y2: rows.length * ROW + 6, "data-left": LEFT, "data-scale": scale }));
    const axis = shape("text", { x: LEFT, y: rows.length * ROW + 18, class: "label" });
    axis.textContent = `sequential tokens 0 to ${trace.sequential_tokens}`;
    svg.append(axis);
    svg.addEventListener("click", (event) => {
      if (event.target.dataset.slot === undefined) return;
      state.chosen[name] = Number(event.target.dataset.slot);
      drawText(pane, name, trace);
    });
    return svg;
  }

  function drawText(pane, name, trace) {
    const slot = state.chosen[name] ?? 0;
    const thread = trace.threads.find((t) => t.slot === slot) || trace.threads[0];
    const select = pane.querySelector("select");
    select.value = String(thread.slot);
    const box = pane.querySelector(".thread");
    box.replaceChildren(...thread.spans.map(([kind, text]) => node("span", { class: kind, title: kind }, text)));
    for (const bar of pane.querySelectorAll(".lane")) bar.classList.toggle("chosen", Number(bar.dataset.slot) === thread.slot);
  }

  function drawPane(pane, name) {
    const trace = byId[name].get(state.id);
    pane.replaceChildren(node("h3", {}, name));
    if (!trace) { pane.append(node("p", { class: "soft" }, "not among the embedded trees")); return 0; }
    const said = trace.solution ? trace.solution.join(", ") : "no solution";
    const verdict = node("div", { class: `verdict ${trace.correct ? "good" : "bad"}` }, `${trace.correct ? "✓" : "✗"} ${said}`);
    const why = trace.correct || !trace.reason ? "" : ` (${trace.reason})`;
    const facts = `${trace.total_tokens} tokens, ${trace.sequential_tokens} in sequence, ${trace.children} children, longest thread ${trace.max_thread_tokens}`;
    const lanes = node("div", { class: "lanes", tabindex: "0", "aria-label": `threads of ${name}` });
    const select = node("select", { "aria-label": `thread of ${name}` });
    for (const t of ordered(trace)) {
      select.append(node("option", { value: t.slot }, `${t.slot === 0 ? "root" : "child " + t.slot}: ${t.tokens} tokens, ${t.status}`));
    }
    select.addEventListener("change", () => { state.chosen[name] = Number(select.value); drawText(pane, name, trace); });
    pane.append(verdict, node("div", { class: "soft" }, facts + why), lanes, select, node("div", { class: "thread" }));
    lanes.append(drawLanes(lanes, name, trace));
    drawText(pane, name, trace);
    return trace.sequential_tokens;
  }

  function drawStep() {
    $("step").value = state.step;
    $("clock").textContent = `step ${state.step} of ${state.last}`;
    for (const line of document.querySelectorAll(".now")) {
      const at = Number(line.dataset.left) + state.step * Number(line.dataset.scale);
      const width = Number(line.ownerSVGElement.getAttribute("width"));
      line.setAttribute("x1", Math.min(at, width - 4));
      line.setAttribute("x2", Math.min(at, width - 4));
    }
    for (const part of document.querySelectorAll("[data-at]")) part.classList.toggle("later", Number(part.dataset.at) > state.step);
  }

  function show() {
    const chosen = [$("left").value, $("right").value];
    state.last = Math.max(drawPane($("pane-left"), chosen[0]), names.length > 1 ? drawPane($("pane-right"), chosen[1]) : 0);
    $("step").max = state.last;
    state.step = state.last;
    drawStep();
  }

  function fillProblems() {
    const wanted = $("filter").value;
    const first = $("left").value;
    const shown = data.evaluations[first].filter((t) => wanted === "all" || t.correct === (wanted === "right"));
    $("problem").replaceChildren(...shown.map((t) =>
      node("option", { value: t.id }, `${t.correct ? "✓" : "✗"} ${t.numbers.join(" ")} → ${t.target}`)));
    state.id = shown.length ? shown[0].id : null;
    state.chosen = {};
    show();
  }

  function play() {
    if (state.timer) { clearInterval(state.timer); state.timer = null; $("play").textContent = "▶ play"; return; }
    if (state.step >= state.last) state.step = 0;
    $("play").textContent = "⏸ pause";
    const stride = Math.max(1, Math.round(state.last / 200));
    state.timer = setInterval(() => {
      state.step = Math.min(state.last, state.step + stride);
      drawStep();
      if (state.step >= state.last) play();
    }, 40);
  }

  for (const id of ["left", "right"]) {
    $(id).replaceChildren(...names.map((n) => node("option", { value: n }, n)));
    $(id).addEventListener("change", id === "left" ? fillProblems : show);
  }
  $("left").value = names.includes("apr-rl") ? "apr-rl" : names[0];
  $("right").value = names.includes("sos+-rl") ? "sos+-rl" : names[names.length - 1];
  if (names.length < 2) for (const id of ["right", "pane-right", "right-label"]) $(id).hidden = true;
  $("filter").addEventListener("change", fillProblems);
  $("problem").addEventListener("change", () => { state.id = $("problem").value; state.chosen = {}; show(); });
  $("step").addEventListener("input", () => { state.step = Number($("step").value); drawStep(); });
  $("play").addEventListener("click", play);
  $("theme").addEventListener("click", () => {
    const dark = document.documentElement.style.colorScheme
      ? document.documentElement.style.colorScheme === "dark" : matchMedia("(prefers-color-scheme: dark)").matches;
    document.documentElement.style.colorScheme = dark ? "light" : "dark";
  });
  document.addEventListener("keydown", (event) => {
    if (["SELECT", "INPUT", "BUTTON"].includes(event.target.tagName)) return;
    const move = { ArrowRight: 1, ArrowLeft: -1, PageUp: 20, PageDown: -20 }[event.key];
    if (move) { state.step = Math.max(0, Math.min(state.last, state.step + move)); drawStep(); event.preventDefault(); }
    if (event.key === " ") { play(); event.preventDefault(); }
  });
  let waiting = null;
  addEventListener("resize", () => { clearTimeout(waiting); waiting = setTimeout(show, 150); });
  fillProblems();
})();
