"""The manifest and the image for GKE: valid by Kubernetes' schemas and JobSet's own models, whole,
and quoted well.
"""

import fnmatch
import json
import re
import shlex
import shutil
import sys
import warnings
from pathlib import Path

import pytest
from clouds import ROOT, SCRIPTS, write_script

from apr_jax.io.runtime import AUTO, COORDINATOR
from apr_jax.train.watchdog import HUNG

yaml = pytest.importorskip("yaml")
CONFIG = "experiments/paper.py"
FAKE_KUBECTL = Path(__file__).with_name("fake_kubectl.py")
KUBERNETES = "1.32"
# What the schema does not say and JobSet's webhook checks all the same (v0.12.0); the actions are
# an enumeration of its CRD.
RULE_NAME = re.compile(r"[A-Za-z]([A-Za-z0-9_,:]*[A-Za-z0-9_])?")
ACTIONS = {
    "FailJobSet",
    "RestartJobSet",
    "RestartJobSetAndIgnoreMaxRestarts",
    "RestartJob",
    "RestartJobAndIgnoreMaxRestarts",
}
REASONS = {
    "BackoffLimitExceeded",
    "DeadlineExceeded",
    "FailedIndexes",
    "MaxFailedIndexesExceeded",
    "PodFailurePolicy",
}


@pytest.fixture
def manifest(cloud):
    """What `gke.sh start --dry-run` would apply."""

    def render(*words, tpu="v5e", topology="4x4", **settings):
        settings |= {
            "GKE_TPU": tpu,
            "GKE_TOPOLOGY": topology,
            "GKE_IMAGE": "us-docker.pkg.dev/p/r/apr:1",
        }
        status, said, errors = cloud.call(
            "gke.sh", "start", "--dry-run", "--config", CONFIG, *words, **settings
        )
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
        assert set(rule["onJobFailureReasons"]) <= REASONS, (
            f"no reasons: {rule['onJobFailureReasons']}"
        )
    for replicated in jobset["spec"]["replicatedJobs"]:
        job = {
            "apiVersion": "batch/v1",
            "kind": "Job",
            "metadata": {"name": "job"},
            **replicated["template"],
        }
        validate(job, KUBERNETES, strict=True)


@pytest.mark.parametrize(
    ("tpu", "topology", "accelerator", "hosts", "chips"),
    [
        ("v5e", "2x4", "tpu-v5-lite-podslice", 1, 8),
        ("v5e", "4x4", "tpu-v5-lite-podslice", 4, 4),
        ("v5e", "16x16", "tpu-v5-lite-podslice", 64, 4),
        ("v4", "2x2x1", "tpu-v4-podslice", 1, 4),
        ("v4", "4x4x4", "tpu-v4-podslice", 16, 4),
        ("v4", "2x4x4", "tpu-v4-podslice", 8, 4),
        ("v5p", "4x20x76", "tpu-v5p-slice", 1520, 4),
        ("v5p", "8x8x16", "tpu-v5p-slice", 256, 4),
        ("v6e", "16x16", "tpu-v6e-slice", 64, 4),
    ],
)
def test_manifest_is_valid_and_requests_whole_slice(
    manifest, tpu, topology, accelerator, hosts, chips
):
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
    assert container["args"] == [
        "reproduce",
        "--config",
        "experiments/paper.py",
        "--out",
        "gs://bucket/run",
    ]


@pytest.mark.parametrize(
    ("tpu", "topologies", "right"),
    [
        (
            "v5e",
            ["3x3", "4x2", "2x8", "32x32", "2x2x1", "4", "4x4 8x8", "04x04"],
            "1x1, 2x2, 2x4, 4x4, 4x8, 8x8, 8x16 or 16x16",
        ),
        ("v6e", ["8x4", "1x2"], "16x16"),
        (
            "v4",
            ["4x4", "1x1x1", "4x4x2", "4x4x6", "8x4x4", "4x8x4", "0x4x4", "16x16x20"],
            "like 4x4x8, of at most 4096 chips",
        ),
        (
            "v5p",
            ["2x2", "2x2x8", "4x4x4x4", "16x24x24"],
            "2x2x1, 2x2x2, 2x2x4, 2x4x4, or three rising multiples of 4",
        ),
    ],
)
def test_slices_that_google_has_not_are_refused(cloud, tpu, topologies, right):
    for topology in topologies:
        settings = {"GKE_TPU": tpu, "GKE_TOPOLOGY": topology, "GKE_IMAGE": "i"}
        status, said, errors = cloud.call(
            "gke.sh", "start", "--dry-run", "--config", CONFIG, **settings
        )
        assert (status, said) == (2, "") and len(errors.splitlines()) == 1
        assert (
            f"GKE_TOPOLOGY={topology}: GKE_TPU={tpu} has no such slice; must be " in errors
            and right in errors
        )


