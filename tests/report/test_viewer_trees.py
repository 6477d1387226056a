"""What the viewer draws of trees: two side by side at one time, and hundreds of threads as quickly
as a few.
"""

import random
import statistics

import pytest
from helpers import trees
from helpers.browsing import chromium, needs_browser, settle, tabs
from helpers.traces import DIGITS, kinds_of, traced

from apr_jax.evaluate.trace import unpack_streams
from apr_jax.report.viewer import page
from apr_jax.tasks import Spawn, Thread, flatten

pytestmark = [needs_browser, pytest.mark.thorough]

TALL = {"width": 1280, "height": 1000}
# Of each pane: what is chosen, what it says, how many tokens are there, what is drawn, and where
# the time stands.
PANES = """() => viewer.panes.map(({ host, lanes }) => {
  const tokens = [...host.querySelectorAll(".thread .t")];
  return {
    name: host.querySelector("select").value,
    facts: host.querySelector(".facts").textContent,
    lanes: lanes.host.getAttribute("aria-label"),
    texts: tokens.map((token) => token.textContent.replace("↵", "")),
    there: tokens.findLastIndex((token) => !token.classList.contains("later")) + 1,
    later: tokens.filter((token) => token.classList.contains("later")).length,
    picture: lanes.canvas.toDataURL(),
    now: lanes.x(lanes.time),
  };
})"""
# How many threads each frame looks at, from the top of the lanes to their end.
LOOKED = """() => {
  const { lanes, tree } = viewer.panes[0], looked = new Set();
  for (const thread of tree.rows) for (const name of ["rounds", "segments"]) {
    const value = thread[name];
    Object.defineProperty(thread, name, { get() { looked.add(thread.thread_index); return value; } });
  }
  return [0, 0.3, 0.7, 1].map((share) => {
    lanes.host.scrollTop = share * (lanes.host.scrollHeight - lanes.host.clientHeight);
    looked.clear();
    lanes.draw();
    return looked.size;
  });
}"""
# The links that a frame draws in a low view, row after row; and those of all threads of which a
# part is in view.
LINKS = """([problem, time]) => {
  viewer.chooser.choose(problem);
  viewer.seek(time);
  const { lanes, tree } = viewer.panes[0], { host, line } = lanes, pen = lanes.canvas.getContext("2d"), found = [];
  host.style.height = "130px";
  lanes.fit();
  for (let scrolled = 0; scrolled < tree.rows.length * ROW; scrolled += 0.7 * ROW) {
    host.scrollTop = scrolled;
    lanes.draw();
    const first = Math.floor(lanes.above / ROW), end = Math.ceil((lanes.above + lanes.height - HEAD) / ROW);
    const last = Math.min(tree.rows.length, end);
    const drawn = [], wanted = [];
    lanes.line = (_, colour, ...where) => drawn.push([colour, pen.globalAlpha.toFixed(2), ...where]);
    lanes.drawLinks(pen, first, last);
    lanes.line = line;
    const middle = (row) => HEAD + Math.max(first - 1, Math.min(last, row)) * ROW - lanes.above + ROW / 2;
    for (const { row, rounds } of tree.rows) for (const { children, from, to } of rounds) {
      const lowest = Math.max(...children.map((child) => child.row));
      if (row >= last || lowest < first) continue;
      const alpha = (step) => (step <= time ? "1.00" : "0.25"), [high, low] = [middle(row), middle(lowest)];
      wanted.push([lanes.paint.spawn, alpha(from), lanes.x(from) + 0.5, high, lanes.x(from) + 0.5, low]);
      wanted.push([lanes.paint.joined, alpha(to), lanes.x(to) + 0.5, high, lanes.x(to) + 0.5, low, [3, 2]]);
    }
    found.push([drawn, wanted].map((lines) => lines.map((one) => JSON.stringify(one)).sort()));
  }
  return found;
}"""
# At which times a thread's text or the table of its children is not as faint as it should be.
WRONG = """([problem, thread_index, times]) => {
  viewer.chooser.choose(problem);
  viewer.panes[0].pick(thread_index);
  const { text, tree } = viewer.panes[0], thread = tree.threads.get(thread_index);
  const children = thread.rounds.flatMap((round) => round.children), rows = [...text.children.querySelectorAll("tbody tr")];
  const faint = (element) => element.classList.contains("later");
  return times.filter((time) => {
    viewer.seek(time);
    const there = (at) => thread.start <= time && at <= time;
    return rows.length !== children.length || rows.some((row, place) => faint(row) !== children[place].end > time)
      || text.tokens.some((token, place) => faint(token) === there(thread.at[place]));
  });
}"""
# Milliseconds of single steps from the middle: of the work of one, and until its frame is on its
# way to the screen.
STEPS = """async (count) => {
  const { lanes } = viewer.panes[0], work = [], frames = [];
  const frame = () => new Promise((done) => requestAnimationFrame(() => {
    const channel = new MessageChannel();
    channel.port1.onmessage = done;
    channel.port2.postMessage(0);
  }));
  viewer.seek(Math.floor(viewer.steps / 2) - count / 2);
  await frame();
  for (let step = 0; step < count; step++) {
    const begin = performance.now();
    viewer.seek(viewer.time + 1);
    lanes.draw();
    document.body.getBoundingClientRect();
    work.push(performance.now() - begin);
    await frame();
    frames.push(performance.now() - begin);
  }
  return [work, frames];
}"""


