"""The page holds what the traces say, loads nothing, and no text of a model can break out of it."""

import html.parser
import json
import re
import shutil

import pytest
from helpers.puzzles import read_problems

from apr_jax.config import to_dict
from apr_jax.errors import UserError
from apr_jax.evaluate.folder import read_traces
from apr_jax.evaluate.runner import evaluate
from apr_jax.paper.pipeline import show_results
from apr_jax.paper.run_report import training, write_run_report
from apr_jax.report.viewer import select, write_tree_page
from apr_jax.train.checkpoint import load_checkpoint

HOSTILE = "</script><script>alert(1)</script><!-- <img src=x onerror=alert(2)> & \u2028 \"'"

SILENT = {"<pad>", "<bos>", "<eos>", "<unk>"}  # Not part of a text.


class Page(html.parser.HTMLParser):
    """Elements of a page, and the text of its scripts."""

    def __init__(self, text):
        super().__init__()
        self.tags = []
        self.links = []
        self.scripts = []
        self.feed(text)

    def handle_starttag(self, tag, attributes):
        self.tags.append(tag)
        self.links += [
            value
            for name, value in attributes
            if name in ("src", "href") and not value.startswith("#")
        ]
        if tag == "script":
            self.scripts.append("")

    def handle_data(self, data):
        if self.tags and self.lasttag == "script" and self.scripts:
            self.scripts[-1] += data


def embedded(text):
    return json.loads(
        re.search(r'<script[^>]*type="application/json"[^>]*>(.*?)</script>', text, re.S)[1]
    )


@pytest.fixture(scope="module")
def run(checkpoint, data_dir, tmp_path_factory):
    folder = tmp_path_factory.mktemp("report")
    restored = load_checkpoint(checkpoint)
    evaluate(
        restored,
        read_problems(data_dir / "test.jsonl"),
        folder / "eval" / "apr-sft",
        progress=False,
    )
    (folder / "config.json").write_text(json.dumps(to_dict(restored.config)))
    return folder


def test_report_of_a_run(run, data_dir):
    numbers = write_run_report(run, data_dir, run)
    text = (run / "report.html").read_text()
    page = Page(text)
    assert page.links == []
    assert set(re.findall(r"https?://([^/\"]*)", text)) <= {
        "www.w3.org",
        "purl.org",
        "creativecommons.org",
    }, "names of schemas"
    traces = read_traces(run / "eval" / "apr-sft" / "traces.jsonl")
    (shown,) = embedded(text)["evaluations"]
    assert shown["name"] == "apr-sft" and [trace["id"] for trace in shown["traces"]] == [
        trace["id"] for trace in traces
    ]
    for trace, line in zip(shown["traces"], traces, strict=True):
        pieces = [
            [shown["pieces"][str(token)] for token in thread["ids"]] for thread in trace["threads"]
        ]
        assert ["".join(piece for piece in thread if piece not in SILENT) for thread in pieces] == [
            thread["text"] for thread in line["threads"]
        ]
        assert trace["correct"] is line["correct"] and (trace["failure"] == "") is line["correct"]
    assert (
        page.tags.count("figcaption") == len(list((run / "figures").glob("*.png"))) > 1
        and "table" in page.tags
    )
    assert (
        numbers["main"]["apr-sft"]["n"] == len(traces) == numbers["oracle"]["apr"]["accuracy"]["n"]
    )
    assert re.search(rf">APR<br><span[^>]*>{numbers['main']['apr-sft']['step']} steps<", text), (
        "Table 3"
    )
    assert (
        "SoS+: there is no trained model (sos+/sft)" in numbers["missing"]
        and "there is no trained model" in text
    )


def test_finished_run_shows_results_with_warnings(run, data_dir, tmp_path, capsys):
    """Whoever starts a finished run again did not see the evaluation say them."""
    numbers = write_run_report(run, data_dir, run)
    said = [
        "APR: NO TREE SPAWNED A SINGLE CHILD [so to say]",
        "SoS+: 60% OF THE TREES WERE TRUNCATED",
    ]
    shutil.copytree(run / "eval", tmp_path / "eval")
    shutil.copy(run / "config.json", tmp_path)
    (tmp_path / "results.json").write_text(
        json.dumps(numbers | {"seconds": {"data": 60}, "warnings": said})
    )
    show_results(tmp_path)
    shown = capsys.readouterr()
    assert shown.err.splitlines() == [f"warning: {line}" for line in said]
    assert "1.0 minutes" in shown.out
    first = numbers["opening"]
    assert f"{first['title']}  before RL\n" in shown.out and "\nroot " in shown.out
    assert re.search(r"^thread tree \(APR\) +\d", shown.out, re.M)
    (tmp_path / "results.json").write_text(json.dumps(numbers | {"seconds": {}, "warnings": []}))
    show_results(tmp_path)
    assert capsys.readouterr().err == ""


