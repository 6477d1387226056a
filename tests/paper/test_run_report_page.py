"""The whole report of a run, in a real browser: light and dark, wide and narrow, readable,
complete, and on its own.

Screenshots are left in the folder that pytest keeps (`--basetemp` names it).
"""

import html
import json
import random
import re

import pytest
from helpers import made_run, trees
from helpers.browsing import NARROW, WIDE, chromium, needs_browser, settle, tabs
from helpers.traces import scored_trace

from apr_jax.paper import charts, controls, figures, published_figures, run_report, suite
from apr_jax.paper.kinds import KINDS
from apr_jax.paper.results import read_run
from apr_jax.report import viewer
from apr_jax.tasks import Problem, make_task
from apr_jax.text.sentence_piece import SentencePieceTokenizer

pytestmark = pytest.mark.thorough

TRAINED = ("sos+/sft", "sos+/rl", "apr/sft", "apr/rl")
LOG = """# Log
## 2026-11-26: tiny, wider and *worse*
- **Twice as wide**: `train.sft.lr=1e-3` gave <b>nothing</b>, see [the table](evaluation.md).
## 2026-11-25: another size
- Not of this one.
## 2026-11-24: the destiny of tiny
- The end.
"""

# What a reader sees of each word and each mark: its contrast to what stands behind it, as WCAG 2.2
# has it.
SEEN = """() => {
  const canvas = Object.assign(document.createElement("canvas"), { width: 1, height: 1 });
  const pen = canvas.getContext("2d", { willReadFrequently: true });
  const rgba = (text) => {
    pen.clearRect(0, 0, 1, 1);
    pen.fillStyle = text;
    pen.fillRect(0, 0, 1, 1);
    const [r, g, b, a] = pen.getImageData(0, 0, 1, 1).data;
    return [r, g, b, a / 255];
  };
  const over = ([r, g, b, a], under) => [r, g, b].map((c, k) => a * c + (1 - a) * under[k]);
  const linear = (c) => (c / 255 <= 0.04045 ? c / 255 / 12.92 : ((c / 255 + 0.055) / 1.055) ** 2.4);
  const light = ([r, g, b]) => 0.2126 * linear(r) + 0.7152 * linear(g) + 0.0722 * linear(b);
  const contrast = (one, other) => {
    const [low, high] = [light(one), light(other)].sort((a, b) => a - b);
    return (high + 0.05) / (low + 0.05);
  };
  const chain = (e) => { const all = []; for (; e; e = e.parentElement) all.push(e); return all; };
  const ground = (e) => rgba(getComputedStyle(e).backgroundColor);
  const behind = (e) => chain(e).reduceRight((under, one) => over(ground(one), under), [255, 255, 255]);
  const seen = (e, what) => {
    const style = getComputedStyle(e), [r, g, b, a] = rgba(style[what]);
    const part = { fill: style.fillOpacity, stroke: style.strokeOpacity, color: 1 }[what];
    return [r, g, b, a * part * chain(e).reduce((all, one) => all * getComputedStyle(one).opacity, 1)];
  };
  const drawn = (svg, marks) => [...svg.querySelectorAll(marks)].filter((e) => !e.closest("defs, clipPath"));
  // What was painted under the middle of a word: later shapes over earlier ones, all over the card.
  const painted = (text) => {
    const svg = text.ownerSVGElement, box = text.getBoundingClientRect();
    return drawn(svg, "path").filter((shape) => {
      const point = new DOMPoint(box.x + box.width / 2, box.y + box.height / 2).matrixTransform(shape.getScreenCTM().inverse());
      return shape.compareDocumentPosition(text) & 4 && getComputedStyle(shape).fill !== "none" && shape.isPointInFill(point);
    }).reduce((under, shape) => over(seen(shape, "fill"), under), behind(svg));
  };
  for (const folded of document.querySelectorAll(".report details")) folded.open = true;
  const found = [];
  const note = (kind, e, colour, under) => {
    found.push([kind, contrast(over(colour, under), under), e.textContent.trim().slice(0, 40) || e.getAttribute("style")]);
  };
  const speaks = (e) => [...e.childNodes].some((one) => one.nodeType === 3 && one.data.trim());
  for (const e of document.querySelectorAll(".report *")) {
    if (e.closest("svg") || !e.checkVisibility() || !speaks(e)) continue;
    note(e.closest("table") ? "table" : "words", e, seen(e, "color"), behind(e));
  }
  for (const svg of document.querySelectorAll(".figures svg")) {
    for (const e of svg.querySelectorAll("text")) note("figure", e, seen(e, "fill"), painted(e));
    for (const e of drawn(svg, "path, use")) for (const what of ["fill", "stroke"]) {
      if (getComputedStyle(e)[what] === "none" || seen(e, what)[3] < 0.5) continue; // Grids and bands are faint on purpose.
      note("mark", e, seen(e, what), behind(svg));
    }
  }
  return found;
}"""

