"""What stands in a figure is what was found and what the paper printed: every height, place and
interval.

Marks are found as a reader finds them, by the words at panels, ticks and legends and by the looks
that a legend explains, so that a figure may get more panels and more series.
"""

import dataclasses

import numpy as np
import pytest
from helpers import made_run
from matplotlib.collections import PolyCollection
from matplotlib.colors import same_color
from matplotlib.container import ErrorbarContainer

from apr_jax.data.statistics import wilson
from apr_jax.evaluate.cost import steps_on
from apr_jax.paper import controls, figures, published_figures
from apr_jax.paper.results import read_run
from apr_jax.paper.suite import BEAMS_1_TO_15
from apr_jax.text.sentence_piece import SentencePieceTokenizer

WIDE = f"{BEAMS_1_TO_15}/sft"
TRAINED = ("sos+/sft", "sos+/rl", WIDE, "apr/sft", "apr/rl")
OURS = "ours"
PAPER = "the paper"


@pytest.fixture(scope="module")
def results(config, tmp_path_factory):
    """A made run in which no two evaluations that stand side by side found the same of anything."""
    run = tmp_path_factory.mktemp("run")
    made_run.make_run(
        run, config, SentencePieceTokenizer.train(["0123456789+-*/,:;=>|!#"]), TRAINED
    )
    found = read_run(run, run / "data")
    for place, one in enumerate(found.answered.values()):
        trees = len(one.traces)
        for number, trace in enumerate(one.traces):
            trace |= {
                "correct": 7 * number % trees < 4 + 3 * place % (trees - 4),
                "total_tokens": 900 + 31 * place + 7 * number,
                "sequential_tokens": 200 + 13 * place + 5 * number,
                "max_thread_tokens": 5 + (11 * place + 17 * number) % 55,
                "children": place + number,
            }
        if one.latency:
            one.latency["seconds"] = {
                name: 0.2 + place / 10 + int(name[-1]) / 50 for name in one.latency["seconds"]
            }
    measures = [
        {"correct": number % 4 > 0, "max_thread_tokens": 9 + 3 * number} for number in range(16)
    ]
    return dataclasses.replace(found, oracle={"sos+": measures[:10], "apr": measures})


def panel(drawn, who, *words):
    """The axes of which title, labels, or the label of their row begin with who they belong to and
    hold the words.
    """
    found = []
    for axes in drawn.figure.axes:
        spec = axes.get_subplotspec()
        row = [
            other for other in drawn.figure.axes if other.get_subplotspec().rowspan == spec.rowspan
        ]
        said = [
            *(axes.get_title(loc=place) for place in ("left", "center", "right")),
            axes.get_xlabel(),
        ]
        said += [other.get_ylabel() for other in row if other.get_subplotspec().is_first_col()]
        if any(text.startswith(who) for text in said) and all(
            any(word in text for text in said) for word in words
        ):
            found.append(axes)
    (only,) = found
    return only


def bars(axes):
    """Name at the tick -> the bars there from left to right; a number stands at each."""
    ticks = zip(axes.get_xticks(), axes.get_xticklabels(), strict=True)
    names = {round(place): " ".join(label.get_text().split()) for place, label in ticks}
    found = {}
    for bar in sorted(axes.patches, key=lambda bar: bar.get_x()):
        found.setdefault(names[round(bar.get_x() + bar.get_width() / 2)], []).append(bar)
        height = bar.get_height()
        assert (f"{height:,.1f}" if height < 100 else f"{height:,.0f}") in {
            text.get_text() for text in axes.texts
        }
    return found


def assert_before_and_after(axes, expected):
    """Hollow before RL, full after it, in one colour."""
    found = bars(axes)
    for name, pair in expected.items():
        assert pair[0] != pair[1], name
        assert [bar.get_height() for bar in found[name]] == pytest.approx(pair), name
        assert [bar.get_facecolor()[3] for bar in found[name]] == [0, 1], name
        assert len({bar.get_edgecolor() for bar in found[name]}) == 1
    return found


def series(axes, label):
    """The line of that name, and the (low, high) at its points if it has intervals."""
    named = dict(zip(*reversed(axes.get_legend_handles_labels()), strict=True))
    if not isinstance(named[label], ErrorbarContainer):
        return named[label], []
    return named[label].lines[0], ends(named[label])


