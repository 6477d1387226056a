"""The page in a real browser: what it draws, that it asks for nothing, and that keys alone reach
everything.

Screenshots are left in the folder that pytest keeps (`--basetemp` names it).
"""

import collections
import json
import os

import jax
import numpy as np
import pytest
from helpers import harness, trees
from helpers.browsing import NARROW, WIDE, chromium, needs_browser, settle, tabs
from helpers.traces import DIGITS, kinds_of, traced

from apr_jax.check import scripted
from apr_jax.evaluate.trace import KINDS, unpack_streams
from apr_jax.report.viewer import link, page
from apr_jax.tasks import Thread
from apr_jax.text.sentence_piece import SentencePieceTokenizer

pytestmark = [needs_browser, pytest.mark.thorough]

LETTERS = SentencePieceTokenizer.train(["abcd"])  # Of the size that the scripted policy speaks.
TAKE = "document.title='taken'"
HOSTILE = f'</script><script>{TAKE}</script><!-- <img src=x onerror="{TAKE}"> ]]> ${{1}} \u2028 \''

# What has the focus: its name here, the ring around it, and whether a screen reader can name it.
FOCUSED = """() => {
  const e = document.activeElement, style = getComputedStyle(e);
  return [`${e.tagName}#${e.id || e.className}`, `${style.outlineStyle} ${style.outlineWidth}`,
    Boolean(e.ariaLabel || e.labels?.length || e.textContent)];
}"""

COLOUR = "(token) => getComputedStyle(document.querySelector(token)).color"
# Of each thread of a problem: of each token its classes, and the colour in which it is written.
COLOURS = """(problem) => {
  viewer.chooser.choose(problem);
  const pane = viewer.panes[0];
  return pane.tree.rows.map(({ thread_index }) => {
    pane.pick(thread_index);
    return [thread_index, pane.text.tokens.map((token) => [[...token.classList], getComputedStyle(token).color])];
  });
}"""


@pytest.fixture(scope="module")
def forest():
    """Records of policies that nest, break the protocol, and run out of everything."""
    limits = harness.LIMITS["nested"]
    key = jax.random.key(1)
    run = harness.engine(limits, harness.ODD)  # As compiled for the tests of the rollout.
    batch = harness.prompts(1, limits)
    kind, wild = (
        jax.device_get(run(scripted.policy(1, manners), batch, key))[0] for manners in (9.0, 5.0)
    )
    return jax.tree.map(lambda one, other: np.concatenate([one[::2], other[::2]]), kind, wild)


@pytest.fixture(scope="module")
def evaluations(forest):
    left = [traced(forest, tree, LETTERS) for tree in range(harness.TREES)]
    for trace in left[::2]:
        trace.update(correct=True, failure="")
    for place, trace in enumerate(left[1::2]):
        trace.update(correct=False, failure=("no answer", "arithmetic")[place % 2])
    right = [
        trace | {"correct": place % 3 == 0, "failure": ""} for place, trace in enumerate(left)
    ][:-1]
    return {"apr-rl": left, "sos+-rl": right}


@pytest.fixture(scope="module")
def browser(evaluations):
    with chromium() as opened:
        yield opened


@pytest.fixture
def show(browser, tmp_path):
    """Opens evaluations in a new tab."""
    with tabs(browser) as open_file:

        def open_page(evaluations, anchor="", viewport=WIDE, scheme="light", summary=""):
            path = tmp_path / "page.html"
            path.write_text(page("trees & threads", summary, evaluations), encoding="utf-8")
            return open_file(path, anchor, viewport, scheme)

        yield open_page


def until(tab, code):
    for _ in range(500):
        if tab.evaluate(code):
            return
        settle(tab)
    raise AssertionError(code)


def chosen(tab):
    return tab.evaluate(
        "() => ({step: viewer.time, problem: viewer.chooser.problem, thread_index:"
        " viewer.panes[0].thread_index})"
    )


