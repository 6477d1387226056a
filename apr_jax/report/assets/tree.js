// A trace as the viewer needs it. Time is the sequential clock: sampled tokens on the longest chain. What the trace doesn't state
// follows from it as docs/protocol.md says: a token's position, and the time at which it is there.
"use strict";

const KINDS = ["given", "sampled", "spawn", "joined", "join"];
const CONTROLS = 10; // Ids below are control pieces.
const MSG = 5;

// pieces: text of each id. Adds `rows` (threads, children below their parents) and `busy` (threads at work in each step).
function makeTree(trace, pieces) {
  const threads = new Map(trace.threads.map((thread) => [thread.thread_index, { ...thread, children: [] }]));
  for (const thread of threads.values()) threads.get(thread.parent)?.children.push(thread);
  const rows = [];
  const walk = (thread) => { thread.row = rows.push(thread) - 1; thread.children.forEach(walk); };
  walk(threads.get(0));
  const tree = { trace, pieces, threads, rows, steps: Math.max(1, trace.sequential_tokens) };
  for (const thread of rows) readThread(thread, tree);
  tree.busy = new Int32Array(tree.steps + 1);
  for (const thread of rows) {
    for (const { kind, from, to } of thread.segments) {
      if (kind === "wait") continue;
      tree.busy[from] += 1;
      tree.busy[Math.min(to, tree.steps)] -= 1;
    }
  }
  for (let step = 1; step <= tree.steps; step++) tree.busy[step] += tree.busy[step - 1];
  tree.most = Math.max(1, ...tree.busy);
  return tree;
}

// Adds to a thread, for each token, `at` (it is there from this step on), `position`, `kind` and `child` (whom a <msg> speaks to
// or hears from); `segments` (stretches of time) and `rounds` (spawns with their children).
function readThread(thread, tree) {
  const length = thread.ids.length;
  Object.assign(thread, { at: new Int32Array(length), position: new Int32Array(length), kind: [], child: new Map(), segments: [], rounds: [] });
  let clock = thread.start, position = 0, spawned = 0, place = 0;
  thread.spans.forEach(([kind, count]) => {
    const from = clock;
    let messages = 0, round = thread.rounds.at(-1);
    if (kind === "spawn") {
      spawned = position;
      const children = thread.children.filter((child) => child.round === thread.rounds.length);
      round = { children, from: clock + count, to: Math.max(clock + count, ...children.map((child) => child.end)) };
      thread.rounds.push(round);
    }
    if (kind === "joined") {
      position = spawned;
      clock = round.to;
    }
    for (const end = place + count; place < end; place++) {
      if (kind !== "given" && kind !== "joined") clock += 1;
      thread.at[place] = clock;
      thread.position[place] = position++;
      thread.kind[place] = kind;
      if ((kind === "spawn" || kind === "joined") && thread.ids[place] === MSG) {
        const child = round.children[messages++];
        if (child) thread.child.set(place, child.thread_index);
      }
    }
    if (kind === "joined") thread.segments.push({ kind: "wait", from, to: clock });
    else if (clock > from) thread.segments.push({ kind, from, to: clock });
  });
  if (clock < thread.end) thread.segments.push({ kind: "wait", from: clock, to: thread.end }); // It ended while it waited.
  thread.message = words(thread, tree, "given");
  thread.answer = thread.status === "DONE" ? words(thread, tree, "join") : "";
  thread.name = thread.thread_index === 0 ? "root" : String(thread.thread_index);
}

// What the thread says in all spans of a kind, without control pieces.
function words(thread, tree, kind) {
  let text = "";
  thread.ids.forEach((id, place) => { if (thread.kind[place] === kind && id >= CONTROLS) text += tree.pieces[id]; });
  return text;
}

// How many tokens are there at a time: `at` never falls.
function written(thread, time) { return thread.start <= time ? upTo(thread.at, time) : 0; }

// How many of ascending numbers are no more than that.
function upTo(numbers, most) {
  let low = 0, high = numbers.length;
  while (low < high) {
    const middle = (low + high) >> 1;
    if (numbers[middle] <= most) low = middle + 1; else high = middle;
  }
  return low;
}

// How a thread ended, in a word for the reader.
function ending(thread) {
  if (thread.status !== "DONE") return thread.status.toLowerCase().replaceAll("_", " ");
  return thread.answer ? "answered" : "no answer";
}

function describe(thread) {
  const sampled = thread.kind.filter((kind) => kind !== "given" && kind !== "joined").length;
  const nats = thread.logprobs.reduce((sum, value) => sum + value, 0);
  const said = thread.answer ? `, joins ${thread.answer}` : "";
  return `${sampled} tokens, ${ending(thread)}${said}, log-prob ${nats.toFixed(2)}`;
}

function element(tag, properties = {}, ...children) {
  const made = document.createElement(tag);
  for (const [key, value] of Object.entries(properties)) {
    if (key === "class") made.className = value;
    else if (key === "data") Object.assign(made.dataset, value);
    else if (key in made) made[key] = value;
    else made.setAttribute(key, value);
  }
  made.append(...children);
  return made;
}