def ends(container):
    """(low, high) of error bars, one a point."""
    return [tuple(segment[:, 1]) for bar in container.lines[2] for segment in bar.get_segments()]


def alike(axes, line):
    """Places and heights of the only line that looks as one of the legend does."""
    found = [
        other
        for other in axes.lines
        if same_color(other.get_color(), line.get_color())
        and other.get_linestyle() == line.get_linestyle()
        and other.get_marker() == line.get_marker()
    ]
    (only,) = found
    return only.get_xdata(), only.get_ydata()


def assert_scores(axes, label, places, scores):
    """A line through these places and scores, with their intervals, and explained in the figure's
    legend.
    """
    line, intervals = series(axes, label)
    assert list(line.get_xdata()) == pytest.approx(places)
    assert list(line.get_ydata()) == pytest.approx([100 * score.mean for score in scores])
    np.testing.assert_allclose(
        intervals, [(100 * score.low, 100 * score.high) for score in scores], atol=1e-9
    )
    explained = [
        text.get_text()
        for other in axes.figure.axes
        if other.get_legend()
        for text in other.get_legend().texts
    ]
    assert label in explained
    return line


def assert_tags(axes, line, words):
    """A word beside each point of the line."""
    for x, y, word in zip(line.get_xdata(), line.get_ydata(), words, strict=True):
        assert [text.get_text() for text in axes.texts if text.xy == pytest.approx((x, y))] == [
            str(word)
        ]


def mean(one, measure):
    return sum(trace[measure] for trace in one.traces) / len(one.traces)


def accuracy(one):
    return 100 * mean(one, "correct")


def pairs(results, value, **decoding):
    """Method -> a value before and after RL."""
    return {
        name: [value(results.get(f"{method}/{stage}", **decoding)) for stage in ("sft", "rl")]
        for method, name in (("sos+", "SoS+"), ("apr", "APR"))
        if method == "apr" or not decoding
    }


def published(measure, *methods):
    names = {"sos+": "SoS+", "apr": "APR", "apr enforced": "APR, 10 children"}
    return {names[method]: published_figures.RL[measure][method] for method in methods}


def assert_wilson_on_bars(axes, found, expected):
    """The interval of each score stands on its bar."""
    tops = {}
    for container in axes.containers:
        if isinstance(container, ErrorbarContainer):
            (x,), (y,) = container.lines[0].get_data()
            tops[round(x, 6), round(y, 6)] = ends(container)
    for name, pair in expected.items():
        for bar, (right, n) in zip(found[name], pair, strict=True):
            top = round(bar.get_x() + bar.get_width() / 2, 6), round(bar.get_height(), 6)
            assert tops[top] == [pytest.approx([100 * end for end in wilson(right, n)])], name


def counted(one):
    return sum(trace["correct"] for trace in one.traces), len(one.traces)


@pytest.mark.parametrize("temperature", [0.5, 1.0])
def test_total_tokens(results, temperature):
    """Fig. 4a and 8."""
    drawn = figures.total_tokens(results)
    ours, theirs = (panel(drawn, who, f"T = {temperature:g}") for who in (OURS, PAPER))
    colours = set()
    for model, name in ((WIDE, "SoS+ with beams 1 to 15"), ("sos+/sft", "SoS+")):
        serial = results.get(model, temperature=temperature)
        spent = [tokens for *_, tokens in serial.by_n]
        assert len(set(spent)) == 3
        passed = assert_scores(ours, f"{name} pass@n", spent, [score for score, *_ in serial.by_n])
        agreed = assert_scores(
            ours, f"{name} cons@n", spent, [score for _, score, _ in serial.by_n]
        )
        assert list(passed.get_ydata()) != list(agreed.get_ydata())
        colours.add(passed.get_color())
    assert len(colours) == 2
    asked = [
        results.get("apr/sft", temperature=temperature, condition=n)
        for n in made_run.EVALUATE.children
    ]
    places = [mean(one, "total_tokens") for one in asked]
    apr = assert_scores(ours, "APR by child condition", places, [one.accuracy() for one in asked])
    assert_tags(ours, apr, made_run.EVALUATE.children)
    free = results.get("apr/sft", temperature=temperature)
    assert_scores(ours, "APR, nothing requested", [mean(free, "total_tokens")], [free.accuracy()])
    for line, scores in (
        (passed, published_figures.PASS_AT_N[temperature]),
        (agreed, published_figures.CONS_AT_N[temperature]),
        (apr, published_figures.APR_BY_CONDITION[temperature]),
    ):
        places, heights = alike(theirs, line)
        assert heights.tolist() == list(scores) and (np.diff(places) == 1).all()


