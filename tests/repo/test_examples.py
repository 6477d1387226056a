"""The examples run as they stand, and print trees."""

import dataclasses
import re
import runpy
from pathlib import Path

import jax
import numpy as np
import pytest
from helpers import foreign

from apr_jax.model.config import ModelConfig
from apr_jax.text.tokenizer import END_SPAWN
from apr_jax.train.checkpoint import export_folder, import_folder

EXAMPLES = {path.stem: path for path in (Path(__file__).parents[2] / "examples").glob("*.py")}


@pytest.mark.thorough
@pytest.mark.parametrize("name", ["own_model", "scripted_policy"])
def test_an_example_prints_a_tree(name, capsys):
    runpy.run_path(str(EXAMPLES[name]), run_name="__main__")
    _has_a_tree(capsys.readouterr().out)


def _has_a_tree(said):
    assert "root" in said and "└ 1" in said and "┳" in said and "┻" in said


@pytest.mark.slow
def test_rl_teaches_an_imitating_transformer_to_spawn(capsys):
    """From random weights RL does not teach it.

    The example, with fewer steps from random weights: what imitation leaves to chance becomes
    certain. Halfway, right answers still go up and down between 0.7 and 0.9.
    """
    runpy.run_path(str(EXAMPLES["learn_to_spawn"]))["main"](imitate=350, steps=81, scratch=21)
    said = capsys.readouterr().out
    taught, scratch = said.split("RL from random weights")
    _has_a_tree(taught)
    rows = [
        [
            (float(right), float(children))
            for right, children in re.findall(r"right ([\d.]+), .* ([\d.]+)", part)
        ]
        for part in (taught, scratch)
    ]
    (before, asked), *_, (after, asks) = rows[0]
    assert before < 0.6 and asked < 0.6 and after > 0.85 and asks > 0.95
    assert rows[1][-1][1] < 0.3, (
        "random policies that spawn are right less often, so they give it up"
    )


@pytest.mark.thorough
def test_transformers_decodes_a_thread_of_an_exported_model(tmp_path, capsys, monkeypatch):
    pytest.importorskip("torch")
    pytest.importorskip("transformers")
    sizes = {"layers": 1, "width": 16, "heads": 2, "kv_heads": 1, "head_size": 8, "mlp": 16}
    model = import_folder(foreign.write_folder(tmp_path / "in", ModelConfig(**sizes, tied=False)))
    # It writes </spawn> whatever it reads: no layer adds anything, and one column of the head is 1.
    params = jax.tree.map(np.zeros_like, model.params)
    params["embed"] += 1
    params["final_norm"] += 1
    params["unembed"][:, END_SPAWN] = 1
    export_folder(dataclasses.replace(model, params=params), tmp_path / "out")
    arguments = [
        str(EXAMPLES["decode_with_transformers"]),
        str(tmp_path / "out"),
        "12 + <eos>3\x1b",
    ]
    monkeypatch.setattr("sys.argv", arguments)
    runpy.run_path(arguments[0], run_name="__main__")
    assert capsys.readouterr().out == "<bos>12 + <eos>3\\x1b</spawn>\n"


def test_own_model_is_short():
    code = [
        line
        for line in EXAMPLES["own_model"].read_text().split('"""', 2)[2].splitlines()
        if line.strip()
    ]
    assert len(code) < 60


def test_the_script_says_what_is_printed(capsys):
    runpy.run_path(str(EXAMPLES["scripted_policy"]), run_name="__main__")
    root, first, second = capsys.readouterr().out.splitlines()
    assert root.endswith(
        "<bos> 0 <spawn> <msg> 5 <msg> 9 </spawn> <joined> <msg> 0 <msg> 0 </joined> <join> 7 <eos>"
    )
    # Both children start when the spawn block is closed; the root goes on when the longer one has
    # ended.
    assert first.index("━") == second.index("━") == root.index("┳") + 1
    assert root.index("┻") == second.index("╸") > first.index("╸")
