"""The manifest and the image for GKE: valid by Kubernetes' schemas and JobSet's own models, whole, and quoted well."""

import re
import shlex
import warnings

import pytest
from conftest import ROOT, SCRIPTS

from apr_jax.runtime import AUTO, COORDINATOR

yaml = pytest.importorskip("yaml")
CONFIG = ROOT / "experiments" / "paper.py"
KUBERNETES = "1.32"
# What the schema does not say and JobSet's webhook checks all the same (v0.12.0); the actions are an enumeration of its CRD.
RULE_NAME = re.compile(r"[A-Za-z]([A-Za-z0-9_,:]*[A-Za-z0-9_])?")
ACTIONS = {
    "FailJobSet",
    "RestartJobSet",
    "RestartJobSetAndIgnoreMaxRestarts",
    "RestartJob",
    "RestartJobAndIgnoreMaxRestarts",
}
REASONS = {"BackoffLimitExceeded", "DeadlineExceeded", "FailedIndexes", "MaxFailedIndexesExceeded", "PodFailurePolicy"}


@pytest.fixture
def manifest(cloud):
    """What `gke.sh start --dry-run` would apply."""

    def render(*words, tpu="v5e", topology="4x4", **settings):
        settings |= {"GKE_TPU": tpu, "GKE_TOPOLOGY": topology, "GKE_IMAGE": "us-docker.pkg.dev/p/r/apr:1"}
        status, said, errors = cloud.call("gke.sh", "start", "--dry-run", "--config", CONFIG, *words, **settings)
        assert status == 0 and cloud.calls() == [], errors
        text, command, rest = said.rpartition("+ kubectl apply --filename=-")
        assert command and not rest.strip() and "@" not in text.replace("what stands between @", "")
        return yaml.safe_load(text)

    return render


def _slice(jobset):
    (replicated,) = jobset["spec"]["replicatedJobs"]
    return replicated["template"]["spec"]


def _holds(read, ours, where=""):
    """The model drops what it does not know, and adds defaults."""
    if isinstance(ours, dict):
        for name, value in ours.items():
            assert isinstance(read, dict) and name in read, f"JobSet does not know {where}.{name}"
            _holds(read[name], value, f"{where}.{name}")
    elif isinstance(ours, list):
        assert len(read) == len(ours), where
        for place, (mine, value) in enumerate(zip(read, ours, strict=True)):
            _holds(mine, value, f"{where}[{place}]")
    else:
        assert read == ours, where


def _check(jobset):
    """By JobSet's models and webhook, and its jobs by Kubernetes' schemas."""
    models = pytest.importorskip("kubeflow_trainer_api.models")
    validate = pytest.importorskip("kubernetes_validate").validate
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        read = models.JobsetV1alpha2JobSet.from_dict(jobset).to_dict()
    _holds(read, jobset)
    rules = jobset["spec"]["failurePolicy"]["rules"]
    assert len({rule["name"] for rule in rules}) == len(rules)
    for rule in rules:
        assert RULE_NAME.fullmatch(rule["name"]), f"no name of a rule: {rule['name']}"
        assert rule["action"] in ACTIONS, f"no action: {rule['action']}"
        assert set(rule["onJobFailureReasons"]) <= REASONS, f"no reasons: {rule['onJobFailureReasons']}"
    for replicated in jobset["spec"]["replicatedJobs"]:
        job = {"apiVersion": "batch/v1", "kind": "Job", "metadata": {"name": "job"}, **replicated["template"]}
        validate(job, KUBERNETES, strict=True)


@pytest.mark.parametrize(
    ("tpu", "topology", "accelerator", "hosts", "chips"),
    [
        ("v5e", "2x4", "tpu-v5-lite-podslice", 1, 8),
        ("v5e", "4x4", "tpu-v5-lite-podslice", 4, 4),
        ("v5e", "16x16", "tpu-v5-lite-podslice", 64, 4),
        ("v4", "2x2x1", "tpu-v4-podslice", 1, 4),
        ("v4", "4x4x4", "tpu-v4-podslice", 16, 4),
        ("v5p", "8x8x16", "tpu-v5p-slice", 256, 4),
        ("v6e", "16x16", "tpu-v6e-slice", 64, 4),
    ],
)
def test_a_manifest_is_valid_and_asks_for_the_whole_slice(manifest, tpu, topology, accelerator, hosts, chips):
    jobset = manifest(tpu=tpu, topology=topology)
    _check(jobset)
    job = _slice(jobset)
    assert (job["parallelism"], job["completions"]) == (hosts, hosts)
    pod = job["template"]["spec"]
    assert pod["nodeSelector"] == {
        "cloud.google.com/gke-tpu-accelerator": accelerator,
        "cloud.google.com/gke-tpu-topology": topology,
    }
    (container,) = pod["containers"]
    assert container["resources"]["limits"] == {"google.com/tpu": chips}
    assert {"name": COORDINATOR, "value": AUTO} in container["env"]
    assert container["args"] == ["reproduce", "--config", "experiments/paper.py", "--out", "gs://bucket/run"]


