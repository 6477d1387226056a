"""The watcher: over preemptions to the end of a run, and to an end of its own where nothing would
ever get better.
"""

import shutil
import subprocess

import pytest
from clouds import write_script

from apr_jax.train.watchdog import HUNG

pytestmark = pytest.mark.thorough

CONFIG = "experiments/nano.py"


def _step(number, stage="apr/sft"):
    """As `slice.sh saved` tells of a checkpoint."""
    return f"gs://bucket/run/{stage}/checkpoints/{number}/commit_success.txt"


def _watch(cloud, *words, **settings):
    return cloud.call(
        "watch.sh", "--spot", "--config", CONFIG, "--set", "seed=1", *words, **settings
    )


def test_the_watcher_brings_a_run_to_its_end(cloud):
    cloud.plays(status=["running", "running"])
    status, _, errors = _watch(cloud)
    assert status == 0 and "done: slice.sh fetch, then slice.sh delete" in errors
    assert cloud.kinds() == ["create", "bootstrap", "start"]


def test_the_fake_hosts_have_only_what_was_copied_there(cloud):
    (cloud.folder / "state").write_text("ACTIVE")
    ssh = ["compute", "tpus", "tpu-vm", "ssh", "apr", "--zone=us-west4-a", "--worker=all"]
    command = [cloud.folder / "bin" / "gcloud", *ssh, "--command=bash apr/host.sh state"]
    assert subprocess.run(command, env=cloud.environment, capture_output=True).returncode == 127
    status, said, _ = cloud.call("slice.sh", "status")
    assert (status, said.split()) == (0, ["none"] * 4)


def test_the_watcher_with_hosts_that_really_run(cloud):
    """From nothing to the end with host.sh itself, over a failure; only Python and `apr` on the
    hosts are cheap ones.
    """
    apr = """
[[ $1 == reproduce ]] || exit 0
echo "$*" >>~/starts
sleep 0.5
(($(wc -l <~/starts) > 1))
"""
    python = f"""
[[ $1 == -m ]] || exit 0
mkdir -p "${{@: -1}}/bin" && cd "${{@: -1}}/bin"
printf '#!/bin/bash\n' >python
cat >apr <<'END'
#!/bin/bash{apr}END
chmod +x python apr
"""
    write_script(cloud.folder / "bin" / "python3.13", python)
    status, _, errors = _watch(cloud, FAKE_HOSTS_RUN="127.0.0.1:1", FAKE_HOSTS="2")
    assert status == 0 and "done: slice.sh fetch" in errors, errors
    assert "does not answer" not in errors
    assert cloud.kinds() == ["create", "bootstrap", "start", "stop", "start"]
    start = "reproduce --config apr/nano.py --out gs://bucket/run --set seed=1\n"
    for host in ("host0", "host1"):
        assert (cloud.folder / host / "starts").read_text() == 2 * start


@pytest.mark.parametrize(
    "said",
    ["exit ", "", "exit 0,exit 0,exit ,exit 0", "exit 0,exit 0,,exit 0", "exit 0,exit 0,exit 0"],
)
def test_only_a_word_of_each_host_is_the_end(cloud, said):
    cloud.plays(status=[said, "running"])
    status, _, errors = _watch(cloud)
    heard = said.split(",").count("exit 0")
    assert (
        status == 0
        and f"{heard} of the 4 hosts of apr have said none, running or exit STATUS" in errors
    )
    assert errors.index("a host does not answer (1 of 3)") < errors.index("done: slice.sh fetch")


def test_hosts_that_say_nothing_cost_the_slice(cloud):
    cloud.plays(status=["exit "] * 3)
    status, _, errors = _watch(cloud)
    assert status == 0 and "a host is lost (1 of 10)" in errors
    assert cloud.kinds() == [
        "create",
        "bootstrap",
        "start",
        "delete",
        "create",
        "bootstrap",
        "start",
    ]


def test_preempted_in_the_middle_of_the_bootstrap(cloud):
    cloud.plays(bootstrap=["preempt"])
    status, _, errors = _watch(cloud)
    assert status == 0 and "the slice is SUSPENDED (preempted?) (1 of 10): making it anew" in errors
    assert cloud.kinds() == ["create", "bootstrap", "delete", "create", "bootstrap", "start"]