def test_window(results):
    """Fig. 4b: an answer counts from the window on that its longest thread needs."""
    drawn = figures.window(results)
    ours, theirs = (panel(drawn, who) for who in (OURS, PAPER))
    assert ours.get_xlim() == (0, results.config.limits.window)
    bands = [
        set(map(tuple, each.get_paths()[0].vertices))
        for each in ours.collections
        if isinstance(each, PolyCollection)
    ]
    lines = {}
    names = ("SoS+", "SoS+ after RL", "SoS+ with beams 1 to 15", "APR", "APR after RL")
    for model, label in zip(TRAINED, names, strict=True):
        traces = results.get(model).traces
        lines[label], _ = series(ours, label)
        x, y = lines[label].get_data()
        assert (x[0], x[-1]) == (0, results.config.limits.window)
        hits = [
            sum(trace["correct"] and trace["max_thread_tokens"] <= limit for trace in traces)
            for limit in x
        ]
        assert hits[0] == 0 and len(set(hits)) > 3, label
        np.testing.assert_allclose(y, [100 * hit / len(traces) for hit in hits])
        edges = {
            (limit, 100 * end)
            for limit, hit in zip(x, hits, strict=True)
            for end in wilson(hit, len(traces))
        }
        assert any(edges <= band for band in bands), label
    for method, label in (("sos+", "SoS+ demonstrations"), ("apr", "APR demonstrations")):
        line, _ = series(ours, label)
        needed = sorted(
            trace["max_thread_tokens"] for trace in results.oracle[method] if trace["correct"]
        )
        assert list(line.get_xdata()) == needed
        steps = 100 * np.arange(1, len(needed) + 1) / len(results.oracle[method])
        np.testing.assert_allclose(line.get_ydata(), steps)
    assert {text.get_text() for text in ours.get_legend().texts} >= {
        *lines,
        "SoS+ demonstrations",
        "APR demonstrations",
    }
    found = bars(theirs)
    for model, label in (("sos+/rl", "SoS+ after RL"), ("apr/rl", "APR after RL")):
        (bar,) = found[label]
        assert bar.get_height() == published_figures.AT_WINDOW[model]
        assert same_color(bar.get_facecolor(), lines[label].get_color())
        assert (
            lines[label].get_linestyle() != lines[label.removesuffix(" after RL")].get_linestyle()
        )


def test_before_and_after_rl(results):
    """Fig. 5."""
    drawn = figures.before_and_after(results)
    top = panel(drawn, OURS, "accuracy (%)")
    found = assert_before_and_after(top, pairs(results, accuracy))
    assert_wilson_on_bars(top, found, pairs(results, counted))
    for title, measure in (("total tokens", "total_tokens"), ("child threads", "children")):
        expected = pairs(results, lambda one, measure=measure: mean(one, measure))
        if measure == "children":
            assert "SoS+" not in bars(panel(drawn, OURS, title)), "which has none"
            expected.pop("SoS+")
        assert_before_and_after(panel(drawn, OURS, title), expected)

    def a_sequence(one):
        return sum(trace["total_tokens"] for trace in one.traces) / sum(
            len(trace["threads"]) for trace in one.traces
        )

    assert_before_and_after(panel(drawn, OURS, "tokens a sequence"), pairs(results, a_sequence))
    for title, measure, *methods in (
        ("accuracy (%)", "accuracy", "sos+", "apr"),
        ("total tokens", "total_tokens", "sos+", "apr"),
        ("tokens a sequence", "thread_tokens", "apr"),
        ("child threads", "children", "apr"),
    ):
        theirs = assert_before_and_after(panel(drawn, PAPER, title), published(measure, *methods))
        assert len(theirs) == len(methods)
        assert theirs["APR"][0].get_edgecolor() == found["APR"][0].get_edgecolor()