def test_the_check_finds_what_is_wrong(manifest):
    jobset = manifest()
    jobset["spec"]["failurePolicy"]["maxRestart"] = 3
    with pytest.raises(AssertionError, match="does not know .spec.failurePolicy.maxRestart"):
        _check(jobset)
    for field, wrong in (
        ("name", "wrong-use"),
        ("action", "Fail"),
        ("onJobFailureReasons", ["PodFailure"]),
    ):
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
    sys.path.insert(0, str(ROOT / "experiments"))
    from xmanager import xm

    from launcher.gke import slice_of

    for tpu, topology in (
        ("v4", "2x2x4"),
        ("v5e", "2x4"),
        ("v5e", "8x8"),
        ("v5p", "4x4x4"),
        ("v6e", "2x2"),
    ):
        job = _slice(manifest(tpu=tpu, topology=topology))
        wanted = slice_of(xm.JobRequirements(**{f"tpu_{tpu}": topology}))
        (container,) = job["template"]["spec"]["containers"]
        assert (
            wanted.hosts == job["parallelism"]
            and wanted.chips == container["resources"]["limits"]["google.com/tpu"]
        )
        assert (
            wanted.accelerator
            == job["template"]["spec"]["nodeSelector"]["cloud.google.com/gke-tpu-accelerator"]
        )


def test_words_come_through_as_they_are(manifest):
    words = ["--set", 'name=a "b" \\ c', "--set", "schedule.context_buckets=32,64"]
    jobset = manifest(*words, GKE_SPOT="1", GKE_NAME="mine", GKE_SERVICE_ACCOUNT="trainer")
    _check(jobset)
    pod = _slice(jobset)["template"]["spec"]
    assert pod["containers"][0]["args"][5:] == words
    assert pod["nodeSelector"]["cloud.google.com/gke-spot"] == "true"
    assert (jobset["metadata"]["name"], pod["serviceAccountName"]) == ("mine", "trainer")
    assert (
        "cloud.google.com/gke-spot"
        not in _slice(manifest(GKE_SPOT="0"))["template"]["spec"]["nodeSelector"]
    )


def _outcome(jobset, code, conditions=()):
    """What JobSet does when the first pod that ends has this exit code and these conditions.

    The message is the one that the Job's controller writes (Kubernetes'
    pkg/controller/job/pod_failure_policy.go).
    """
    job = _slice(jobset)
    policy = jobset["spec"]["failurePolicy"]
    reason = "BackoffLimitExceeded"
    message = "Job has reached the specified backoff limit"
    assert job["backoffLimit"] == 0
    for index, rule in enumerate(job["podFailurePolicy"]["rules"]):
        assert rule["action"] == "FailJob"
        codes, wanted = rule.get("onExitCodes"), rule.get("onPodConditions", [])
        why = None
        if codes:
            assert (codes["containerName"], codes["operator"]) == ("apr", "In")
            if code in codes["values"]:
                why = f"Container apr for pod default/apr-slice-0-0-x failed with exit code {code}"
        for condition in wanted:
            assert condition["status"] == "True"
            if condition["type"] in conditions:
                why = f"Pod default/apr-slice-0-0-x has condition {condition['type']}"
        if why:
            reason = "PodFailurePolicy"
            message = f"{why} matching FailJob rule at index {index}"
            break
    for rule in policy["rules"]:
        patterns = rule.get("onJobFailureMessagePatterns", [""])
        if reason in rule["onJobFailureReasons"] and any(
            re.search(pattern, message) for pattern in patterns
        ):
            return rule["action"]
    return "RestartJobSet"


