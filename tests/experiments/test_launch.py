"""The XManager launcher: sweeps as work units, what is refused, and what a cluster would be
sent.
"""

import json
import os
import re
import sys
from pathlib import Path

import pytest

from apr_jax.config import load
from apr_jax.errors import UsageError

ROOT = Path(__file__).parents[2]
sys.path.insert(0, str(ROOT / "experiments"))
import launch

from launcher.sweep import Unit, work_units

NANO = "experiments/nano.py"


def test_without_a_sweep_there_is_one_unit():
    (unit,) = work_units("runs/x", ["seed=1"], [])
    assert (unit.settings, unit.out, unit.data) == (("seed=1",), "runs/x", None)


def test_sweep_is_the_product_with_a_folder_each():
    units = work_units(
        "runs/x", ["seed=1"], ["train.sft.optimizer.lr=1e-4,3e-4", "train.sft.batch_rows=8, 16"]
    )
    assert [unit.settings for unit in units] == [
        ("seed=1", f"train.sft.optimizer.lr={lr}", f"train.sft.batch_rows={rows}")
        for lr in ("1e-4", "3e-4")
        for rows in ("8", "16")
    ]
    assert units[1].out == "runs/x/train.sft.optimizer.lr_1e-4__train.sft.batch_rows_16"
    assert len({unit.out for unit in units}) == 4
    assert {unit.data for unit in units} == {"runs/x/data"}, (
        "the data don't differ: they are built once"
    )


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
GKE = ["--config", NANO, *CLOUD, "--executor", "gke"]
SLICE = ["--require", "tpu_v5e=2x4"]


@pytest.fixture
def specs(monkeypatch, capfd):
    """What --dry-run prints, a JSON object a unit."""
    monkeypatch.chdir(ROOT)

    def call(*words):
        status = launch.main([*map(str, words), "--dry-run"])
        text, errors = capfd.readouterr()
        assert status == 0, errors
        decoder = json.JSONDecoder()
        found = []
        while text := text.lstrip():
            spec, end = decoder.raw_decode(text)
            found.append(spec)
            text = text[end:]
        return found

    return call


@pytest.mark.thorough
@pytest.mark.parametrize(
    ("words", "told"),
    [
        (["--config", "nowhere.py", "--out", "x"], "nowhere.py: no such file"),
        (
            ["--config", NANO, "--out", "x", "--sweep", "train.stf.steps=1,2"],
            "did you mean 'train.sft.steps'",
        ),
        (
            ["--config", NANO, "--out", "x", "--image", "i"],
            "--image and --require are of --executor gke and vertex",
        ),
        (
            ["--config", NANO, "--out", "x", "--executor", "gke"],
            "--out x: a cloud's machines go; must be gs://",
        ),
        (
            ["--config", NANO, "--out", "gs://b/x", "--executor", "gke"],
            "--executor gke: give --image",
        ),
        (
            ["--config", NANO, *CLOUD, "--executor", "vertex", "--require", "tpu_v5e=4x4"],
            "no machine of Vertex AI",
        ),
        (
            ["--config", NANO, "--out", "x", "--service-account", "me"],
            "--service-account me: is of --executor gke, not",
        ),
        (["--config", NANO], "the following arguments are required: --out"),
        (
            ["--config", NANO, "--out", ""],
            "--out '': is empty; must be the path of a file or folder",
        ),
        (
            ["--config", NANO, "--out", "s3://bucket/x"],
            "--out s3://bucket/x: s3:// is not supported",
        ),
        ([*GKE, "--out", "GS://bucket/x"], "--out GS://bucket/x: write it as gs://bucket/x"),
        (
            ["--config", "gs://bucket/x.py", "--out", "x"],
            "--config gs://bucket/x.py: is in a bucket; must be a file",
        ),
        (["--config", NANO, "--out", "x", "--tensorbord"], "unrecognized arguments: --tensorbord"),
        (GKE, "--executor gke: runs on a TPU slice, not on CPUs; give --require tpu_v5e=2x4"),
        ([*GKE, "--require", "v100=1"], "--executor gke: runs on a TPU slice, not on V100"),
        ([*GKE, "--require", "v5e=4x4"], "write it like tpu_v5e=4x4"),
        ([*GKE, "--require", "tpu_v5e=4xx"], "--require 'tpu_v5e=4xx': write it like tpu_v5e=4x4"),
        ([*GKE, "--require", "tpu_v4=04x4x4"], "write it like tpu_v5e=4x4"),
        (
            [*GKE, *SLICE, "--require", "cpu=many"],
            "--require 'cpu=many': write it like tpu_v5e=4x4, cpu=8",
        ),
        ([*GKE, *SLICE, "--require", "cpu=0"], "--require 'cpu=0': must be more than 0"),
        (
            [*GKE, *SLICE, "--require", "cpu=2x4"],
            "must be one kind of chip, and numbers of everything else",
        ),
        (
            [*GKE, *SLICE, "--require", "tpu_v4=2x2x1"],
            "--require tpu_v5e=2x4 tpu_v4=2x2x1: must be one kind of chip",
        ),
        ([*GKE, *SLICE, *SLICE], "--require 'tpu_v5e=2x4': is given twice"),
        (
            [*GKE, "--require", "tpu_v3=4x4"],
            "--require tpu_v3=4x4: GKE has no such slices; must be tpu_v4, tpu_v5e",
        ),
    ],
)
def test_wrong_use_is_one_line(words, told, monkeypatch, capfd):
    monkeypatch.chdir(ROOT)
    assert launch.main([*words, "--dry-run"]) == 2
    said, errors = capfd.readouterr()
    (line,) = errors.splitlines()
    assert told in line and said == ""