SMALLEST = """() => Math.min(...[...document.querySelectorAll(".figures svg text")].map(
  (text) => parseFloat(getComputedStyle(text).fontSize) * text.ownerSVGElement.getScreenCTM().a))"""
UNSEEN = "(table) => table.parentElement.scrollWidth - table.parentElement.clientWidth"


@pytest.fixture(scope="module")
def run(config, tmp_path_factory):
    """A made run whose greedy answers have all that the viewer shows, and whose trees go wrong in
    several ways.
    """
    folder = tmp_path_factory.mktemp("run")
    tokenizer = SentencePieceTokenizer.train(["0123456789+-*/,:;=>|!#"])
    config = made_run.make_run(folder, config, tokenizer, TRAINED)
    for one in suite.declare(made_run.EVALUATE):
        if one.model in TRAINED and one == suite.Evaluation(one.model):
            _give_tokens(folder / "eval" / one.name / "traces.jsonl", one.model, config, tokenizer)
    for stage, metric in (("sft", "loss"), ("rl", "reward")):
        for method in ("sos+", "apr"):
            (folder / method / stage).mkdir(parents=True)
            lines = [json.dumps({"step": step, metric: 1 / step}) for step in range(1, 9)]
            (folder / method / stage / "metrics.jsonl").write_text("\n".join(lines) + "\n")
    return folder


def _give_tokens(path, model, config, tokenizer):
    """Tells the same demonstrations again as the rollout would have recorded them; half of the
    wrong ones were cut short.
    """
    task = make_task(config.task)
    method = model.partition("/")[0]
    rng = random.Random(0)
    lines = []
    for place, old in enumerate(map(json.loads, path.read_text().splitlines())):
        problem = Problem(old["id"], old["data"])
        forest = trees.to_forest(task.demonstrate(problem, method, 50 * place), tokenizer)
        answer = old["threads"][0]["spans"][-1][1].removeprefix("<join>")
        new = scored_trace(forest, 0, problem, answer, task, tokenizer)
        if not new["correct"] and rng.random() < 0.5:
            new["threads"][0]["status"] = "OUT_OF_WINDOW"
        lines.append(json.dumps(new) + "\n")
    path.write_text("".join(lines))


@pytest.fixture(scope="module")
def written(run):
    """(the report, its numbers, the traces that it holds); it has room for one example of a kind,
    so not for all.
    """
    held = {}

    def select(traces, always):
        held.update(viewer.select(traces, always))
        return held

    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(viewer, "_MOST_EXAMPLES", 1)
        patch.setattr(viewer, "_MOST_RIGHT", 2)
        patch.setattr(run_report, "select", select)
        patch.setattr(run_report, "_LOG", run / "log.md")
        run_report._LOG.write_text(LOG)
        numbers = run_report.write_run_report(run, run / "data", run)
    return run / "report.html", numbers, held


@pytest.fixture(scope="module")
def browser(written):
    with chromium() as opened:
        yield opened


@pytest.fixture
def show(browser):
    with tabs(browser) as open_file:
        yield open_file