def test_preempted_while_running_goes_on_with_the_same_command(cloud):
    cloud.plays(status=["running", "preempt", "running"])
    status, _, errors = _watch(cloud)
    assert status == 0, errors
    assert cloud.kinds() == [
        "create",
        "bootstrap",
        "start",
        "delete",
        "create",
        "bootstrap",
        "start",
    ]
    first, second = [word for words in cloud.calls() for word in words if "host.sh start" in word]
    assert first == second


def test_quota_that_is_full_for_a_while(cloud):
    cloud.plays(create=["quota", "quota"])
    assert _watch(cloud)[0] == 0
    assert cloud.kinds() == ["create", "create", "create", "bootstrap", "start"]


def test_a_host_that_goes_silent_costs_the_slice(cloud):
    cloud.plays(status=["fail", "running", "fail", "fail", "fail"])
    status, _, errors = _watch(cloud)
    assert (
        status == 0 and "a host does not answer (3 of 3)" in errors and "a host is lost" in errors
    )
    assert cloud.kinds() == [
        "create",
        "bootstrap",
        "start",
        "delete",
        "create",
        "bootstrap",
        "start",
    ]


def test_repeatedly_failing_run_is_left_to_its_owner(cloud):
    cloud.plays(status=["exit 1", "exit 134", "exit 1"])
    status, _, errors = _watch(cloud)
    assert (
        status == 1
        and "the run has ended on a host, 3 times, and nothing was saved in between: giving up"
        in errors
    )
    assert "slice.sh logs shows why; the slice is still there, and costs" in errors
    assert cloud.kinds() == ["create", "bootstrap", "start", "stop", "start", "stop", "start"]


def test_a_run_that_hung_is_started_again(cloud):
    """One host has ended with the status of a hang; the others may still wait for it."""
    cloud.plays(status=[f"running,exit {HUNG},running,exit 1", "running"])
    status, _, errors = _watch(cloud)
    assert status == 0 and "a step of the run hung, which slice.sh logs shows (1 of 3)" in errors
    assert cloud.kinds() == ["create", "bootstrap", "start", "stop", "start"]


def test_wrong_use_is_not_tried_again(cloud):
    cloud.plays(status=["exit 2"])
    status, _, errors = _watch(cloud)
    assert (
        status == 2 and "the run refuses its command or a setting" in errors and "costs" in errors
    )
    assert cloud.kinds() == ["create", "bootstrap", "start", "stop"]


def test_saving_in_between_ends_a_row_of_failures(cloud):
    cloud.plays(status=["exit 1"] * 9, saved=["ok", _step(10), _step(20), _step(20)])
    status, _, errors = _watch(cloud, FAILURES="2")
    assert status == 1 and "the run has ended on a host, 2 times" in errors
    assert errors.count("the run has ended on a host (1 of 2)") == 2
    assert cloud.kinds() == ["create", "bootstrap", "start", "stop", "start", "stop", "start"]


def test_what_is_saved_while_it_runs_counts_too(cloud):
    """On a disk that goes with the slice nobody can look afterwards."""
    running = ["running"] * 10
    steps = [_step(10)] * 3
    cloud.plays(status=["exit 1", *running, "exit 1", "exit 1"], saved=["ok", "ok", *steps])
    status, _, errors = _watch(cloud, FAILURES="2")
    assert status == 1 and errors.count("the run has ended on a host (1 of 2)") == 2
    looks = [words for words in cloud.calls() if words[:2] == ["storage", "ls"] and "*" in words[2]]
    assert len(looks) == 1 + 3 + 1, (
        "at the start, at each failure, and once in ten looks at a run that runs"
    )


@pytest.mark.parametrize(
    "saved",
    [
        [_step(10), _step(9), _step(10)],
        [f"{_step(8)}\n{_step(10)}", _step(10), f"{_step(8)}\n{_step(10)}"],
        [
            _step(10),
            _step(10),
            f"{_step(10)}\ngs://bucket/run/apr/sft/checkpoints/20.orbax-checkpoint-tmp-7/",
        ],
        [_step(10), _step(10), f"{_step(10)}\ngs://bucket/run/apr/sft/checkpoints/20/params/"],
        [_step(10), "ok", _step(10)],
    ],
)
def test_only_a_later_whole_step_is_progress(cloud, saved):
    cloud.plays(status=["exit 1"] * 9, saved=saved)
    status, _, errors = _watch(cloud, FAILURES="2")
    assert status == 1 and errors.count("the run has ended on a host (1 of 2)") == 1, errors