@pytest.mark.parametrize(
    ("xlabel", "cost", "ends_of"),
    [
        ("sequential tokens", lambda one: mean(one, "sequential_tokens"), "tokens"),
        (
            "seconds of one problem",
            lambda one: np.mean(list(one.latency["seconds"].values())),
            "seconds",
        ),
    ],
    ids=["tokens", "seconds"],
)
def test_latency(results, xlabel, cost, ends_of):
    """Fig. 6; of the paper's places the first and last are printed."""
    drawn = figures.latency(results)
    ours, theirs = (panel(drawn, who, xlabel) for who in (OURS, PAPER))
    legend = next(axes for axes in drawn.figure.axes if axes.get_legend())
    for method, name, numbers in (
        ("sos+", "SoS+", made_run.EVALUATE.bins),
        ("apr", "APR", made_run.EVALUATE.children),
    ):
        asked = [results.get(f"{method}/sft", condition=number) for number in numbers]
        places = [cost(one) for one in asked]
        line = assert_scores(
            ours, f"{name} by condition", places, [one.accuracy() for one in asked]
        )
        assert_tags(ours, line, numbers)
        free = results.get(f"{method}/sft")
        star = assert_scores(ours, f"{name}, nothing requested", [cost(free)], [free.accuracy()])
        assert star.get_marker() != line.get_marker() and same_color(
            star.get_color(), line.get_color()
        )
        places, heights = alike(theirs, series(legend, f"{name} by condition")[0])
        curve = published_figures.LATENCY[method]
        assert tuple(heights) == curve.accuracy
        assert (places[0], places[-1]) == getattr(curve, ends_of) and (np.diff(places) > 0).all()
    wide = results.get(WIDE)
    assert (
        assert_scores(ours, "SoS+ with beams 1 to 15", [cost(wide)], [wide.accuracy()]).get_marker()
        == star.get_marker()
    )


def test_child_count_enforced(results):
    """Fig. 7."""
    drawn = figures.enforced(results)
    (count,) = made_run.EVALUATE.forced
    for title, value, measure in (
        ("accuracy (%)", accuracy, "accuracy"),
        ("total tokens", lambda one: mean(one, "total_tokens"), "total_tokens"),
    ):

        def of_both(value):
            held = pairs(results, value, forced=count)["APR"]
            return pairs(results, value) | {f"APR, {count} children": held}

        ours, theirs = (panel(drawn, who, title) for who in (OURS, PAPER))
        found = assert_before_and_after(ours, of_both(value))
        if measure == "accuracy":
            assert_wilson_on_bars(ours, found, of_both(counted))
        expected = published(measure, "sos+", "apr", "apr enforced")
        assert bars(theirs).keys() == expected.keys()
        assert_before_and_after(theirs, expected)


def test_slots(results):
    """The cost model beside what was measured: on so many decode slots at every step, and with as
    many as a step needs.
    """
    drawn = controls.slots(results)
    fewer, spent = (panel(drawn, who) for who in ("fewer steps", "milliseconds"))
    one = results.get("apr/rl")
    rows = one.slots["rows"]
    two = one.traces[:2]
    assert one.slots["problems"] == [trace["id"] for trace in two]
    slots = [row["slots"] for row in rows]
    measured, _ = series(fewer, "steps, as decoded")
    assert (list(measured.get_xdata()), list(measured.get_ydata())) == (slots, [1, 2, 4])
    measured, _ = series(spent, "measured")
    assert list(measured.get_ydata()) == pytest.approx([1e3 * row["seconds"] for row in rows])
    tokens = [
        sum(trace[measure] for trace in two) for measure in ("total_tokens", "sequential_tokens")
    ]
    modelled, _ = series(spent, "model: steps x measured seconds of a step")
    # On one decode slot every token takes a step; the made-up step takes 10 ms a decode slot.
    steps = [sum(steps_on(trace, slots) for trace in two) / 2 for slots in range(1, 5)]
    assert steps[0] == sum(thread["tokens"] for trace in two for thread in trace["threads"]) / 2
    assert list(modelled.get_ydata()) == pytest.approx(
        [10 * n * count for n, count in enumerate(steps, start=1)]
    )
    same, _ = series(spent, "if a step took the same on any number")
    assert list(same.get_ydata()) == pytest.approx([10 * count for count in steps])
    bound, _ = series(fewer, f"total / sequential tokens: {tokens[0] / tokens[1]:.2f}")
    assert set(bound.get_ydata()) == {tokens[0] / tokens[1]}
    own, _ = series(spent, "measured, a step as wide as it needs")
    assert own.get_ydata() == pytest.approx(
        2 * [500 * (one.latency["seconds"]["t-0"] + one.latency["seconds"]["t-1"])]
    )