def test_failures_count_but_lost_nodes_do_not(manifest):
    """Both restart the job set, and wrong use ends it."""
    jobset = manifest()
    assert jobset["spec"]["failurePolicy"]["maxRestarts"] == 10
    assert manifest(GKE_RESTARTS="3")["spec"]["failurePolicy"]["maxRestarts"] == 3
    assert _outcome(jobset, 2) == "FailJobSet"
    for code in (1, 134, 137, HUNG):
        assert _outcome(jobset, code) == "RestartJobSet"
    for code in (143, 137, 1):
        assert _outcome(jobset, code, ["DisruptionTarget"]) == "RestartJobSetAndIgnoreMaxRestarts"
    assert _outcome(jobset, 143) == "RestartJobSetAndIgnoreMaxRestarts", (
        "the pods beside the one that is taken away"
    )


def test_pod_requests_fit_the_smallest_node(manifest):
    """They are also no less than the run needs."""
    (container,) = _slice(manifest(topology="1x1"))["template"]["spec"]["containers"]
    asked = container["resources"]["requests"]
    assert asked["cpu"] <= 20 and int(asked["memory"].removesuffix("Gi")) <= 40, (
        "ct5lp-hightpu-1t: 24 CPUs, 48 GiB"
    )
    assert int(asked["ephemeral-storage"].removesuffix("Gi")) >= 16, "Autopilot's default is 1 GiB"


@pytest.fixture
def kubectl(cloud):
    """The fake one, on PATH."""
    write_script(
        cloud.folder / "bin" / "kubectl", f'exec {sys.executable} -I -S {FAKE_KUBECTL} "$@"'
    )


@pytest.fixture
def start(cloud, kubectl):
    """`gke.sh start` against a cluster with one JobSet."""
    settings = {"GKE_TPU": "v5e", "GKE_TOPOLOGY": "4x4", "GKE_IMAGE": "us-docker.pkg.dev/p/r/apr:1"}

    def call(*words):
        """Status, standard error, and the verbs that kubectl was given."""
        calls = cloud.folder / "kubectl-calls"
        calls.unlink(missing_ok=True)
        status, _, errors = cloud.call("gke.sh", "start", "--config", CONFIG, *words, **settings)
        return status, errors, [json.loads(line)[0] for line in calls.read_text().splitlines()]

    return call


def test_start_goes_on_with_a_run_that_has_ended(cloud, start):
    assert start() == (0, "", ["get", "apply"])
    for terminal in ("Failed", "Completed"):
        (cloud.folder / "terminal").write_text(terminal)
        assert start("--set", f"name={terminal}") == (0, "", ["get", "delete", "apply"])
        assert f"name={terminal}" in (cloud.folder / "jobset.yaml").read_text()


def test_start_leaves_a_run_alone_that_runs(cloud, start):
    start()
    before = (cloud.folder / "jobset.yaml").read_text()
    status, errors, verbs = start("--set", "seed=2")
    assert status == 1 and verbs == ["get"] and len(errors.splitlines()) == 1
    assert "apr runs already: gke.sh status; to end it, gke.sh delete" in errors
    assert (cloud.folder / "jobset.yaml").read_text() == before


def test_a_config_that_the_image_has_not_is_refused(cloud, tmp_path):
    settings = {"GKE_TPU": "v5e", "GKE_TOPOLOGY": "4x4", "GKE_IMAGE": "i"}
    elsewhere = tmp_path / "experiments" / "mine.py"
    below = cloud.clone / "experiments" / "below" / "mine.py"
    for path in (elsewhere, below):
        path.parent.mkdir()
        path.touch()
    (cloud.clone / "experiments" / "link.py").symlink_to(elsewhere)
    (cloud.clone / "experiments" / "mine.txt").touch()
    for config in (elsewhere, below, "experiments/link.py", "experiments/mine.txt"):
        status, said, errors = cloud.call(
            "gke.sh", "start", "--dry-run", "--config", config, **settings
        )
        assert (status, said) == (2, "") and len(errors.splitlines()) == 1
        assert (
            f"--config {config}: the image has no such file; must be experiments/NAME.py of this"
            " clone" in errors
        )
    (tmp_path / "same").symlink_to(cloud.clone)
    status, said, _ = cloud.call(
        "gke.sh", "start", "--dry-run", "--config", tmp_path / "same" / CONFIG, **settings
    )
    assert status == 0 and '"--config", "experiments/paper.py"' in said