@needs_browser
@pytest.mark.parametrize(
    ("viewport", "scheme"),
    [
        pytest.param(WIDE, "light", id="wide-light"),
        pytest.param(NARROW, "dark", id="narrow-dark"),
        pytest.param(WIDE, "dark", id="wide-dark", marks=pytest.mark.slow),
        pytest.param(NARROW, "light", id="narrow-light", marks=pytest.mark.slow),
    ],
)
def test_report_is_readable_in_any_scheme_and_width(show, written, scheme, viewport, tmp_path):
    tab = show(written[0], viewport=viewport, scheme=scheme)
    seen = tab.evaluate(SEEN)
    for kind, least, some in (
        ("table", 4.5, 100),
        ("words", 4.5, 20),
        ("figure", 4.5, 100),
        ("mark", 3.0, 100),
    ):
        found = [(ratio, what) for name, ratio, what in seen if name == kind]
        assert len(found) > some, kind
        assert [one for one in found if one[0] < least] == [], kind
    # All is unfolded now. What is too wide scrolls in a box of its own; no word of a figure is
    # shrunk.
    assert (
        tab.evaluate("[document.documentElement.scrollWidth, document.body.scrollWidth]")
        == [viewport["width"]] * 2
    )
    assert tab.evaluate(SMALLEST) >= 9
    picture = tmp_path / f"report-{scheme}-{viewport['width']}.png"
    tab.screenshot(path=picture, full_page=True)
    assert picture.read_bytes().startswith(b"\x89PNG") and picture.stat().st_size > 100_000


@needs_browser
@pytest.mark.parametrize("viewport", [WIDE, NARROW], ids=["wide", "narrow"])
def test_claims_tables_and_figures_are_there_to_see(show, written, viewport):
    path, numbers, _ = written
    tab = show(path, viewport=viewport)

    def after(title):
        """The table under a heading, once it is seen, in a wide window without scrolling."""
        heading = tab.locator(f':is(h2, h3):text-is("{title}")')
        table = heading.locator("xpath=following::table[1]")
        assert heading.is_visible() and table.is_visible()
        assert viewport is NARROW or table.evaluate(UNSEEN) <= 0, title
        return table

    published = [row for row in numbers["comparisons"] if row["paper"]]
    comparisons = after("Beside the paper").locator("tbody tr")
    assert comparisons.count() == len(published) > 5
    assert published[0]["paper"] in comparisons.first.inner_text()
    assert tab.get_by_text("Every model", exact=True).is_hidden(), "it is folded"
    tab.get_by_text("Everything else").click()
    assert after("Every model").locator("tbody tr").count() == len(TRAINED)
    for number, (name, title) in enumerate(run_report._TITLES.items(), start=1):
        assert title.startswith(f"Table {number}")
        assert after(title).locator("tbody tr").count() == len(numbers["tables"][name])
    tab.get_by_text(f"All {len(numbers['comparisons'])} comparisons").click()
    every = tab.get_by_text("how it was chosen").locator("xpath=following::table[1]")
    assert every.locator("tbody tr").count() == len(numbers["comparisons"]) > 8
    drawn = tab.locator(".figures figure")
    assert drawn.count() == len(list((path.parent / "figures").glob("*.svg"))) == 10
    for figure in drawn.all():
        svg = figure.locator("svg")
        box = svg.bounding_box()
        assert svg.is_visible() and box["width"] > 300 and box["height"] > 60
        assert figure.locator("figcaption").is_visible()
        assert svg.locator("text").count() > 5


@needs_browser
@pytest.mark.parametrize("viewport", [WIDE, NARROW], ids=["wide", "narrow"])
def test_the_first_screen_has_a_tree_and_the_table_of_four(show, written, viewport, tmp_path):
    path, numbers, _ = written
    tab = show(path, viewport=viewport)
    tab.screenshot(path=tmp_path / f"opening-{viewport['width']}.png")
    lanes = tab.locator("#opening .lanes")
    table = tab.locator(".four table")
    assert 0 < lanes.bounding_box()["y"] < viewport["height"]
    assert tab.evaluate("opening.lanes.drawn") > 10
    assert table.locator("tbody tr").count() == len(TRAINED)
    assert table.evaluate("(e) => e.parentElement.scrollWidth - e.parentElement.clientWidth") <= 0
    if viewport is WIDE:
        for part in (table, tab.locator(".figures svg").first):
            box = part.bounding_box()
            assert box["y"] + box["height"] <= viewport["height"], "all on one screen"
    first = numbers["opening"]
    assert first["title"] in tab.inner_text("#opening-title")
    rows = table.locator("tbody tr").all_inner_texts()
    for label, row in first["rows"].items():
        (shown,) = (text for text in rows if text.startswith(label + "\t"))
        assert f"{100 * row['accuracy']:.1f}" in shown and f"{row['children']:.1f}" in shown