def test_positions_and_clocks_are_those_of_the_rollout(show, forest, evaluations):
    """The page works out position and step of each token; the rollout recorded them."""
    tab = show(evaluations)
    code = (
        "([id]) => {const tree = makeTree(viewer.evaluations.get('apr-rl').traces.get(id), {});"
        " return tree.rows.map("
    )
    code += (
        "(t) => ({thread_index: t.thread_index, position: [...t.position], at: [...t.at], ids:"
        " t.ids, segments: t.segments}))}"
    )
    spawning = 0
    for tree, trace in enumerate(evaluations["apr-rl"]):
        threads = {thread["thread_index"]: thread for thread in tab.evaluate(code, [trace["id"]])}
        assert sorted(threads) == [thread["thread_index"] for thread in trace["threads"]]
        for thread_index, thread in threads.items():
            length = forest.length[tree, thread_index]
            assert thread["position"] == forest.position[tree, thread_index, :length].tolist()
            assert thread["ids"] == forest.tokens[tree, thread_index, :length].tolist()
            worked = sum(
                part["to"] - part["from"] for part in thread["segments"] if part["kind"] != "wait"
            )
            assert worked == forest.sampled[tree, thread_index].sum()
            assert thread["segments"][-1]["to"] == forest.end[tree, thread_index]
            parent = forest.parent[tree, thread_index]
            if parent >= 0:
                spawning += 1
                closed = np.flatnonzero(forest.tokens[tree, parent] == harness.p.END_SPAWN)
                assert (
                    threads[parent]["at"][closed[forest.round[tree, thread_index]]]
                    == forest.start[tree, thread_index]
                )
    assert spawning > 40


def test_a_line_holds_every_token(forest, evaluations):
    without_advantage = {"<pad>", "<bos>", "<eos>", "<unk>"}
    for tree, trace in enumerate(json.loads(json.dumps(evaluations["apr-rl"]))):
        for thread, (ids, logprobs) in zip(trace["threads"], unpack_streams(trace), strict=True):
            at = (tree, thread["thread_index"], slice(len(ids)))
            assert len(ids) == forest.length[at[:2]]
            np.testing.assert_array_equal(ids, forest.tokens[at])
            np.testing.assert_allclose(logprobs, forest.logprob[at], atol=5.1e-4)
            pieces = [trace["pieces"][str(token)] for token in ids]
            assert (
                "".join(piece for piece in pieces if piece not in without_advantage)
                == thread["text"]
            )
            kinds = kinds_of(thread)
            np.testing.assert_array_equal(np.isin(kinds, ["given", "joined"]), ~forest.sampled[at])
            np.testing.assert_array_equal(kinds == "spawn", forest.hidden_block[at] > 0)


def test_keys_alone_reach_everything(show, evaluations):
    longest = max(
        evaluations["apr-rl"][:-2],
        key=lambda trace: (trace["children"] > 0, trace["sequential_tokens"]),
    )
    tab = show(evaluations, link("apr-rl", problem=longest["id"]))
    start = chosen(tab)
    assert start["step"] == tab.evaluate("viewer.steps")
    press = tab.keyboard.press
    press("Home")
    assert chosen(tab)["step"] == 0
    press("ArrowRight")
    press("Shift+ArrowRight")
    assert chosen(tab)["step"] == 11
    press("ArrowLeft")
    assert chosen(tab)["step"] == 10
    press("n")
    assert (
        chosen(tab)["problem"]
        == evaluations["apr-rl"][evaluations["apr-rl"].index(longest) + 1]["id"]
    )
    press("p")
    assert chosen(tab)["problem"] == start["problem"]
    press("n")
    press("/")
    tab.keyboard.type(f"5 {longest['data']['target']}")
    assert chosen(tab)["problem"] == longest["id"]
    assert tab.inner_text("#found") == f"1 of the {harness.TREES} problems on this page"
    press("ArrowDown")  # Into the list.
    press("Escape")
    # Everything that can be used is reached by tab, is named, and shows that it is.
    found = set()
    for _ in range(60):
        press("Tab")
        name, ring, named = tab.evaluate(FOCUSED)
        if not name.startswith("BODY"):
            assert ring == "solid 3px" and named, name
            found.add(name)
    wanted = {
        "BUTTON#theme",
        "INPUT#search",
        "SELECT#show",
        "UL#problems",
        "BUTTON#play",
        "INPUT#step",
        "SELECT#speed",
    }
    assert wanted | {"INPUT#surprise", "DIV#lanes", "DIV#thread"} <= found
    tab.focus(".lanes")
    press("ArrowDown")
    assert chosen(tab)["thread_index"] == tab.evaluate("viewer.panes[0].tree.rows[1].thread_index")
    before = tab.evaluate("viewer.panes[0].lanes.scale")
    press("+")
    assert tab.evaluate("viewer.panes[0].lanes.scale") == pytest.approx(1.5 * before)


def test_arrow_keys_step_through_tokens_with_log_probs(show, evaluations):
    tab = show(evaluations, link("apr-rl", problem="test-2"))
    trace = evaluations["apr-rl"][2]
    ids, logprobs = unpack_streams(trace)[0]
    tab.focus(".thread")
    for place, (token, logprob) in enumerate(zip(ids, logprobs, strict=True)):
        tab.keyboard.press("ArrowRight")
        said = tab.inner_text("#tip")
        assert f"(id {token})" in said and f"token {place + 1} of {len(ids)}" in said
        assert ("given" in said) == (logprob == 0 and "log-prob" not in said)
        if "log-prob" in said:
            assert f"log-prob {logprob:.3f}".replace("-0.000", "0.000") in said.replace(
                "-0.000", "0.000"
            )