@pytest.mark.parametrize(
    ("asked", "told"),
    [
        ("tpu_v5e=3x5", "must be 1x1, 2x2, 2x4, 4x4, 4x8, 8x8, 8x16, 16x16"),
        ("tpu_v5e=4", "must be 1x1, 2x2, 2x4, 4x4, 4x8, 8x8, 8x16, 16x16"),
        ("tpu_v6e=2x2x1", "must be 1x1, 2x2, 2x4, 4x4, 4x8, 8x8, 8x16, 16x16"),
        (
            "tpu_v4=4x4",
            (
                "must be 2x2x1, 2x2x2, 2x2x4, 2x4x4, or AxBxC with A <= B <= C, all multiples of 4,"
                " of 4096"
            ),
        ),
        ("tpu_v4=2x2x8", "all multiples of 4"),
        ("tpu_v5p=8x4x4", "AxBxC with A <= B <= C"),
        ("tpu_v5p=16x16x28", "of 6144 chips at most"),
    ],
)
def test_nonexistent_slice_is_refused_before_launch(asked, told, monkeypatch, capfd):
    monkeypatch.chdir(ROOT)
    monkeypatch.setattr("xmanager.xm_local.create_experiment", None)
    assert launch.main([*GKE, "--require", asked]) == 2
    (line,) = capfd.readouterr().err.splitlines()
    assert (
        line.startswith(f"launch: error: --require {asked}: GKE has no such slice; ")
        and told in line
    )


@pytest.mark.parametrize("executor", ["gke", "vertex"])
def test_a_config_that_the_image_lacks_is_refused(executor, monkeypatch, tmp_path, capfd):
    """One of the same name would run as the image's, which says something else."""
    other = tmp_path / "nano.py"
    other.write_text((ROOT / NANO).read_text())
    monkeypatch.chdir(tmp_path)
    for config in (str(other), "nano.py", str(ROOT / "experiments" / ".." / "nano.py")):
        assert (
            launch.main(["--config", config, *CLOUD, "--executor", executor, *SLICE, "--dry-run"])
            == 2
        )
        (line,) = capfd.readouterr().err.splitlines()
        assert (
            f"--config {config}: the image holds the files of {ROOT / 'experiments'} alone" in line
        )


def test_a_config_of_the_image_is_taken_from_anywhere(specs, monkeypatch, tmp_path):
    monkeypatch.chdir(tmp_path)
    (tmp_path / "link.py").symlink_to(ROOT / NANO)
    for config in (ROOT / NANO, "link.py", os.path.relpath(ROOT / NANO)):
        (job,) = specs("--config", config, *CLOUD, "--executor", "gke", *SLICE)
        assert job["spec"]["template"]["spec"]["containers"][0]["args"][2] == NANO


def test_a_local_spec_is_a_command_of_this_python(specs, tmp_path):
    first, second = specs(
        "--config", NANO, "--out", tmp_path, "--set", "seed=3", "--sweep", "train.sft.steps=1,2"
    )
    assert first["command"][:4] == [sys.executable, "-m", "apr_jax", "reproduce"]
    assert first["command"][-4:] == ["--set", "seed=3", "--set", "train.sft.steps=1"]
    assert second["command"][second["command"].index("--out") + 1] == str(
        tmp_path / "train.sft.steps_2"
    )


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
    (job,) = specs(*GKE, "--require", required, "--require", "ram=64")
    validate = pytest.importorskip("kubernetes_validate")
    validate.validate({"apiVersion": "batch/v1", "kind": "Job", **job}, "1.32", strict=True)
    assert (job["spec"]["parallelism"], job["spec"]["completions"]) == (hosts, hosts)
    assert job["spec"]["completionMode"] == "Indexed"
    pod = job["spec"]["template"]["spec"]
    assert pod["nodeSelector"] == {
        "cloud.google.com/gke-tpu-accelerator": accelerator,
        "cloud.google.com/gke-tpu-topology": required.partition("=")[2],
    }
    assert pod["subdomain"] == "experiments" and "hostname" not in pod, (
        "GKE tells the pods apart by their index"
    )
    (container,) = pod["containers"]
    assert container["resources"]["limits"] == {
        "google.com/tpu": str(chips),
        "memory": str(64 * 2**30),
    }
    assert container["image"] == "registry/apr:1"
    assert container["args"] == ["reproduce", "--config", NANO, "--out", "gs://bucket/run"]
    assert {"name": "JAX_COORDINATOR_ADDRESS", "value": "auto"} in container["env"]