def test_first_step_of_a_new_stage_is_progress(cloud):
    """Steps are compared as numbers: 10 comes after 9."""
    first = _step(9)
    cloud.plays(status=["exit 1"] * 9, saved=[first, _step(10), f"{first}\n{_step(0, 'apr/rl')}"])
    status, _, errors = _watch(cloud, FAILURES="2")
    assert status == 1 and errors.count("the run has ended on a host (1 of 2)") == 2, errors


def test_hosts_that_cannot_be_set_up(cloud):
    cloud.plays(bootstrap=["fail"] * 9)
    status, _, errors = _watch(cloud)
    assert (
        status == 1
        and "the hosts could not be set up, 3 times" in errors
        and "still there, and costs" in errors
    )
    assert cloud.kinds() == ["create", "bootstrap", "bootstrap", "bootstrap"]


def test_host_that_never_comes_up_costs_a_slice(cloud):
    """The run is given up at the cap of slices."""
    cloud.plays(ready=["down 2"])
    status, _, errors = _watch(cloud, SLICE_TRIES="2")
    assert status == 1 and errors.count("host 2 of apr never came up") == 2
    assert "a host never came up, 2 times, and nothing was saved in between: giving up" in errors
    assert cloud.kinds() == ["create", "delete"] * 2 and not (cloud.folder / "state").exists()


def test_a_quota_that_never_ends_ends_at_the_cap(cloud):
    cloud.plays(create=["quota"] * 9)
    status, _, errors = _watch(cloud, SLICE_TRIES="4")
    assert (
        status == 1
        and "no slice came of the request, 4 times" in errors
        and "slice.sh status shows" in errors
    )
    assert cloud.kinds() == ["create"] * 4


def test_requests_that_fail_end_at_the_cap(cloud):
    cloud.plays(create=["FAILED"] * 9)
    status, _, errors = _watch(cloud, SLICE_TRIES="3")
    assert status == 1 and "no slice came of the request, 3 times" in errors
    assert cloud.kinds() == ["create", "delete"] * 3


def test_preemptions_before_any_save_end_at_the_cap(cloud):
    cloud.plays(status=["preempt"] * 9)
    status, _, errors = _watch(cloud, SLICE_TRIES="2")
    assert status == 1 and "the slice is SUSPENDED (preempted?), 2 times" in errors
    assert cloud.kinds() == ["create", "bootstrap", "start", "delete"] * 2


def test_wrong_use_of_a_command_ends_it(cloud):
    cloud.plays(create=["usage"] * 9)
    status, _, errors = _watch(cloud)
    assert status == 2 and "slice.sh create refuses its command or a setting" in errors
    assert cloud.kinds() == ["create"]


@pytest.mark.parametrize(
    ("kind", "told"),
    [
        ("check", "gcloud finds no TPU_TYPE=v5litepod-16 in TPU_ZONE=us-west4-a"),
        ("bucket", "RUN=gs://bucket/run: gcloud can't list gs://bucket"),
    ],
)
def test_what_the_cloud_lacks_is_told_first(cloud, kind, told):
    """Nothing is made before."""
    cloud.plays(**{kind: ["fail"]})
    status, _, errors = _watch(cloud)
    assert status == 2 and told in errors
    assert len(cloud.calls()) <= 2 and cloud.kinds() == []


@pytest.mark.parametrize(
    ("missing", "told"),
    [("wheel", "dist/ has no wheel of apr_jax: make wheel"), ("gcloud", "no gcloud")],
)
def test_what_is_missing_here_is_told_first(cloud, tmp_path, missing, told):
    """Nothing is made before."""
    if missing == "wheel":
        shutil.rmtree(cloud.clone / "dist")
    tools = tmp_path / "tools"
    tools.mkdir()
    for name in ("bash", "dirname", "env", "sed"):
        (tools / name).symlink_to(shutil.which(name))
    if missing == "wheel":
        (tools / "gcloud").symlink_to(cloud.folder / "bin" / "gcloud")
    status, said, errors = cloud.call("watch.sh", "--config", CONFIG, PATH=str(tools))
    assert (status, said) == (2, "") and cloud.calls() == []
    assert told in errors and len(errors.splitlines()) == 1
