"""The XManager launcher: sweeps as work units, real local processes, and what a cluster would be sent."""

import json
import os
import signal
import subprocess
import sys
import time
import urllib.error
import urllib.request
from pathlib import Path

import pytest

from apr_jax.config import to_dict
from apr_jax.errors import UsageError
from apr_jax.learn.checkpoint import load_checkpoint

ROOT = Path(__file__).parents[2]
sys.path.insert(0, str(ROOT / "experiments"))
import launch

from launcher.sweep import work_units

NANO = "experiments/nano.py"


def test_without_a_sweep_there_is_one_unit():
    (unit,) = work_units("runs/x", ["seed=1"], [])
    assert (unit.settings, unit.out, unit.data) == (("seed=1",), "runs/x", None)


def test_a_sweep_is_the_product_and_each_has_its_folder():
    units = work_units("runs/x", ["seed=1"], ["learn.sft.optimizer.lr=1e-4,3e-4", "learn.sft.rows=8, 16"])
    assert [unit.settings for unit in units] == [
        ("seed=1", f"learn.sft.optimizer.lr={lr}", f"learn.sft.rows={rows}")
        for lr in ("1e-4", "3e-4")
        for rows in ("8", "16")
    ]
    assert units[1].out == "runs/x/learn.sft.optimizer.lr_1e-4__learn.sft.rows_16"
    assert len({unit.out for unit in units}) == 4
    assert {unit.data for unit in units} == {"runs/x/data"}, "the data don't differ: they are built once"


def test_units_whose_data_differ_share_none():
    assert {unit.data for unit in work_units("x", [], ["task.numbers=3,4"])} == {None}


@pytest.mark.parametrize(
    ("sweeps", "told"),
    [
        (["seed"], "write it as FIELD=VALUE,VALUE"),
        (["seed=1,,2"], "write it as FIELD=VALUE,VALUE"),
        (["seed=1,1"], "has 1 twice"),
        (["seed=1", "seed=2"], "--sweep seed: is given twice"),
        (["name=a/b"], "'a/b' can't be part of a folder's name"),
    ],
)
def test_a_sweep_that_cannot_be(sweeps, told):
    with pytest.raises(UsageError, match=told):
        work_units("x", [], sweeps)


pytest.importorskip("xmanager")
CLOUD = ["--out", "gs://bucket/run", "--image", "registry/apr:1"]


@pytest.fixture
def specs(monkeypatch, capfd):
    """What --dry-run prints, a JSON object a unit."""
    monkeypatch.chdir(ROOT)

    def call(*words):
        status = launch.main([*map(str, words), "--dry-run"])
        text, errors = capfd.readouterr()
        assert status == 0, errors
        decoder, found = json.JSONDecoder(), []
        while text := text.lstrip():
            spec, end = decoder.raw_decode(text)
            found.append(spec)
            text = text[end:]
        return found

    return call


@pytest.mark.parametrize(
    ("words", "told"),
    [
        (["--config", "nowhere.py", "--out", "x"], "nowhere.py: no such file"),
        (["--config", NANO, "--out", "x", "--sweep", "learn.stf.steps=1,2"], "did you mean 'learn.sft.steps'"),
        (["--config", NANO, "--out", "x", "--image", "i"], "--image and --require are of --executor gke and vertex"),
        (["--config", NANO, "--out", "x", "--executor", "gke"], "--out x: a cloud's machines go; must be gs://"),
        (["--config", NANO, "--out", "gs://b/x", "--executor", "gke"], "--executor gke: give --image"),
        (["--config", NANO, *CLOUD, "--executor", "gke", "--require", "v5e=4x4"], "write it like tpu_v5e=4x4"),
        (["--config", NANO, *CLOUD, "--executor", "gke", "--require", "tpu_v3=4x4"], "GKE has no such slices"),
        (["--config", NANO, *CLOUD, "--executor", "gke", "--require", "tpu_v5e=4"], "give its topology"),
        (["--config", NANO, *CLOUD, "--executor", "vertex", "--require", "tpu_v5e=4x4"], "no machine of Vertex AI"),
    ],
)
def test_wrong_use_is_one_line(words, told, monkeypatch, capfd):
    monkeypatch.chdir(ROOT)
    assert launch.main([*words, "--dry-run"]) == 2
    said, errors = capfd.readouterr()
    (line,) = errors.splitlines()
    assert told in line and said == ""