def test_pods_of_a_unit_share_no_slice(specs):
    """Two units have the same node selector: nothing else would keep pods of one off a slice of the
    other.
    """
    words = (*GKE, "--sweep", "seed=0,1", "--set", "task.numbers=3")
    for job in specs(*words, "--require", "tpu_v5e=4x4"):
        affinity = job["spec"]["template"]["spec"]["affinity"]
        name = job["metadata"]["name"]
        key = "batch.kubernetes.io/job-name"
        for kind, expressions in (
            ("podAffinity", [{"key": key, "operator": "In", "values": [name]}]),
            (
                "podAntiAffinity",
                [
                    {"key": key, "operator": "Exists"},
                    {"key": key, "operator": "NotIn", "values": [name]},
                ],
            ),
        ):
            (term,) = affinity[kind]["requiredDuringSchedulingIgnoredDuringExecution"]
            assert term["topologyKey"] == "cloud.google.com/gke-nodepool"
            assert term["labelSelector"]["matchExpressions"] == expressions
    (alone,) = specs(*GKE, "--require", "tpu_v5e=2x4")
    assert "affinity" not in alone["spec"]["template"]["spec"], "one host is a slice of its own"


@pytest.fixture
def manifest():
    """The job of tpu_setup/jobset.yaml, its blanks left as words."""
    yaml = pytest.importorskip("yaml")
    text = (ROOT / "tpu_setup" / "jobset.yaml").read_text()
    (replicated,) = yaml.safe_load(re.sub(r"@([A-Z_]+)@", r"_\1_", text))["spec"]["replicatedJobs"]
    return replicated["template"]["spec"]


def test_the_pod_for_gke_is_that_of_the_jobset(specs, manifest):
    """But for the slice and the words, which are filled in; numbers may be written in several
    ways.
    """
    (job,) = specs(*GKE, "--require", "tpu_v5e=4x4")
    ours = job["spec"]["template"]["spec"]
    theirs = manifest["template"]["spec"]
    (container,), (wanted,) = ours.pop("containers"), theirs.pop("containers")
    assert ours.pop("nodeSelector") and theirs.pop("nodeSelector") == "_SELECTOR_"
    assert ours.pop("subdomain") == "experiments", "JobSet gives the pods a service of their own"
    assert ours.pop("affinity"), "JobSet's exclusive topology"
    assert (ours.pop("serviceAccountName"), theirs.pop("serviceAccountName")) == (
        "apr",
        "_SERVICE_ACCOUNT_",
    )
    assert ours == theirs
    requests = {name: str(amount) for name, amount in wanted["resources"]["requests"].items()}
    assert container["resources"] == {"requests": requests, "limits": {"google.com/tpu": "4"}}
    for field in ("env", "ports", "volumeMounts"):
        assert sorted(container[field], key=str) == sorted(
            ({**entry} for entry in wanted[field]), key=str
        )
    assert job["spec"]["backoffLimit"] == manifest["backoffLimit"]


def test_pod_account_and_requests_can_be_chosen(specs):
    words = [
        "--service-account",
        "me",
        "--require",
        "ram=16",
        "--require",
        "ephemeral_storage=100",
        "--require",
        "cpu=4",
    ]
    (job,) = specs(*GKE, *SLICE, *words)
    pod = job["spec"]["template"]["spec"]
    assert pod["serviceAccountName"] == "me" and "serviceAccount" not in pod
    resources = pod["containers"][0]["resources"]
    asked = {"cpu": "4", "memory": str(16 * 2**30), "ephemeral-storage": str(100 * 2**30)}
    assert resources == {
        "requests": asked,
        "limits": asked | {"google.com/tpu": "8"},
    }, "no request above its limit"


SWEEP = ["--sweep", "train.sft.steps=1,2"]
BUILD = (
    "apr data build --config experiments/nano.py --out gs://bucket/run/data --set seed=3 --method"
    " sos+ --method apr"
)


@pytest.fixture
def bucket(monkeypatch, tmp_path):
    """A folder that stands for gs://bucket; nothing may be launched."""
    monkeypatch.chdir(ROOT)
    monkeypatch.setattr(
        launch, "as_path", lambda path: Path(path.replace("gs://bucket", str(tmp_path)))
    )
    monkeypatch.setattr("xmanager.xm_local.create_experiment", None)
    return tmp_path