def grown(seed, depth=3):
    """A family in which threads spawn several times, and no two are alike."""
    rng = random.Random(seed)

    def grow(name, depth):
        body = ["1" * rng.randint(1, 9)]
        for _ in range(rng.randint(0, 2) if depth else 0):
            children = tuple(
                grow(f"{name}{place}", depth - 1) for place in range(rng.randint(1, 4))
            )
            body += [Spawn(children), "2" * rng.randint(1, 9)]
        return Thread(name, tuple(body), "3" * rng.randint(1, 9))

    return grow("9", depth)


def to_trace(thread, **changes):
    return traced(trees.to_forest(thread, DIGITS), 0, DIGITS, **changes)


@pytest.fixture(scope="module")
def families():
    """Traces of irregular trees of some size."""
    drawn = [thread for thread in map(grown, range(200)) if 15 < len(list(flatten(thread))) < 80][
        :8
    ]
    return [to_trace(thread, id=str(place)) for place, thread in enumerate(drawn)]


@pytest.fixture(scope="module")
def sizes():
    """A small tree; two of 501 threads, of which one has them all below its root; one that goes
    deep.
    """
    levels = {"small_batch_sizes": (4, 4), "many": (20, 24), "wide": (500,), "deep": (2,) * 8}
    return {name: to_trace(trees.family(each, "1")) for name, each in levels.items()}


@pytest.fixture(scope="module")
def browser():
    with chromium() as opened:
        yield opened


@pytest.fixture
def show(browser, tmp_path):
    with tabs(browser) as open_file:

        def open_page(evaluations, name="page", **settings):
            path = tmp_path / f"{name}.html"
            path.write_text(page(name, "", evaluations), encoding="utf-8")
            return open_file(path, **settings)

        yield open_page


def there(trace, time):
    """How many tokens of the root are there at a time: a sampled one takes a step, a join waits for
    the last child.
    """
    (root, *others), clock, count, rounds, before = trace["threads"], 0, 0, 0, ""
    for kind in kinds_of(root):
        rounds += before != kind == "spawn"
        if kind == "joined":
            clock = max(
                one["end"] for one in others if (one["parent"], one["round"]) == (0, rounds - 1)
            )
        clock += kind in ("sampled", "spawn", "join")
        count = count + (clock <= time)
        before = kind
    return count