def test_results_of_an_earlier_version_are_named(run, tmp_path):
    shutil.copy(run / "config.json", tmp_path)
    (tmp_path / "results.json").write_text(json.dumps({"main": {}}))
    with pytest.raises(UserError, match=r"earlier version wrote it; `apr report .*` draws it anew"):
        show_results(tmp_path)


def test_no_text_breaks_out_of_the_page(run, tmp_path):
    trace, *_ = read_traces(run / "eval" / "apr-sft" / "traces.jsonl")
    plain = tmp_path / "plain.html"
    attacked = tmp_path / "attacked.html"
    write_tree_page(trace, "apr", plain)
    trace["pieces"] = dict.fromkeys(trace["pieces"], HOSTILE)
    trace |= dict.fromkeys(("id", "problem", "stated", "reason"), HOSTILE)
    write_tree_page(trace, HOSTILE, attacked)
    assert Page(attacked.read_text()).tags == Page(plain.read_text()).tags
    (shown,) = embedded(attacked.read_text())["evaluations"]
    assert shown["name"] == shown["traces"][0]["id"] == HOSTILE and set(
        shown["pieces"].values()
    ) == {HOSTILE}


def test_every_kind_of_failure_has_examples(run):
    """The page stays small all the same."""
    line, *_ = read_traces(run / "eval" / "apr-sft" / "traces.jsonl")
    kinds = [("",), ("arithmetic", "message", "no answer")]
    left, right = (
        [
            line
            | {
                "id": f"{place}",
                "failure": kinds[bad][place % len(kinds[bad])],
                "correct": not bad,
            }
            for place, bad in enumerate(wrong)
        ]
        for wrong in ([0] * 80 + [1] * 90, [1] * 100 + [0] * 70)
    )
    shown = select(
        {"apr-rl": left, "sos+-rl": right, "copy": [trace | {"sample": 1} for trace in left]}
    )
    assert [trace["id"] for trace in shown["apr-rl"]] == [trace["id"] for trace in shown["sos+-rl"]]
    assert shown["copy"] == []
    for name in ("apr-rl", "sos+-rl"):
        for kind in kinds[1]:
            assert sum(trace["failure"] == kind for trace in shown[name]) >= 8, (name, kind)
    assert sum(trace["correct"] for trace in shown["apr-rl"]) >= 8
    assert len(shown["apr-rl"]) < 80
    large = line | {"threads": [thread | {"lengths": [50_000]} for thread in line["threads"]]}
    shown = select({"a": [large | {"id": str(place)} for place in range(100)]})
    assert 1 <= len(shown["a"]) <= 12


def test_a_run_without_evaluations_is_named(tmp_path):
    with pytest.raises(UserError, match=r"has no config.json; run `apr reproduce"):
        write_run_report(tmp_path, tmp_path, tmp_path)


@pytest.mark.parametrize(
    ("text", "message"),
    [
        ('{"name": "ti', "config.json: is damaged; delete it"),
        (
            '{"name": "tiny", "lerning": 3}',
            "config.json: config .*: (Field required|Unexpected keyword)",
        ),
    ],
)
def test_a_damaged_config_is_named(tmp_path, text, message):
    (tmp_path / "config.json").write_text(text)
    with pytest.raises(UserError, match=message):
        write_run_report(tmp_path, tmp_path, tmp_path)


def test_what_a_killed_training_left_unfinished_is_not_drawn(tmp_path):
    for method, text in {
        "apr": '{"step": 1}\n{"step": 2}\n{"step": 3, "lo',
        "sos+": '{"st',
    }.items():
        (tmp_path / method / "sft").mkdir(parents=True)
        (tmp_path / method / "sft" / "metrics.jsonl").write_text(text)
    assert training(tmp_path) == {"sft": {"apr": [{"step": 1}, {"step": 2}]}}
    (tmp_path / "apr" / "sft" / "metrics.jsonl").write_text('{"step": 1}\n{"step"\n{"step": 3}\n')
    with pytest.raises(UserError, match=r"apr/sft/metrics.jsonl, line 2: is not JSON"):
        training(tmp_path)


def test_a_damaged_line_is_named(run, tmp_path):
    path = tmp_path / "traces.jsonl"
    path.write_text((run / "eval" / "apr-sft" / "traces.jsonl").read_text().replace("}\n", "\n", 2))
    with pytest.raises(UserError, match=r"traces.jsonl, line 1: is not JSON"):
        read_traces(path)