@pytest.mark.parametrize("words", [["gke", *SLICE], ["vertex", "--require", "tpu_v3=2x2"]])
def test_a_sweep_in_a_cloud_needs_its_data(words, bucket, capfd):
    """Its units start at once: each would build them, and upload them over the others'."""
    assert (
        launch.main(["--config", NANO, *CLOUD, *SWEEP, "--set", "seed=3", "--executor", *words])
        == 2
    )
    (line,) = capfd.readouterr().err.splitlines()
    assert "gs://bucket/run/data lacks data of sos+ and apr" in line and line.endswith(
        f"build them first: {BUILD}"
    )


def test_a_dry_run_tells_what_it_does_not_check(bucket, monkeypatch, capfd):
    monkeypatch.setattr(launch, "as_path", None)
    assert launch.main([*GKE, *SLICE, *SWEEP, "--set", "seed=3", "--dry-run"]) == 0
    (line,) = capfd.readouterr().err.splitlines()
    assert (
        line == "launch: not checked: that gs://bucket/run/data/data.json is there; it is made by:"
        f" {BUILD}"
    )


def test_existing_data_must_match_config_and_be_whole(bucket, config, data_dir):
    flags = launch.parse([*GKE, *SLICE, *SWEEP])
    units = launch.work_units(flags.out, flags.set, flags.sweep)
    (bucket / "run").mkdir()
    (bucket / "run" / "data").symlink_to(data_dir)
    with pytest.raises(UsageError, match="gs://bucket/run/data lacks data of"):
        launch.check_data(flags, units, config)  # Those of apr alone are there.
    record = json.loads((data_dir / "data.json").read_text())
    (bucket / "run" / "data").unlink()
    (bucket / "run" / "data").mkdir()
    record["methods"]["sos+"] = record["methods"]["apr"]
    (bucket / "run" / "data" / "data.json").write_text(json.dumps(record))
    launch.check_data(flags, units, config)
    with pytest.raises(UsageError, match="was built with task.high=6, now task.high="):
        launch.check_data(flags, units, load(Path(NANO)))


def test_units_that_share_no_data_need_none(bucket):
    flags = launch.parse(GKE)
    for data, executor in ((None, "gke"), ("gs://bucket/none", "local")):
        flags.executor = executor
        assert launch.check_data(flags, [Unit((), "gs://bucket/run", data)], None) is None


def test_a_sweep_on_gke_is_a_job_a_unit(specs):
    jobs = specs(*GKE, *SLICE, "--sweep", "seed=0,1,2")
    outs = [job["spec"]["template"]["spec"]["containers"][0]["args"][4] for job in jobs]
    assert outs == [f"gs://bucket/run/seed_{seed}" for seed in range(3)]


def test_the_spec_for_vertex_is_what_xmanager_submits(specs, monkeypatch):
    from xmanager.cloud import auth, vertex

    words = [
        "--config",
        NANO,
        *CLOUD,
        "--executor",
        "vertex",
        "--require",
        "tpu_v3=2x2",
        "--set",
        "seed=5",
    ]
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
    (unit,) = work_units(flags.out, flags.set, flags.sweep)
    vertex.Client("project").launch("name", [launch.job_of(flags, unit, "nano")])
    (pool,) = submitted["worker_pool_specs"]
    assert list(pool.container_spec.args) == printed["args"]
    assert pool.container_spec.image_uri == printed["image_uri"]
    assert pool.machine_spec.machine_type == printed["machine_spec"]["machine_type"] == "cloud-tpu"
    assert pool.machine_spec.accelerator_count == printed["machine_spec"]["accelerator_count"] == 4


def test_without_a_cluster_the_remedy_is_one_line(monkeypatch, tmp_path, capfd):
    monkeypatch.chdir(ROOT)
    monkeypatch.setenv("HOME", str(tmp_path))
    monkeypatch.setattr(
        "kubernetes.config.kube_config.KUBE_CONFIG_DEFAULT_LOCATION", str(tmp_path / "none")
    )
    assert launch.main([*GKE, *SLICE]) == 1
    errors = capfd.readouterr().err
    assert (
        "no cluster: gcloud container clusters get-credentials CLUSTER" in errors
        and "Traceback" not in errors
    )


def test_the_units_are_worked_out_once(monkeypatch, capfd):
    monkeypatch.chdir(ROOT)
    calls = []
    monkeypatch.setattr(
        launch, "work_units", lambda *words: calls.append(words) or work_units(*words)
    )
    assert launch.main(["--config", NANO, "--out", "x", *SWEEP, "--dry-run"]) == 0
    assert len(calls) == 1 and len(capfd.readouterr().out.splitlines()) > 2