def test_a_local_spec_is_a_command_of_this_python(specs, tmp_path):
    first, second = specs("--config", NANO, "--out", tmp_path, "--set", "seed=3", "--sweep", "learn.sft.steps=1,2")
    assert first["command"][:4] == [sys.executable, "-m", "apr_jax", "reproduce"]
    assert first["command"][-4:] == ["--set", "seed=3", "--set", "learn.sft.steps=1"]
    assert second["command"][second["command"].index("--out") + 1] == str(tmp_path / "learn.sft.steps_2")


@pytest.mark.parametrize(
    ("required", "accelerator", "hosts", "chips"),
    [
        ("tpu_v5e=2x4", "tpu-v5-lite-podslice", 1, 8),
        ("tpu_v5e=4x4", "tpu-v5-lite-podslice", 4, 4),
        ("tpu_v4=2x2x4", "tpu-v4-podslice", 4, 4),
        ("tpu_v5p=2x2x1", "tpu-v5p-slice", 1, 4),
        ("tpu_v6e=16x16", "tpu-v6e-slice", 64, 4),
    ],
)
def test_the_job_for_gke_asks_for_the_whole_slice(specs, required, accelerator, hosts, chips):
    (job,) = specs("--config", NANO, *CLOUD, "--executor", "gke", "--require", required, "--require", "ram=64")
    validate = pytest.importorskip("kubernetes_validate")
    validate.validate({"apiVersion": "batch/v1", "kind": "Job", **job}, "1.32", strict=True)
    assert (job["spec"]["parallelism"], job["spec"]["completions"]) == (hosts, hosts)
    assert job["spec"]["completionMode"] == "Indexed"
    pod = job["spec"]["template"]["spec"]
    assert pod["nodeSelector"] == {
        "cloud.google.com/gke-tpu-accelerator": accelerator,
        "cloud.google.com/gke-tpu-topology": required.partition("=")[2],
    }
    assert pod["subdomain"] == "experiments" and "hostname" not in pod, "GKE tells the pods apart by their index"
    (container,) = pod["containers"]
    assert container["resources"]["limits"] == {"google.com/tpu": str(chips), "memory": str(64 * 2**30)}
    assert container["image"] == "registry/apr:1"
    assert container["args"] == ["reproduce", "--config", NANO, "--out", "gs://bucket/run"]
    assert {"name": "JAX_COORDINATOR_ADDRESS", "value": "auto"} in container["env"]


def test_a_sweep_on_gke_is_a_job_a_unit(specs):
    jobs = specs("--config", NANO, *CLOUD, "--executor", "gke", "--require", "tpu_v5e=2x4", "--sweep", "seed=0,1,2")
    outs = [job["spec"]["template"]["spec"]["containers"][0]["args"][4] for job in jobs]
    assert outs == [f"gs://bucket/run/seed_{seed}" for seed in range(3)]