def test_both_panes_show_their_own_tree_in_step(show, families):
    """Words, facts and lanes of each, as far as it has come by the step that both are at; each has
    a tokenizer of its own.
    """
    right = [
        other
        | {
            "id": one["id"],
            "pieces": {token: f"{piece}'" for token, piece in other["pieces"].items()},
        }
        for one, other in zip(families, families[1:] + families[:1], strict=True)
    ]
    tab = show({"sos+-rl": right, "apr-rl": families})
    for pair in list(zip(families, right, strict=True))[:3]:
        tab.click(f'[data-problem="{pair[0]["id"]}"]')
        steps = max(trace["sequential_tokens"] for trace in pair)
        pictures = []
        for time in (0, steps // 3, steps):
            tab.fill("#step", str(time))
            settle(tab)
            panes = tab.evaluate(PANES)
            assert [pane["name"] for pane in panes] == ["apr-rl", "sos+-rl"]
            for pane, trace in zip(panes, pair, strict=True):
                ids, _ = unpack_streams(trace)[0]
                assert pane["texts"] == [trace["pieces"][str(token)] for token in ids]
                assert pane["there"] == there(trace, time) == len(ids) - pane["later"]
                tokens = trace["total_tokens"]
                chain = trace["sequential_tokens"]
                assert pane["facts"].startswith(
                    f"{tokens} tokens, {chain} in sequence, {trace['children']} children"
                )
                assert pane["lanes"].startswith(
                    f"{len(trace['threads'])} threads over {chain} steps"
                )
            assert panes[0]["now"] == panes[1]["now"], "a step stands at one place in both"
            pictures += [pane["picture"] for pane in panes]
        assert len(set(pictures)) == 6


def test_links_cover_every_thread_that_reaches_the_view(show, families):
    tab = show({"apr": families})
    from_above = 0
    for trace in families:
        for time in (0, trace["sequential_tokens"] // 2):
            for drawn, wanted in tab.evaluate(LINKS, [trace["id"], time]):
                assert drawn == wanted
                from_above += len(wanted) > 2
    assert from_above > 100


def test_future_is_faint_whatever_time_was_before(show, families):
    """Tokens of a thread, and the children in its table, of several spawns and in the order in
    which they end.
    """
    tab = show({"apr": families})
    rng = random.Random(0)
    spawns = 0
    for trace in families:
        for thread in trace["threads"][:6]:
            spawns += sum(kind == "spawn" for kind, _ in thread["spans"]) > 1
            times = [rng.randint(0, trace["sequential_tokens"]) for _ in range(20)]
            assert tab.evaluate(WRONG, [trace["id"], thread["thread_index"], times]) == []
    assert spawns > 8


@pytest.mark.slow
def test_five_hundred_threads_cost_what_twenty_do(show, sizes):
    """Only what is in view is drawn, and a step touches only what it changes."""
    work = {}
    for name, trace in sizes.items():
        tab = show({"apr": [trace]}, viewport=TALL)
        lanes = [tab.evaluate("viewer.panes[0].lanes.drawn")]
        touched = []
        tab.keyboard.press("Home")
        for _ in range(12):
            tab.keyboard.press("Shift+ArrowRight")
            settle(tab)
            lanes.append(tab.evaluate("viewer.panes[0].lanes.drawn"))
            touched.append(tab.evaluate("viewer.panes[0].text.touched"))
        tab.keyboard.press("End")
        touched.append(tab.evaluate("viewer.panes[0].text.touched"))
        sampled = len(unpack_streams(trace)[0][0]) - trace["threads"][0]["lengths"][0]
        assert sum(touched) == sampled + sum(
            thread["parent"] == 0 for thread in trace["threads"]
        ), "each once"
        tab.evaluate("viewer.panes[0].lanes.host.scrollTop = 1e6")
        settle(tab)
        lanes.append(tab.evaluate("viewer.panes[0].lanes.drawn"))
        work[name] = max(lanes), max(touched[:-1]), len(trace["threads"])
    assert [threads for _, _, threads in work.values()] == [21, 501, 501, 511]
    assert min(lanes for lanes, _, _ in work.values()) > 60
    # As many lanes as fit into the view, with some ten elements each, whatever else the tree has.
    assert max(lanes for lanes, _, _ in work.values()) < 400
    assert max(touched for _, touched, _ in work.values()) < 120
    assert work["many"][0] < 2 * work["small_batch_sizes"][0]


def test_a_frame_looks_at_no_thread_out_of_view(show, sizes):
    """But for the ancestors of the first in view, whose links cross it."""
    for trace in sizes.values():
        tab = show({"apr": [trace]}, viewport=TALL)
        looked = tab.evaluate(LOOKED)
        in_view = tab.evaluate("Math.floor((viewer.panes[0].lanes.height - HEAD) / ROW)")
        depth = max(thread["depth"] for thread in trace["threads"])
        assert in_view <= min(looked) <= max(looked) <= in_view + 2 + depth


def test_a_step_through_five_hundred_threads_is_not_felt(show, sizes):
    """Loose bounds, for a machine with other work: ten times what was measured, and five times what
    a small tree takes.
    """
    opened = {
        name: show({"apr": [sizes[name]]}, name, viewport=TALL)
        for name in ("small_batch_sizes", "many", "wide")
    }
    times = {name: [] for name in opened}
    for _ in range(3):
        for name, tab in opened.items():
            tab.bring_to_front()
            work, frames = map(statistics.median, tab.evaluate(STEPS, 30))
            times[name].append(work)
            assert frames < 200, f"{name}: milliseconds of a step until its frame is drawn"
    for name, found in times.items():
        assert (
            min(work / few for work, few in zip(found, times["small_batch_sizes"], strict=True)) < 5
        ), (name, times)
