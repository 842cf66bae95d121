"""Promise 22, the check before a deployment."""

import os
import re
import sys

import pytest

import index

NAMES = [*index.API_VARIABLES, *index.REDIS_VARIABLES]
# It names the variables that are set, or else, as it has to, all.
ENTRY = f"import os\nprint(*[n for n in {NAMES} if n in os.environ] or ['{', '.join(NAMES)}'])\n"
FILES = {
    "datavillage.yaml": "script:\n  - 'pip install more'\nentry: python index.py\n",
    "index.py": ENTRY,
    "setup.py": "",
    "test.py": "import importlib.util as u\nprint('ran: test.py', u.find_spec('pytest'))\n",
    # It makes a real environment, but with these commands, and without pyoxigraph.
    "../bin/python3": f'{sys.executable} "$@" --without-pip\ncp $(dirname $0)/venv/* .venv/bin\n',
    "../bin/venv/pip": 'echo "ran: pip $*" && [[ $* != *pyoxigraph* ]]\n',
    "../bin/venv/pytest": "echo ran: pytest && python test.py\n",
    "../bin/pip": "echo of the machine\n",
}
COMMIT = "git add --all && git -c user.name=- -c user.email=- commit -qam -"
CHECK = "cd / && bash $OLDPWD/.ci/check"
WRONG_CODE = {"index.py": f"{ENTRY}print('more')", "test.py": "exit(3)"}
FAILED = [(WRONG_CODE, "entry, tests, rehearsal"), ({"datavillage.yaml": "- false\n"}, "install")]


@pytest.fixture
def edit(cage, monkeypatch):
    """Commit what passes the check; return a function that writes files and runs a script."""

    def edit(files: dict[str, str], then: str) -> tuple[str, int]:
        for name, text in files.items():
            (cage.folder / name).parent.mkdir(exist_ok=True)
            (cage.folder / name).write_text(text, "utf-8")
            (cage.folder / name).chmod(0o755)
        run = cage.start("bash", "-c", then)
        status = run.end()
        return run.log, status

    monkeypatch.setenv("PATH", f"{cage.parent}/bin:{os.environ['PATH']}")
    monkeypatch.setenv("PYTHONPATH", os.pathsep.join(sys.path))
    edit(FILES, then=f"git init -q && {COMMIT}")
    return edit


def test_the_check_installs_tests_and_rehearses_without_the_machines_packages(edit):
    output, status = edit({}, then=CHECK)
    steps = [f"pip install {what}" for what in ("-r requirements.txt", "-e .", "more")]
    steps += ["pytest", "test.py None", "pip install --only-binary :all: pyoxigraph==0.5.13"]
    assert re.findall("(?m)^ran: (.*)", output) == [*steps, "test.py None"]
    assert output.endswith("\n\nOK\n")
    assert status == 0


@pytest.mark.parametrize(("files", "steps"), FAILED, ids=["code", "package"])
def test_the_check_names_the_steps_that_failed_and_ends_with_status_1(edit, files, steps):
    output, status = edit(files, then=f"{COMMIT} && {CHECK}")
    assert output.endswith(f"\n\nFAILED: {steps}\n")
    assert status == 1


def test_the_check_tests_what_is_committed_and_names_what_is_not(edit):
    output, _ = edit(dict.fromkeys(("index.py", "added.py", ".env"), "exit(1)"), then=CHECK)
    lacking = "  index.py\n  added.py\n  .env (ignored by git)\n"
    assert output.endswith(f"\nNot committed, so not tested:\n{lacking}OK for what is committed\n")


def test_the_check_ends_a_step_that_takes_too_long_with_all_that_it_has_started(edit, cage):
    shorten = "sed -i 's/_SECONDS=30$/_SECONDS=1/; s/_SECONDS=600 /_SECONDS=3 /' .ci/check"
    hang = "trap '' TERM && sleep 60\n"
    files = {"../bin/venv/pytest": hang, "datavillage.yaml": f"entry: {hang}"}
    output, _ = edit(files, then=f"{shorten} && {COMMIT} && {CHECK}")
    ended = [("entry", "1"), ("tests", "3")]
    assert re.findall("(.*): not finished after (.*) s", output) == ended
    assert output.endswith("\n\nFAILED: entry, tests\n")
    cage.runs[-1].assert_leaves_nothing()


def test_the_check_as_a_hook_leaves_the_commit_alone(edit):
    edit({}, then="mkdir -p .git/hooks && ln -s ../../.ci/check .git/hooks/pre-commit")
    assert "ran: pytest" in edit({"added": "of this commit"}, then=COMMIT)[0]
    assert edit({}, then="git status --porcelain && git show HEAD:added") == ("of this commit", 0)
