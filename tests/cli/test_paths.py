"""Paths on the command line: a wrong one is refused by name before anything runs."""

import inspect
import socket
import typing
from pathlib import Path

import pytest
import typer

from apr_jax.cli import main
from apr_jax.errors import UsageError
from apr_jax.io import storage
from apr_jax.io.runtime import CACHE_VARIABLE, cache_folder
from apr_jax.io.storage import COPIES_VARIABLE, as_path, checked, copies_folder, local_path

BAD = {
    "": "'': is empty; must be the path",
    " ": "' ': is empty",
    " gs://bucket/x": "begins or ends with white space",
    "x ": "begins or ends with white space",
    "-": "-: looks like a flag; a file of that name is ./-",
    "--out": "--out: looks like a flag",
    "~no-such-user/x": "~no-such-user/x: there is no such user",
    "s3://bucket/x": "s3://bucket/x: s3:// is not supported",
    "s3:/bucket/x": "s3:// is not supported",
    "http://host/x": "http:// is not supported",
    "file:///tmp/x": "write a path of this machine without file://, as /tmp/x",
    "GS://bucket/x": "write it as gs://bucket/x",
    "gs:/bucket/x": "write it as gs://bucket/x",
    "gs:bucket/x": "write it as gs://bucket/x",
    "gs:///bucket": "write it as gs://bucket",
    "gs://": "write it as gs://bucket/folder",
    "gs://bucket/../x": "a bucket has no folders . and ..",
}
# Flags that take paths in buckets. All other paths must be of this machine.
IN_BUCKETS = {
    "data build": {"--out", "--exclude", "--init"},
    "train sft": {"--workdir", "--data", "--init"},
    "train rl": {"--workdir", "--data", "--init"},
    "eval": {"--checkpoint", "--problems", "--out"},
    "solve": {"--checkpoint"},
    "export": {"--checkpoint"},
    "reproduce": {"--out", "--data", "--models", "--exclude"},
    "report": {"RUN"},
    "bench rollout": {"--checkpoint", "--problems"},
    "bench decode": {"--model"},
    "bench schedule": {"--checkpoint", "--problems"},
    "bench carry-over": {"--checkpoint", "--problems"},
    "bench train": {"--checkpoint", "--problems"},
}


def commands(group: typer.Typer, above: str = ""):
    """Every command of the application: its words and its function."""
    for command in group.registered_commands:
        yield f"{above}{command.name or command.callback.__name__}", command.callback
    for below in group.registered_groups:
        # A group without a name adds its commands to the group above.
        prefix = f"{above}{below.name} " if below.name else above
        yield from commands(below.typer_instance, prefix)


def is_path(annotation):
    return annotation is Path or any(is_path(part) for part in typing.get_args(annotation))


def path_parameters():
    """Every parameter that is annotated as a path: (command, flag), an argument in upper case."""
    for words, function in commands(main.app):
        for name, annotation in typing.get_type_hints(function, include_extras=True).items():
            about = next(
                (part for part in typing.get_args(annotation) if hasattr(part, "param_decls")), None
            )
            if not is_path(annotation) or about is None:
                continue
            is_option = type(about).__name__ == "OptionInfo"
            declared = [*(about.param_decls or ()), f"--{name.replace('_', '-')}"][0]
            yield words, declared if is_option else name.upper()


PARAMETERS = sorted(set(path_parameters()))


def run_nothing(application):
    """Replaces what the commands do: no path that is not refused may start a benchmark."""
    for command in application.commands.values():
        if hasattr(command, "commands"):
            run_nothing(command)
        else:
            command.callback = lambda **flags: pytest.fail(f"went on with {flags}")


