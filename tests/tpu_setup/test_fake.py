"""The fake `gcloud` and `kubectl` take no word that the real ones would not, and the documents'
commands are among theirs.
"""

import re
import shlex
import shutil
import subprocess

import pytest
from clouds import ROOT
from fake_gcloud import ANYWHERE, COMMANDS, parse
from fake_kubectl import FLAGS

LIST = "compute tpus queued-resources list --zone=us-west4-a"


@pytest.mark.parametrize(
    ("words", "told"),
    [
        ("compute tpus queued-resource list --zone=us-west4-a", "Invalid choice"),
        ("compute tpus queued-resources list", "argument --zone: Must be specified."),
        ("compute tpus queued-resources delete --zone=us-west4-a", "1 words expected, got []"),
        (f"{LIST} apr", "0 words expected, got ['apr']"),
        (f"{LIST} --filtre=x", "unrecognized arguments: --filtre=x"),
        (f"{LIST} -q", "unrecognized arguments: -q"),
        (f"{LIST} --filter", "argument --filter: wrong or missing value"),
        (f"{LIST} --quiet=true", "argument --quiet: wrong or missing value"),
    ],
)
def test_a_slip_ends_with_2(cloud, words, told):
    command = [cloud.folder / "bin" / "gcloud", *words.split()]
    ended = subprocess.run(command, env=cloud.environment, capture_output=True, text=True)
    assert ended.returncode == 2 and told in ended.stderr


def test_the_documents_commands_are_known():
    text = (ROOT / "docs" / "launch.md").read_text() + (
        ROOT / "tpu_setup" / "README.md"
    ).read_text()
    commands = re.findall(r"^ {4}gcloud (.*)$|`gcloud ([^`]* --[^`]*)`", text, re.M)
    assert len(commands) > 5
    for block, inline in commands:
        parse(shlex.split(block or inline, comments=True))


def test_the_way_of_one_vm_is_in_order():
    text = (ROOT / "docs" / "launch.md").read_text()
    (block,) = re.findall(r"## One TPU VM\n.*?((?:^ {4}.*\n)+)", text, re.M | re.S)
    steps = (
        "buckets create",
        "tpu-vm create",
        "tpu-vm ssh",
        "python install 3.12",
        "git clone",
        "make venv",
        "tpu,gcs",
        "reproduce",
        "exit",
        "tpu-vm delete",
    )
    places = [block.find(step) for step in steps]
    assert -1 not in places and places == sorted(places)


@pytest.mark.slow
@pytest.mark.skipif(shutil.which("gcloud") is None, reason="no gcloud")
@pytest.mark.parametrize("name", COMMANDS)
def test_gcloud_has_these_flags(name):
    ended = subprocess.run(
        ["gcloud", *name.split(), "--help"], capture_output=True, text=True, timeout=300
    )
    assert ended.returncode == 0, ended.stderr
    said = re.sub(r"\x1b\[[\d;]*m|.\x08", "", ended.stdout)
    _, needed, allowed = COMMANDS[name]
    for flag in needed | allowed:
        assert re.search(rf"--(\[no-\])?{flag}\b", said), flag
    for flag in ANYWHERE:
        assert f"--{flag}" in said, flag


@pytest.mark.slow
@pytest.mark.skipif(shutil.which("kubectl") is None, reason="no kubectl")
@pytest.mark.parametrize("verb", FLAGS)
def test_kubectl_has_these_flags(verb):
    said = ""
    for words in ([verb, "--help"], ["options"]):  # Flags of the verb, and of every verb.
        said += subprocess.run(
            ["kubectl", *words], capture_output=True, text=True, check=True, timeout=300
        ).stdout
    for flag in FLAGS[verb]:
        assert f" {flag}=" in said, flag