def test_the_spec_for_vertex_is_what_xmanager_submits(specs, monkeypatch):
    from xmanager.cloud import auth, vertex

    words = ["--config", NANO, *CLOUD, "--executor", "vertex", "--require", "tpu_v3=2x2", "--set", "seed=5"]
    (printed,) = specs(*words)
    submitted = {}

    class CustomJob:
        resource_name = "job"

        def __init__(self, **spec):
            submitted.update(spec)

        def submit(self, **kwargs):
            del kwargs

        def _dashboard_uri(self):
            return ""

    monkeypatch.setattr(vertex.aiplatform, "CustomJob", CustomJob)
    monkeypatch.setattr(auth, "get_bucket", lambda: "bucket")
    monkeypatch.setattr(auth, "get_service_account", lambda: "account")
    flags = launch.parse(words)
    (unit,) = launch.units_of(flags)
    vertex.Client("project").launch("name", [launch.job_of(flags, unit, "nano")])
    (pool,) = submitted["worker_pool_specs"]
    assert list(pool.container_spec.args) == printed["args"]
    assert pool.container_spec.image_uri == printed["image_uri"]
    assert pool.machine_spec.machine_type == printed["machine_spec"]["machine_type"] == "cloud-tpu"
    assert pool.machine_spec.accelerator_count == printed["machine_spec"]["accelerator_count"] == 4


def test_without_a_cluster_the_remedy_is_one_line(monkeypatch, tmp_path, capfd):
    monkeypatch.chdir(ROOT)
    monkeypatch.setenv("HOME", str(tmp_path))
    monkeypatch.setattr("kubernetes.config.kube_config.KUBE_CONFIG_DEFAULT_LOCATION", str(tmp_path / "none"))
    words = ["--config", NANO, *CLOUD, "--executor", "gke", "--require", "tpu_v5e=2x4"]
    assert launch.main(words) == 1
    errors = capfd.readouterr().err
    assert "no cluster: gcloud container clusters get-credentials CLUSTER" in errors and "Traceback" not in errors


@pytest.fixture
def tiny(config, tmp_path):
    path = tmp_path / "tiny.py"
    path.write_text(
        f"from apr_jax.config import from_dict\n\n\ndef experiment():\n    return from_dict({to_dict(config)!r})\n"
    )
    return path


@pytest.mark.slow
def test_a_local_sweep_runs_beside_tensorboard(tiny, tmp_path):
    """Two real runs one after the other on shared data; TensorBoard answers meanwhile, and goes when told to."""
    words = ["--config", tiny, "--out", tmp_path / "out", "--sweep", "learn.sft.steps=2,4", "--tensorboard"]
    environment = os.environ | {
        "PYTHONPATH": str(ROOT),
        "PYTHONUNBUFFERED": "1",
        "JAX_NUM_CPU_DEVICES": "2",
        "XLA_FLAGS": "",
    }
    log = (tmp_path / "log").open("w+")
    command = [sys.executable, "experiments/launch.py", *map(str, words)]
    process = subprocess.Popen(command, cwd=ROOT, env=environment, stdout=log, stderr=subprocess.STDOUT)
    deadline = time.monotonic() + 800
    while "TensorBoard stays at" not in (said := (tmp_path / "log").read_text()):
        assert time.monotonic() < deadline and process.poll() is None, said
        time.sleep(0.5)
    assert "http://localhost:6006" in said and urllib.request.urlopen("http://localhost:6006").status == 200
    process.send_signal(signal.SIGINT)
    assert process.wait(60) == 0
    with pytest.raises(urllib.error.URLError):
        urllib.request.urlopen("http://localhost:6006")
    for steps in (2, 4):
        run = tmp_path / "out" / f"learn.sft.steps_{steps}"
        assert load_checkpoint(run / "apr" / "rl").config.learn.sft.steps == steps
        assert (run / "report.html").is_file() and not (run / "data").exists()
    assert (tmp_path / "out" / "data" / "data.json").is_file()


@pytest.mark.slow
def test_a_job_that_fails_is_told(tiny, tmp_path):
    (tmp_path / "out").mkdir()
    (tmp_path / "out" / "config.json").write_text("{}")
    command = [sys.executable, "experiments/launch.py", "--config", tiny, "--out", tmp_path / "out"]
    ended = subprocess.run(
        command, cwd=ROOT, env=os.environ | {"PYTHONPATH": str(ROOT)}, capture_output=True, text=True
    )
    assert ended.returncode == 1 and "launch it again to go on" in ended.stderr