def test_a_config_that_the_image_has_otherwise_is_refused(cloud):
    write_script(cloud.folder / "bin" / "docker", 'echo "$1" >>$FAKE_GCLOUD/docker-calls')
    settings = {"GKE_TPU": "v5e", "GKE_TOPOLOGY": "4x4"}

    def call(*words, image="r/apr:1"):
        status, _, errors = cloud.call("gke.sh", *words, GKE_IMAGE=image, **settings)
        return status, errors

    start = ("start", "--dry-run", "--config", CONFIG)
    assert (
        call("image") == (0, "") and (cloud.folder / "docker-calls").read_text() == "build\npush\n"
    )
    assert call(*start) == (
        0,
        (
            "+ kubectl get jobset apr --ignore-not-found"
            " --output=jsonpath=\\{.metadata.name\\}=\\{.status.terminalState\\}\n"
        ),
    )
    with (cloud.clone / CONFIG).open("a") as file:
        file.write("# Changed.\n")
    status, errors = call(*start)
    assert (
        status == 2
        and f"--config {CONFIG}: has changed since GKE_IMAGE=r/apr:1 was made: gke.sh image"
        in errors
    )
    assert call(*start, image="r/apr:2")[0] == 0, "of another image nothing is known"
    assert call("start", "--dry-run", "--config", "experiments/nano.py")[0] == 0
    assert call("image", "--dry-run")[0] == 0 and call(*start)[0] == 2
    assert call("image")[0] == 0 and call(*start)[0] == 0


def test_logs_are_of_a_host(cloud, start):
    start()
    for words, host in (((), 0), ((3,), 3)):
        assert cloud.call("gke.sh", "logs", *words)[0] == 0
        *_, last = map(json.loads, (cloud.folder / "kubectl-calls").read_text().splitlines())
        assert "--tail=200" in last and last[-1].endswith(f"job-completion-index={host}")


@pytest.mark.parametrize(("known", "made"), [("missing", ["create-auto"]), ("ok", [])])
def test_a_cluster_is_made_once_and_waited_for(cloud, kubectl, known, made):
    """A JobSet that arrives before the webhook of its controller would be refused."""
    cloud.plays(cluster=[known])
    status, _, errors = cloud.call("gke.sh", "cluster", GKE_REGION="us-west4")
    assert status == 0, errors
    assert [words[2] for words in cloud.calls()] == ["list", *made, "get-credentials"]
    applied, waited = map(json.loads, (cloud.folder / "kubectl-calls").read_text().splitlines())
    assert applied[0] == "apply" and waited[0] == "wait" and "--for=condition=Available" in waited


def test_every_verb_dry_runs(cloud):
    settings = {"GKE_REGION": "us-west4", "GKE_IMAGE": "i", "GKE_TPU": "v5e", "GKE_TOPOLOGY": "4x4"}
    shutil.rmtree(cloud.clone / "dist")
    for verb in ("cluster", "image", "logs", "status", "fetch", "delete", "delete-cluster"):
        status, said, errors = cloud.call("gke.sh", verb, "--dry-run", **settings)
        assert status == 0 and cloud.calls() == [], errors
        assert all(
            re.match(r"\+ (docker|gcloud|kubectl|mkdir) ", line) for line in said.splitlines()
        )


def test_what_the_image_copies_is_there():
    lines = (SCRIPTS / "Dockerfile").read_text().splitlines()
    copied = [word for line in lines if line.startswith("COPY") for word in shlex.split(line)[1:-1]]
    assert [source for source in copied if not source.startswith("dist/")] == ["experiments/*.py"]
    assert list(ROOT.glob("experiments/*.py"))
    (entry,) = [
        json.loads(line.removeprefix("ENTRYPOINT "))
        for line in lines
        if line.startswith("ENTRYPOINT")
    ]
    assert entry[-1] == "apr" and entry[0] in next(
        line for line in lines if "apt-get install" in line
    ), "an init first"


def test_docker_is_given_what_it_copies_and_no_more():
    """By Docker's rule: the last line that fits a path decides."""
    lines = [
        line
        for line in (ROOT / ".dockerignore").read_text().splitlines()
        if line and not line.startswith("#")
    ]

    def given(path):
        names = [path, *map(str, Path(path).parents)][:-1]
        fits = [
            line
            for line in lines
            if any(fnmatch.fnmatch(name, line.removeprefix("!")) for name in names)
        ]
        return not fits or fits[-1].startswith("!")

    assert given("dist/apr_jax-0.2.0-py3-none-any.whl") and given("experiments/paper.py")
    for path in (
        ".venv/bin/python",
        "runs/mini/metrics.jsonl",
        ".git/config",
        "experiments/mini/apr.safetensors",
    ):
        assert not given(path), path