@pytest.fixture
def refused(tmp_path, monkeypatch, capfd):
    """Returns a function that gives one wrong path to a command and returns the error message.

    The command must end with status 2 and one line, and write nothing.
    """
    monkeypatch.chdir(tmp_path)
    # It is made only once, because that takes longer than refusing a path.
    application = typer.main.get_command(main.app)
    run_nothing(application)
    monkeypatch.setattr(main, "app", application.main)

    def call(command, flag, text, status=2):
        given = ["--", text] if flag.isupper() else [f"{flag}={text}"]
        ended = main.run([*command.split(), *given])
        (line,) = capfd.readouterr().err.splitlines()
        assert (ended, list(tmp_path.iterdir())) == (status, []), line
        assert flag in line or status == 1
        return line

    return call


def test_every_command_has_its_paths_here():
    assert len(PARAMETERS) > 30
    assert {command for command, _ in PARAMETERS} >= set(IN_BUCKETS)
    assert {(command, flag) for command, flags in IN_BUCKETS.items() for flag in flags} < set(
        PARAMETERS
    )
    count = sum(
        is_path(each.annotation)
        for _, f in commands(main.app)
        for each in inspect.signature(f).parameters.values()
    )
    assert count == len(PARAMETERS), "each has a flag of its own"


@pytest.mark.parametrize(("command", "flag"), PARAMETERS)
def test_a_path_that_cannot_be_is_refused(command, flag, refused):
    for text, message in BAD.items():
        assert message in refused(command, flag, text)
    if flag not in IN_BUCKETS.get(command, ()):
        assert "gs://bucket/x: is in a bucket; must be a file or folder of this machine" in refused(
            command, flag, "gs://bucket/x"
        )


@pytest.mark.parametrize(
    ("command", "flag"),
    [(command, flag) for command in IN_BUCKETS for flag in sorted(IN_BUCKETS[command])],
)
def test_no_network_is_one_line(command, flag, refused, monkeypatch):
    pytest.importorskip("gcsfs")
    monkeypatch.setattr(storage, "_ANSWER_SECONDS", 0.0)
    with socket.socket() as deaf:  # It has a port and does not listen.
        deaf.bind(("127.0.0.1", 0))
        monkeypatch.setenv("STORAGE_EMULATOR_HOST", f"127.0.0.1:{deaf.getsockname()[1]}")
        assert "gs://bucket/x: no answer of 127.0.0.1" in refused(
            command, flag, "gs://bucket/x", status=1
        )


@pytest.mark.parametrize(
    ("command", "flag"), [each for each in PARAMETERS if each[1] in ("--json", "--html")]
)
def test_unwritable_output_file_is_refused_before_the_work(command, flag, refused, tmp_path):
    assert "nowhere/x.json: there is no folder nowhere" in refused(command, flag, "nowhere/x.json")
    folder = Path("/tmp")
    assert f"{folder}: is a folder; must be a file" in refused(command, flag, str(folder))


def test_paths_that_can_be():
    home = Path.home()
    assert as_path("~") == home and as_path("~/x") == local_path("~/x") == home / "x"
    for text in ("x", "./-", "./~x", "../x", "/x/y", "a b", "$HOME/x", "x:y", "c:/x", "x/s3://y"):
        assert checked(text) == text and as_path(text) == Path(text)
    for text in ("gs://bucket", "gs://bucket/x/y", "gs://bucket/~x"):
        assert checked(text) == text


def test_folders_of_the_environment_are_paths_too(monkeypatch, tmp_path):
    for variable, folder in ((CACHE_VARIABLE, cache_folder), (COPIES_VARIABLE, copies_folder)):
        monkeypatch.setenv(variable, "~/x")
        assert folder() == Path.home() / "x"
        monkeypatch.setenv(variable, "gs://bucket/x")
        with pytest.raises(
            UsageError,
            match=rf"{variable}=gs://bucket/x: is in a bucket; must be a file or folder of",
        ):
            folder()


def test_as_path_leaves_a_path_object_unchanged():
    """It refuses an address of a bucket that `Path` has already altered."""
    assert as_path(Path("~x")) == Path("~x")  # Somebody wrote ./~x.
    with pytest.raises(UsageError, match=r"gs:/bucket/x: give a path of a bucket as a string"):
        as_path(Path("gs://bucket/x"))