@needs_browser
def test_the_tree_of_the_first_screen_plays(show, written):
    """By itself unless the system asks for rest, by its button, and by keys alone."""
    tab = show(written[0], motion="no-preference")
    assert tab.evaluate("opening.clock.playing")
    assert not tab.evaluate("viewer.playing")
    still = show(written[0])
    assert not still.evaluate("opening.clock.playing")
    assert still.evaluate("opening.clock.time == opening.clock.steps")
    still.focus("#opening .play")
    still.keyboard.press("Enter")
    while still.evaluate("opening.clock.time == 0"):
        settle(still)
    assert still.evaluate("opening.clock.playing")
    still.keyboard.press("Enter")
    assert not still.evaluate("opening.clock.playing")
    still.focus("#opening input")
    still.keyboard.press("Home")
    assert still.evaluate("opening.clock.time") == 0
    still.click("#opening button:text-is('before RL')")
    pressed = "opening.buttons.map((button) => [button.textContent, button.ariaPressed])"
    assert still.evaluate(pressed) == [["after RL", "false"], ["before RL", "true"]]
    still.click("#opening .lanes canvas", position={"x": 80, "y": 82})  # The second row.
    assert still.evaluate("opening.lanes.thread_index") == still.evaluate(
        "opening.tree.rows[1]?.thread_index ?? 0"
    )


@needs_browser
def test_a_count_of_failures_leads_to_its_tree(show, written):
    path, numbers, held = written
    tab = show(path)
    counts = {
        (name, kind): count
        for name, row in numbers["main"].items()
        for kind, count in row["failures"].items()
        if count
    }
    assert len(counts) > 2
    for name, kind in counts:
        tab.click(f'a[href="{viewer.link(name, show=kind)}"]')
        settle(tab)
        problem = tab.evaluate("viewer.chooser.problem")
        wrong = [trace for trace in held[name] if trace["failure"] == kind]
        assert problem == wrong[0]["id"]
        assert tab.evaluate("viewer.panes[0].choice.value") == name
        assert kind in tab.inner_text("#panes .verdict >> nth=0")
        assert tab.inner_text(".facts >> nth=0").startswith(f"{wrong[0]['total_tokens']} tokens")
        slots = tab.locator("#panes .lanes >> nth=0").bounding_box()
        assert 0 <= slots["y"] < WIDE["height"], "it is in view"
        assert tab.evaluate("viewer.panes[0].lanes.drawn") > 0


def test_a_count_of_failures_says_how_many_are_shown(written):
    path, numbers, held = written
    text = path.read_text()
    fewer = 0
    for name, row in numbers["main"].items():
        for kind, count in row["failures"].items():
            some = sum(trace["failure"] == kind for trace in held[name])
            link = re.escape(viewer.link(name, show=kind).replace("&", "&amp;"))
            assert re.search(
                rf'<a href="{link}">{count} (?:(?!</td>).)*>{some} of {count} shown<', text
            )
            fewer += some < count
    assert fewer > 0
    assert f"the trees of {len(held['apr-rl'])} of {made_run.PROBLEMS} problems" in text


def test_a_count_without_an_example_leads_nowhere():
    row = {"label": "APR", "n": 9, "failures": {"join": 5, "message": 4}}
    template = run_report.TEMPLATES.get_template("failures.html")
    text = template.module.failures({"apr-rl": row}, {"apr-rl": [{"failure": "join"}]})
    assert "1 of 5 shown" in text and "0 of 4 shown" in text
    assert re.findall(r'href="([^"]*)"', text) == [
        viewer.link("apr-rl", show="join").replace("&", "&amp;")
    ]


def test_no_text_of_a_report_becomes_html():
    hostile = "<script>alert(1)</script>\"'&"
    row = {"label": hostile, "n": 9, "failures": {"join": 5}}
    template = run_report.TEMPLATES.get_template("failures.html")
    text = template.module.failures({hostile: row}, {hostile: [{"failure": "join"}]})
    assert "1 of 5 shown" in text and "<script" not in text
    assert html.unescape(re.search("<th>([^<]+)<", text)[1]) == hostile


