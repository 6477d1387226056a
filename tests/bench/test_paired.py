"""Ratios are those of neighbouring repeats, and every contestant warms up once."""

import json
import time

from apr_jax.bench import peers
from apr_jax.bench.paired import Contestant, measure, show, write


def test_ratio_is_ours_to_the_others(capsys, tmp_path):
    calls = []

    def contestant(name, seconds):
        def run():
            calls.append(name)
            time.sleep(seconds)
            return 10.0

        return Contestant(name, run, "tokens")

    result = measure("sleep", [contestant("ours", 0.01), contestant("theirs", 0.04)], repeats=5)
    assert calls == ["ours", "theirs"] * 6
    assert 2 < result.ratios[0] < 8  # 4, on a machine that may be busy.
    assert result.medians[0] > result.medians[1]
    show(result)
    assert "theirs" in capsys.readouterr().out
    write([result], tmp_path / "figures.json")
    assert json.loads((tmp_path / "figures.json").read_text())[0]["unit"] == "tokens/s"


def test_missing_engines_are_named_with_the_pip_command(monkeypatch, capsys):
    monkeypatch.setattr(peers.importlib.util, "find_spec", lambda name: None)
    assert peers.installed(["transformers", "vllm"]) == []
    assert (
        capsys.readouterr().err
        == "without transformers, vllm: pip install 'apr_jax[bench]' brings them\n"
    )
