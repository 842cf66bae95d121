"""Promise 22, the check before a deployment; and the commands of OPERATING.md."""

import os
import re
import subprocess
import sys
from pathlib import Path

import pytest

import index

CI = Path(__file__).resolve().parent
NAMES = [*index.API_VARIABLES, *index.REDIS_VARIABLES]
ENTRY = f"""\
import os
print("missing:", ", ".join(name for name in {NAMES} if name not in os.environ))
"""
HANG = """\
import signal, subprocess, time
signal.signal(signal.SIGTERM, signal.SIG_IGN)
subprocess.Popen(["sleep", "60"])
time.sleep(60)
"""
TESTS = """\
import importlib.util, sys
print("ran:", *sys.argv[1:] or ["rehearsal"], importlib.util.find_spec("package"))
"""
# It makes a real environment, but a `pip` that only makes a `pytest`, and has no pyoxigraph.
PYTHON3 = f"""\
{sys.executable} "$@" --without-pip
cat >.venv/bin/pip <<'END'
#!/bin/sh
echo "ran: pip $*"
printf '#!/bin/sh\\npython test.py tests' >.venv/bin/pytest
chmod +x .venv/bin/pytest
case $* in *pyoxigraph*) exit 1 ;; esac
END
chmod +x .venv/bin/pip
"""
FILES = {
    ".ci/check": (CI / "check").read_text("utf-8"),
    ".gitignore": "ignored.py\n",
    "README.md": "```sh\necho ran: README\n```\n\n```sh\necho ran: README\n```\n",
    "datavillage.yaml": "script:\n  - 'pip install more'\nentry: python index.py\n",
    "index.py": ENTRY,
    "setup.py": "",
    "test.py": TESTS,
    "../bin/python3": PYTHON3,
    "../bin/pip": "echo ran: pip of the machine",
    "../bin/pytest": "echo ran: pytest of the machine",
    "../packages/package.py": "",
}


def write(**files: str) -> None:
    for name, text in files.items():
        Path(name).parent.mkdir(exist_ok=True)
        Path(name).write_text(text, "utf-8")
        Path(name).chmod(0o755)


def run(*command: object, **options: object) -> tuple[str, int]:
    """Run a command, and wait until all that it has started has ended; return output and status."""
    options |= {"stdout": subprocess.PIPE, "stderr": subprocess.STDOUT, "text": True}
    ended = subprocess.run(command, timeout=50, **options)
    return ended.stdout, ended.returncode


def commit(**files: str) -> str:
    write(**files)
    run("git", "add", "--all")
    return run("git", "-c", "user.name=-", "-c", "user.email=-", "commit", "-qam", "-")[0]


@pytest.fixture
def check(tmp_path, monkeypatch):
    """Be in a repository with a commit that passes the check; return a function that runs it."""
    monkeypatch.setenv("PATH", f"{tmp_path}/bin:{os.environ['PATH']}")
    monkeypatch.setenv("PYTHONPATH", f"{tmp_path}/packages")
    monkeypatch.setenv("DV_URL", "https://example.org")
    (tmp_path / "project").mkdir()
    monkeypatch.chdir(tmp_path / "project")
    run("git", "init", "-q")
    commit(**FILES)
    return lambda: run("bash", tmp_path / "project/.ci/check", cwd="/")


def test_the_check_installs_tests_and_rehearses_without_the_machines_packages(check):
    output, status = check()
    steps = ["-r requirements.txt", "-e .", "more"]
    steps = [f"pip install {step}" for step in steps] + ["tests None"]
    steps += ["pip install --only-binary :all: pyoxigraph==0.5.13"]  # it goes on without it
    assert re.findall("(?m)^ran: (.*)", output) == [*steps, "rehearsal None"]
    assert output.endswith("\n\nOK\n")
    assert status == 0


WRONG_ENTRY = {"index.py": "print('missing: DV_URL')", "test.py": "exit(3)"}
WRONG_PACKAGE = {"datavillage.yaml": "script:\n  - false\n"}


@pytest.mark.parametrize(
    ("files", "steps"), [(WRONG_ENTRY, "entry, tests, rehearsal"), (WRONG_PACKAGE, "install")]
)
def test_the_check_names_the_steps_that_failed_and_ends_with_status_1(check, files, steps):
    commit(**files)
    output, status = check()
    assert output.endswith(f"\n\nFAILED: {steps}\n")
    assert status == 1


def test_the_check_tests_what_is_committed_and_names_what_is_not(check):
    write(**dict.fromkeys(("index.py", "added.py", "ignored.py"), "raise SystemExit(1)"))
    output, status = check()
    lacking = "  index.py\n  added.py\n  ignored.py (ignored by git)\n"
    assert output.endswith(f"\nNot committed, so not tested:\n{lacking}OK for what is committed\n")
    assert status == 0


def test_the_check_ends_a_step_that_takes_too_long_with_all_that_it_has_started(check):
    limits = FILES[".ci/check"].replace("ENTRY_SECONDS=30", "ENTRY_SECONDS=1")
    limits = limits.replace("\nSTEP_SECONDS=600", "\nSTEP_SECONDS=2")
    tests = f"{TESTS}if sys.argv[1:]: exec({HANG!r})\n"
    commit(**{".ci/check": limits, "index.py": HANG, "test.py": tests})
    output, _ = check()
    assert "entry: not finished after 1 s" in output
    assert "tests: not finished after 2 s" in output
    assert output.endswith("\n\nFAILED: entry, tests\n")


def test_the_check_as_a_hook_leaves_the_commit_alone(check):
    Path(".git/hooks").mkdir(exist_ok=True)
    Path(".git/hooks/pre-commit").symlink_to("../../.ci/check")
    assert "ran: rehearsal" in commit(added="of this commit")
    assert run("git", "show", "HEAD:added") == ("of this commit", 0)
    assert run("git", "status", "--porcelain") == ("", 0)


def operate(cage, text: str) -> list[str]:
    """Run the command of OPERATING.md that contains a text; return the lines that it prints."""
    page = (CI / "OPERATING.md").read_text("utf-8")
    [command] = [block for block in re.findall("(?s)```bash\n(.*?)```", page) if text in block]
    path = f"{Path(sys.executable).parent}:{os.environ['PATH']}"
    run = cage.start("bash", "-c", command, variables={"PATH": path})
    assert run.end() == 0, run.log
    return run.log.splitlines()


def add(cage, stream: str, numbers: range) -> list[str]:
    """Add events, or dead letters, with these numbers; return their IDs."""
    pipeline = cage.queue.pipeline()
    for number in numbers:
        pipeline.xadd(stream, {"msg_data": number, "error": "too\nold", "message_id": "7-0"})
    return pipeline.execute()


def test_the_operator_counts_events_and_letters_on_a_full_redis(cage):
    cage.deliver(add(cage, "events", range(3))[0])
    add(cage, "events:dead-letter", range(4))
    cage.queue.config_set("maxmemory", 1)
    assert [line.rpartition(": ")[2] for line in operate(cage, "waiting:")] == ["2", "1", "4"]


def test_letters_that_are_published_again_push_no_event_out_unread(cage):
    [letter_id, *_] = add(cage, "events:dead-letter", range(60))
    assert operate(cage, "[:500]")[0] == f"{letter_id} 7-0 too old 0"
    cage.deliver(add(cage, "events", range(-450, 0))[0])
    assert operate(cage, "published:") == ["published: 50 left: 10"]
    assert operate(cage, "published:") == ["published: 0 left: 10"]
    numbers = [int(fields["msg_data"]) for _, fields in cage.queue.xrange("events")]
    assert numbers == list(range(-450, 50))