def test_the_pointer_over_a_token_says_its_log_prob(show, evaluations):
    """Of each kind the token that the model found least likely; what was given has none."""
    trace = max(evaluations["apr-rl"], key=lambda trace: len(dict(trace["threads"][0]["spans"])))
    tab = show(evaluations, link("apr-rl", problem=trace["id"]))
    (ids, logprobs), kinds = unpack_streams(trace)[0], kinds_of(trace["threads"][0])
    assert set(kinds) == {*KINDS}
    for kind in KINDS:
        place = min(np.flatnonzero(kinds == kind), key=lambda place: logprobs[place])
        tab.hover(f'.thread >> nth=0 >> [data-place="{place}"]')
        said = tab.inner_text("#tip")
        assert f"(id {ids[place]})" in said and f"token {place + 1} of {len(ids)}" in said
        if kind in ("given", "joined"):
            assert "log-prob" not in said and "given" in said
        else:
            assert logprobs[place] < -0.1 and f"log-prob {logprobs[place]:.3f}" in said
    tab.mouse.move(0, 0)
    assert tab.is_hidden("#tip")


def test_every_token_has_the_colour_of_its_kind(show, evaluations):
    """As the legend has them, no two alike."""
    tab = show(evaluations)
    legend = {kind: tab.evaluate(COLOUR, f".legend .t.{kind}") for kind in KINDS}
    assert len(set(legend.values())) == len(KINDS)
    seen = collections.Counter()
    for trace in evaluations["apr-rl"]:
        drawn = dict(tab.evaluate(COLOURS, trace["id"]))
        assert sorted(drawn) == [thread["thread_index"] for thread in trace["threads"]]
        for thread in trace["threads"]:
            kinds = kinds_of(thread).tolist()
            classes, colours = zip(*drawn[thread["thread_index"]], strict=True)
            assert [[name for name in of if name in KINDS] for of in classes] == [
                [kind] for kind in kinds
            ]
            assert list(colours) == [legend[kind] for kind in kinds]
            seen.update(kinds)
    assert min(seen[kind] for kind in KINDS) > 50


def test_time_shows_in_the_text(show, evaluations):
    tab = show(evaluations)
    tab.keyboard.press("Home")
    faint = "document.querySelectorAll('#panes > :first-child .thread .t.later').length"
    prompt = evaluations["apr-rl"][0]["threads"][0]["lengths"][0]
    assert tab.evaluate(faint) == len(unpack_streams(evaluations["apr-rl"][0])[0][0]) - prompt
    tab.keyboard.press("End")
    assert tab.evaluate(faint) == 0
    tab.click("#play")
    until(tab, "viewer.playing && viewer.time > 0 && viewer.time < viewer.steps")
    tab.click("#play")
    assert not tab.evaluate("viewer.playing")


def test_choosing_by_outcome_failure_and_link(show, evaluations):
    """A count of a table of failures leads to its examples in one click."""
    to = link("apr-rl", show="arithmetic")
    tab = show(evaluations, summary=f'<a id="failures" href="{to}">4</a>')
    listed = (
        "() => [...document.querySelectorAll('#problems li')].map((item) => item.dataset.problem)"
    )
    assert tab.evaluate(listed) == [trace["id"] for trace in evaluations["apr-rl"]]
    tab.click("#failures")
    settle(tab)
    wrong = [trace["id"] for trace in evaluations["apr-rl"] if trace["failure"] == "arithmetic"]
    assert tab.evaluate(listed) == wrong and chosen(tab)["problem"] == wrong[0]
    assert "arithmetic" in tab.inner_text(".verdict >> nth=0")
    assert tab.evaluate("scrollY") > 0
    tab.select_option("#show", "only left")
    both = zip(evaluations["apr-rl"], evaluations["sos+-rl"], strict=False)
    assert tab.evaluate(listed) == [a["id"] for a, b in both if a["correct"] and not b["correct"]]
    last = evaluations["apr-rl"][-1]["id"]
    tab.goto(tab.url.partition("#")[0] + link("apr-rl", problem=last))
    settle(tab)
    assert chosen(tab)["problem"] == last
    assert "no tree of this problem" in tab.inner_text(".verdict >> nth=1")