def test_report_shows_the_trials_of_its_scale(written):
    """Without a link that dies with the file, and without the other scales."""
    text = written[0].read_text()
    (log,) = re.findall(r'<details class="log">.*?</details>', text, re.S)
    assert "at tiny: 2 entries" in log
    assert re.findall("<h3>(.*?)</h3>", log) == [
        "2026-11-26: tiny, wider and <em>worse</em>",
        "2026-11-24: the destiny of tiny",
    ]
    assert (
        "<strong>Twice as wide</strong>: <code>train.sft.lr=1e-3</code> gave"
        " &lt;b&gt;nothing&lt;/b&gt;" in log
    )
    assert (
        "Not of this one" not in text
        and "is in the project's docs/log.md and below, folded" in text
    )
    assert [
        to for to in re.findall(r'(?:href|src)="([^"]*)"', text) if not to.startswith("#")
    ] == []


def test_the_log_of_the_clone_has_entries_of_mini():
    log = run_report._LOG.read_text()
    shown = run_report.tried("mini")
    assert shown.count("<h3>") == len(re.findall(r"^## .*\bmini\b", log, re.M)) > 1
    assert run_report.tried("no such scale") == ""


def test_the_library_alone_has_no_log(monkeypatch, tmp_path):
    monkeypatch.setattr(run_report, "_LOG", tmp_path / "log.md")
    assert run_report.tried("mini") == ""


def test_every_figure_colour_has_a_dark_twin(run):
    """The twin stands out on the dark page."""
    results = read_run(run, run / "data")
    style = run_report.page("", "", {})
    cards = re.search(r"--card: light-dark\((#\w{6}), (#\w{6})\)", style).groups()
    drawn = [figure(results) for figure in (*figures.FIGURES, *controls.CONTROLS)]
    svgs = [
        charts.to_svg(one.figure, one.caption)
        for one in (*drawn, *controls.draw_training(run_report.training(run)))
    ]
    used = set()
    for svg in svgs:
        pairs = re.findall(r"light-dark\((#\w{6}), (#\w{6})\)", svg)
        assert len(re.findall(r"#[0-9a-f]{6}\b", svg)) == 2 * len(pairs), "a colour without a twin"
        used |= set(pairs)
    assert len(used) > 5
    assert set(charts.OF_KIND) == set(KINDS)
    for colour in {*charts.OF_KIND.values(), *(light for light, _ in used)} - {charts.ON_BAR}:
        for shade, card in zip((colour, charts._DARK[colour]), cards, strict=True):
            assert _contrast(shade, card) >= 3, (colour, shade)
    for colour in charts.OF_KIND.values():
        assert _contrast(charts.ON_BAR, colour) >= 4.5, colour
        assert _contrast(charts._DARK[charts.ON_BAR], charts._DARK[colour]) >= 4.5, colour


def _contrast(one, other):
    low, high = sorted(map(_luminance, (one, other)))
    return (high + 0.05) / (low + 0.05)


def _luminance(colour):
    channels = [int(colour[k : k + 2], 16) / 255 for k in (1, 3, 5)]
    linear = [c / 12.92 if c <= 0.04045 else ((c + 0.055) / 1.055) ** 2.4 for c in channels]
    return 0.2126 * linear[0] + 0.7152 * linear[1] + 0.0722 * linear[2]


def test_papers_panel_equates_no_serial_and_parallel_cost(run):
    """The paper prints too few tokens for an axis of cost: no point of one stands above one of the
    other.
    """
    drawn = figures.total_tokens(read_run(run, run / "data"))
    panels = [
        axes
        for axes in drawn.figure.axes
        if "T = " in axes.get_title(loc="left") and "paper" in axes.get_title(loc="left")
    ]
    assert len(panels) == len(made_run.EVALUATE.temperatures)
    for axes in panels:
        places = {}
        for line in axes.lines:
            if line.get_marker() in ("o", "s"):
                places.setdefault(line.get_color(), set()).update(line.get_xdata())
        serial = places[charts.SOS_PLUS]
        parallel = places[charts.APR]
        assert max(serial) + 1 < min(parallel)
        assert [label.get_text() for label in axes.get_xticklabels(minor=True)] == [
            "SoS+: n samples",
            "APR: its conditions in order",
        ]
    tagged = [{(text.get_text(), text.xy[1]) for text in axes.texts} for axes in panels]
    assert tagged[0] == set()
    assert tagged[1] == {
        ("24k", published_figures.PASS_AT_N[1.0][-1]),
        *(("20k", score) for score in published_figures.COMPARISONS["tokens"]),
    }
    assert "no axis of cost" in drawn.caption and "do not cost the same" in drawn.caption