def test_the_check_finds_what_is_wrong(manifest):
    jobset = manifest()
    jobset["spec"]["failurePolicy"]["maxRestart"] = 3
    with pytest.raises(AssertionError, match="does not know .spec.failurePolicy.maxRestart"):
        _check(jobset)
    for field, wrong in (("name", "wrong-use"), ("action", "Fail"), ("onJobFailureReasons", ["PodFailure"])):
        jobset = manifest()
        jobset["spec"]["failurePolicy"]["rules"][0][field] = wrong
        with pytest.raises(AssertionError, match="^no "):
            _check(jobset)
    jobset = manifest()
    _slice(jobset)["template"]["spec"]["containers"][0]["imagee"] = "x"
    with pytest.raises(Exception, match="imagee"):
        _check(jobset)


def test_xmanager_and_the_manifest_cut_slices_alike(manifest):
    pytest.importorskip("xmanager")
    import sys

    sys.path.insert(0, str(ROOT / "experiments"))
    from xmanager import xm

    from launcher.gke import slice_of

    for tpu, topology in (("v4", "2x2x4"), ("v5e", "2x4"), ("v5e", "8x8"), ("v5p", "4x4x4"), ("v6e", "2x2")):
        job = _slice(manifest(tpu=tpu, topology=topology))
        wanted = slice_of(xm.JobRequirements(**{f"tpu_{tpu}": topology}))
        (container,) = job["template"]["spec"]["containers"]
        assert wanted.hosts == job["parallelism"] and wanted.chips == container["resources"]["limits"]["google.com/tpu"]
        assert wanted.accelerator == job["template"]["spec"]["nodeSelector"]["cloud.google.com/gke-tpu-accelerator"]


def test_words_come_through_as_they_are(manifest):
    words = ["--set", 'name=a "b" \\ c', "--set", "schedule.buckets=32,64"]
    jobset = manifest(*words, GKE_SPOT="1", GKE_NAME="mine", GKE_SERVICE_ACCOUNT="trainer")
    _check(jobset)
    pod = _slice(jobset)["template"]["spec"]
    assert pod["containers"][0]["args"][5:] == words
    assert pod["nodeSelector"]["cloud.google.com/gke-spot"] == "true"
    assert (jobset["metadata"]["name"], pod["serviceAccountName"]) == ("mine", "trainer")


def test_wrong_use_ends_the_job_set_and_all_else_restarts_it(manifest):
    jobset = manifest()
    policy = jobset["spec"]["failurePolicy"]
    assert policy["maxRestarts"] >= 100
    assert policy["rules"] == [
        {"name": "wrongUse", "action": "FailJobSet", "onJobFailureReasons": ["PodFailurePolicy"]}
    ]
    (rule,) = _slice(jobset)["podFailurePolicy"]["rules"]
    assert rule["onExitCodes"]["values"] == [2] and _slice(jobset)["backoffLimit"] == 0


def test_every_verb_dry_runs(cloud):
    settings = {"GKE_REGION": "us-west4", "GKE_IMAGE": "i", "GKE_TPU": "v5e", "GKE_TOPOLOGY": "4x4"}
    (ROOT / "dist").mkdir(exist_ok=True)
    for verb in ("cluster", "logs", "status", "fetch", "delete", "delete-cluster"):
        status, said, errors = cloud.call("gke.sh", verb, "--dry-run", **settings)
        assert status == 0 and cloud.calls() == [], errors
        assert all(re.match(r"\+ (gcloud|kubectl|mkdir) ", line) for line in said.splitlines())


def test_what_the_image_copies_is_there():
    lines = (SCRIPTS / "Dockerfile").read_text().splitlines()
    copied = [word for line in lines if line.startswith("COPY") for word in shlex.split(line)[1:-1]]
    assert [source for source in copied if not source.startswith("dist/")] == ["experiments/*.py"]
    assert list(ROOT.glob("experiments/*.py"))
    assert 'ENTRYPOINT ["apr"]' in lines