def test_hostile_text_of_a_model_stays_in_place(show, evaluations):
    trace = json.loads(json.dumps(evaluations["apr-rl"][1]))
    trace |= {
        "id": HOSTILE,
        "problem": HOSTILE,
        "stated": HOSTILE,
        "reason": HOSTILE,
        "failure": HOSTILE,
    }
    trace["pieces"] = dict.fromkeys(trace["pieces"], HOSTILE)
    tab = show({HOSTILE: [trace], "b": [trace]})
    tab.keyboard.press("ArrowLeft")
    tab.focus(".thread")
    tab.keyboard.press("ArrowRight")
    assert tab.title() == "trees & threads"
    assert (
        tab.evaluate("document.scripts.length") == 2 and tab.evaluate("document.images.length") == 0
    )
    assert HOSTILE in tab.inner_text(".verdict >> nth=0")
    assert HOSTILE.split()[0] in tab.inner_text(".thread >> nth=0")


def test_even_a_script_that_got_in_would_not_run(show, browser, tmp_path, evaluations):
    path = tmp_path / "open.html"
    path.write_text(
        page("safe", "<script>document.title = 'taken'</script><img src='other.png'>", evaluations)
    )
    tab = browser.new_page()
    failed = []
    tab.on("requestfailed", lambda request: failed.append(request.failure))
    tab.goto(path.as_uri())
    settle(tab)
    assert tab.title() == "safe" and tab.evaluate("typeof viewer") == "object"
    assert failed == ["csp"]
    tab.close()


@pytest.mark.parametrize("scheme", ["light", "dark"])
@pytest.mark.parametrize("viewport", [WIDE, NARROW], ids=["wide", "narrow"])
def test_both_colour_schemes_at_any_width(show, scheme, viewport, tmp_path_factory):
    nested = traced(
        trees.to_forest(trees.family((5, 3), "1"), DIGITS), 0, DIGITS, failure="arithmetic"
    )
    serial = traced(
        trees.to_forest(Thread("1", ("2+3=5,5*4=20",), "5*4=20"), DIGITS),
        0,
        DIGITS,
        correct=True,
        failure="",
    )
    tab = show(
        {"apr-rl": [nested, nested | {"id": "b"}], "sos+-rl": [serial, serial | {"id": "b"}]},
        viewport=viewport,
        scheme=scheme,
    )
    assert (luminance(tab, "body", "backgroundColor") < 0.2) == (scheme == "dark")
    assert tab.evaluate("document.documentElement.scrollWidth") <= viewport["width"]
    assert tab.locator("#step").bounding_box()["width"] > 120
    for name in ("given", "sampled", "spawn", "joined", "join"):
        for place in (f".legend .t.{name}", f".thread .t.{name}"):
            assert contrast(tab, place) >= 4.5, (place, scheme)
    for place in (
        ".facts",
        ".verdict >> nth=0",
        "h2",
        "#found",
        ".right",
        ".wrong",
        "#theme",
        ".marks",
    ):
        assert contrast(tab, place) >= 4.5, (place, scheme)
    picture = tmp_path_factory.getbasetemp() / f"viewer-{scheme}-{viewport['width']}.png"
    tab.screenshot(path=picture, full_page=True)
    assert os.path.getsize(picture) > 20_000
    shade = "() => viewer.panes[0].lanes.paint.ink"
    before = tab.evaluate(shade)
    tab.click("#theme")
    settle(tab)
    assert (luminance(tab, "body", "backgroundColor") < 0.2) == (scheme == "light")
    assert tab.evaluate(shade) != before
    tab.reload()
    settle(tab)
    assert (luminance(tab, "body", "backgroundColor") < 0.2) == (scheme == "light"), (
        "the switch is remembered"
    )


def luminance(tab, place, what="color"):
    """Relative luminance of WCAG 2.2, of a text or of what stands behind it (tints of a tenth are
    left out).
    """
    behind = """(e) => {for (; e; e = e.parentElement) {const m = getComputedStyle(e).backgroundColor.match(/^rgb\\((.*)\\)$/);
      if (m) return m[1]} return '255,255,255'}"""
    code = (
        behind
        if what == "backgroundColor"
        else "(e) => getComputedStyle(e).color.match(/\\((.*)\\)/)[1]"
    )
    channels = [int(value) / 255 for value in tab.locator(place).first.evaluate(code).split(",")]
    linear = [c / 12.92 if c <= 0.04045 else ((c + 0.055) / 1.055) ** 2.4 for c in channels]
    return float(np.dot(linear, [0.2126, 0.7152, 0.0722]))


def contrast(tab, place):
    low, high = sorted((luminance(tab, place), luminance(tab, place, "backgroundColor")))
    return (high + 0.05) / (low + 0.05)
