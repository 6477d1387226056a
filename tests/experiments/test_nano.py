"""What the docs say of scale nano is what `make demo` and `apr ablation early` found."""

import json
import re
from pathlib import Path

ROOT = Path(__file__).parents[2]
FOLDER = ROOT / "experiments" / "nano"
RESULTS = ROOT / "docs" / "results.md"


def test_the_page_has_the_results_of_the_demo():
    results = json.loads((FOLDER / "results.json").read_text())
    sentence = re.search(r"\*\*Scale nano\*\*.*?(?:\n\n|\Z)", RESULTS.read_text(), re.S)[0].replace(
        "\n", " "
    )
    shares = [
        f"{100 * results['main'][name]['accuracy']:.1f}%"
        for name in ("sos+-sft", "sos+-rl", "apr-sft", "apr-rl")
    ]
    assert "SoS+ {} and {} after RL, APR {} and {}.".format(*shares) in sentence
    comparison = next(
        row
        for row in results["comparisons"]
        if row["comparison"].startswith("same total tokens: APR after RL, ")
    )
    votes = comparison["comparison"].partition("SoS+ after RL cons@")[2]
    told = (
        f"votes over {votes} samples does as well as APR at equal total tokens ({{}}% against {{}}%"
        " at temperature 1)"
    )
    assert told.format(*(f"{100 * comparison[side]:.1f}" for side in ("other", "one"))) in sentence
    assert comparison["low"] < 0 < comparison["high"]


def test_the_page_has_the_results_of_the_study_of_an_early_model():
    found = json.loads((FOLDER / "early.json").read_text())
    page, rows = (ROOT / "docs" / "objective.md").read_text(), found["rows"]
    named = {"supervised": "seed 0, T = 1"}
    named |= {f"RL, seed {seed}": f"seed {seed}, after RL, T = 1" for seed in range(3)}
    priced = {
        f"RL with a price of 5e-4 a token, seed {seed}": f"price, seed {seed}, after RL, T = 1"
        for seed in range(3)
    }
    for name, label in (named | priced).items():
        row, greedy = (
            rows[label],
            rows["seed 0, supervised" if name == "supervised" else label.removesuffix(", T = 1")],
        )
        spent = (
            f"{row['children']:.1f} | {row['total_tokens']:,.0f} | {row['sequential_tokens']:,.0f}"
        )
        assert (
            f"| {name} | {_percent(row)} | {spent} | {100 * greedy['accuracy']:.1f}% |" in page
        ), name
    for gap in found["gaps"]:
        what = "the price's" if gap["one"].startswith("price") else "RL's"
        cells = (
            _gap(gap["accuracy"], 100, 1),
            _gap(gap["total_tokens"], 1, 0),
            _gap(gap["children"], 1, 1),
        )
        assert (
            f"| {re.search('seed .', gap['one'])[0]}: {what} effect | {' | '.join(cells)} |" in page
        )
        assert what == "the price's" or gap["accuracy"][0] > 0.1, "RL gains at least ten points"
    sentence = "40% to 52, 51 and 53% of sampled answers on three seeds"
    assert sentence in RESULTS.read_text().replace("\n", " ")
    told = [round(100 * rows[label]["accuracy"]) for label in named.values()]
    assert told == [int(number) for number in re.findall(r"\d+", sentence)]


def _percent(row):
    return "{:.1f}% ({:.1f} to {:.1f})".format(
        *(100 * value for value in (row["accuracy"], *row["ci95"]))
    )


def _gap(values, scale, digits):
    return "{:+.{n}f} ({:.{n}f} to {:.{n}f})".format(*(scale * value for value in values), n=digits)
