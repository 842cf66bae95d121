"""Promises 20 and 21: the rehearsal, its check of Turtle, the stand-in cage, and pytest."""

import json
import logging
import os
import pty
import re
import signal
import socket
import sys
import threading
import time
from pathlib import Path

import pytest

import index
import process
import test

PROJECT = Path(__file__).parent.parent
FINE = '<a:b> <a:c> "d" .\n'


@pytest.fixture
def rehearse(monkeypatch, capsys):
    """Return a function that does what `python test.py` does; it returns status and output."""

    def rehearse(process_event, *arguments: object, users=("ann", "ben"), event=None):
        monkeypatch.setattr(process, "process_event", process_event)
        monkeypatch.setattr(test, "USERS", dict.fromkeys(users, FINE))
        arguments = [*arguments, "--event", json.dumps(event or {})]
        monkeypatch.setattr(sys, "argv", ["test.py", *map(str, arguments)])
        return test.rehearse_from_command_line(), capsys.readouterr().out

    # The rehearsal is a process that ends, so it restores nothing.
    monkeypatch.setattr(index, "STOP_SIGNALS", index.STOP_SIGNALS)
    for name in ("WORKERS", "PROGRESS_SECONDS"):
        monkeypatch.setattr(process, name, getattr(process, name))
    root, level = logging.getLogger(), logging.getLogger().level
    monkeypatch.setattr(root, "handlers", [])
    yield rehearse
    root.setLevel(level)


def storing(*results: tuple[str, str, str]):
    """Return a `process_event` that stores these results: user, kind, Turtle."""
    return lambda event: [store(user_id, turtle, kind) for user_id, kind, turtle in results]


def store(*arguments: str) -> None:
    process.DatavillageApi().store(*arguments)


def fetch_and_fail(event: dict) -> None:
    process.for_each_user(test.USERS, process.DatavillageApi().user_data)
    raise KeyError


# 20: the rehearsal
ANN, BEN = ("ann", "inferences", FINE), ("ben", "inferences", FINE)
EMPTY, UNEXPLAINED = ("ben", "inferences", " \n"), ("ben", "explains", "")
WRONG, RELATIVE = ("ben", "explains", "oops"), ("ben", "inferences", "<x> <a:b> 1 .")
SUMMARIES = {
    # The algorithm, whom the event names, what is shown above the summary, and its numbers.
    "all are well": (storing(ANN, BEN), None, "    <a:b> <a:c>", (2, 2, 0, 0, 0, 0, 0)),
    "one is missing": (storing(BEN), None, "without a result: ann", (2, 1, 1, 0, 0, 0, 0)),
    "another's": (storing(ANN, BEN), ["ben"], "not asked for: ann", (1, 2, 0, 1, 0, 0, 1)),
    "empty": (storing(EMPTY), ["ben"], "empty: ben: inferences", (1, 1, 0, 0, 1, 0, 0)),
    "empty explanation": (storing(BEN, UNEXPLAINED), ["ben"], "    ", (1, 2, 0, 0, 0, 0, 0)),
    "not valid": (storing(ANN, WRONG), None, "not valid: ben: expl", (2, 2, 0, 0, 0, 1, 1)),
    "relative IRI": (storing(ANN, RELATIVE), None, "not valid: ben: infer", (2, 2, 0, 0, 0, 1, 1)),
    "malformed": (storing(), "ann", "without a result: ben", (2, 0, 2, 0, 0, 0, 1)),
    "ignored": (lambda event: None, None, "no data asked for, noth", (2, 0, 0, 0, 0, 0, 0)),
    "failed": (fetch_and_fail, ["ben"], "without a result: ben", (1, 0, 1, 0, 0, 0, 1)),
}


@pytest.mark.parametrize(
    ("process_event", "user_ids", "shown", "numbers"), SUMMARIES.values(), ids=SUMMARIES
)
def test_the_summary_counts_what_is_odd(rehearse, process_event, user_ids, shown, numbers):
    status, text = rehearse(process_event, event={"userIds": user_ids})
    line, summary = text.splitlines()[-2:]
    names = ("users", "results", "without a result", "not asked for", "empty", "not valid")
    counts = ", ".join(map("{}: {}".format, names, numbers))
    assert re.fullmatch(rf"{counts}, seconds: \d\.\d, exit status: {numbers[-1]}", summary)
    assert status == numbers[-1]
    assert line.startswith(shown)


def test_without_pyoxigraph_it_is_unknown_what_is_not_valid(rehearse, monkeypatch):
    monkeypatch.setitem(sys.modules, "pyoxigraph", None)
    status, text = rehearse(storing(("ann", "inferences", "oops")))
    advice, summary = text.splitlines()[-2:]
    assert re.search(r"python\S* -m pip install pyoxigraph==[\d.]+$", advice)
    assert ", not valid: unknown without pyoxigraph, " in summary
    assert status == 0


def test_results_are_written_to_files(rehearse, tmp_path):
    folder, turtle = tmp_path / "new" / "results", '<a:b> <a:c> "Zoë\x0c\x85" .\r\n# 佐江'
    rehearse(storing(("a/b ë", "explains", turtle)), "--results", folder, users=["a/b ë"])
    assert (folder / "explains" / "a%2Fb%20%C3%AB.ttl").read_bytes() == turtle.encode()


def test_files_and_folders_of_files_are_the_users(rehearse, tmp_path):
    def process_event(event: dict) -> None:
        user_ids = process.DatavillageApi().active_users()
        found.update(process.for_each_user(user_ids, process.DatavillageApi().user_data))

    found: dict[str, str] = {}
    (tmp_path / "folder").mkdir()
    for name in ("zoë.ttl", "folder/b.c.ttl", "folder/.d.ttl", "folder/e.txt"):
        (tmp_path / name).write_bytes(f"\ufeff# {name}\r\n".encode())
    rehearse(process_event, tmp_path / "zoë.ttl", tmp_path / "folder")
    assert found == {"zoë": "# zoë.ttl\r\n", "b.c": "# folder/b.c.ttl\r\n"}


def test_what_the_cage_does_not_show_is_shown_and_tracebacks_are_marked(rehearse):
    def work(user_id: str) -> None:
        raise process.ProcessingError("a\n\nb") if user_id == "ann" else ValueError("1\n\n3")

    def process_event(event: dict) -> None:
        print("printed")
        logging.getLogger("library").warning("by a library")
        process.for_each_user(["ann", "ben"], work, skip_failed=True)
        raise type("SyntaxErrorOfALibrary", (SyntaxError,), {"__str__": lambda self: "its text"})

    _, output = rehearse(process_event)
    assert {"printed", "home| ValueError: 1", "home| ", "home| 3"} <= {*output.split("\n")}
    assert " WARNING by a library\n" in output
    assert "\nhome| its text\n" in output
    assert output.count("Traceback") == output.count("\nhome| Traceback") == 2


def test_process_event_runs_in_the_main_thread_of_the_rehearsal(rehearse):
    threads: list[threading.Thread] = []
    rehearse(lambda event: threads.append(threading.current_thread()))
    assert threads == [threading.main_thread()]


def test_progress_names_the_one_user_in_progress_and_is_not_repeated(rehearse):
    def process_event(event: dict) -> None:
        assert process.PROGRESS_SECONDS <= 5  # a rehearsal is watched
        process.PROGRESS_SECONDS = 0.05
        process.for_each_user(["ann", "ben"], lambda user_id: time.sleep(0.3 * (user_id == "ann")))

    status, output = rehearse(process_event)
    assert output.count("0 of 2 users") == 1
    assert "INFO 0 of 2 users, 0 failed, in progress: user 'ann'\n" in output
    assert status == 0


def test_a_breakpoint_stops_one_user_and_the_rehearsal_ends_at_ctrl_c(cage):
    cage.edit("def compute(user_id, data):\n    breakpoint()\n    return user_id")
    terminal, end = pty.openpty()
    run = cage.start(sys.executable, "-u", "test.py", stdin=end)
    run.until(lambda: "(Pdb) " in run.log)
    time.sleep(0.1)
    assert run.log.count("-> ") == 1  # one user at a time
    os.write(terminal, b"p 'user', user_id\nc\n")
    run.until(lambda: "('user', 'alice')" in run.log and run.log.count("(Pdb) ") > 2)
    os.killpg(run.pid, signal.SIGINT)
    assert run.wait(10) == -signal.SIGINT


@pytest.mark.parametrize(
    ("work", "name"), [("hang()", "process_event"), ("for_each_user(['x'], hang)", "user 'x'")]
)
def test_ctrl_c_shows_the_user_and_the_place(cage, work, name):
    hang = "def hang(_=None):\n    print('hangs')\n    time.sleep(99)"
    cage.edit(f"{hang}\ndef process_event(event):\n    {work}")
    run = cage.start(sys.executable, "-u", "test.py")
    run.until(lambda: "hangs\n" in run.log)
    os.killpg(run.pid, signal.SIGINT)
    assert run.wait(10) == -signal.SIGINT
    stopped = run.log.partition(f"\nstopped in {name}:\n")[2]
    assert re.search(r'/process\.py", line \d+, in hang\n    time\.sleep\(99\)', stopped)


# 20: what is no Turtle is never called valid
VALID = """\
@prefix e: <https://example.org/> .
e:zoe e:says "it's \\"<file:a> and <b>\\"", '''a
b''', "x"@en-US, "1"^^e:type, 1, 1.5, true ; a e:a%20b . # <file:c>
[] e:knows _:b1, (e:a <https://example.org/%7B%7D>) .
"""
INVALID = {
    "a quote": '<a:a> <a:b> "say "hi"" .',
    "a space in an IRI": "<a:a b> <a:b> 1 .",
    "a graph": "<a:g> { <a:a> <a:b> 1 . }",
    "an emoji of json.dumps": r'<a:a> <a:b> "\ud83d\ude00" .',
    "N3": "<a:a> = <a:b> .",
    "deep nesting": "[" * 100_000,
    "a surrogate": "\udcff",
}
MISTAKES = {
    "a relative IRI became FILE:///home/a; parse": "<FILE:///home/a> <a:b> 1 .",
    "a relative IRI became file:a; ": '<a:a> <a:b> "1"^^<file:a> .',
    "<card#me> is relative, so it depends on": "<a:a> <a:b> 1 . <card#me> <a:b> 1 .",
}


@pytest.mark.parametrize("turtle", INVALID.values(), ids=INVALID)
def test_what_is_no_turtle_is_not_valid(turtle):
    assert len(test.error_in(turtle).splitlines()) == 1


@pytest.mark.parametrize("lines", [1, 10_000])
def test_an_error_names_the_line(lines):
    text = "<a:a> <a:b> 1 .\n" * (lines - 1) + "<a:a> <a:b> oops .\n"
    assert re.search(rf"line {lines}\b.*oops", test.error_in(text))


@pytest.mark.parametrize(("reason", "turtle"), [*MISTAKES.items(), ("", VALID), ("", "")])
def test_turtle_is_valid_and_a_relative_iri_is_yet_a_mistake(reason, turtle):
    assert test.error_in(turtle) == ""
    mistake = test.mistake_in(turtle)
    assert mistake.startswith(reason)
    assert bool(mistake) == bool(reason)


def test_the_first_example_of_the_readme_runs_as_it_is_printed(monkeypatch):
    import pyoxigraph

    readme = (PROJECT / "README.md").read_text(encoding="utf-8")
    [example] = re.findall(r"(?ms)^```python\n(def compute.*?)^```", readme)
    exec(example, names := vars(process) | {"pyoxigraph": pyoxigraph})
    monkeypatch.setattr(process, "compute", names["compute"])
    data = '<https://example.org/zoe> <https://schema.org/birthDate> "1987-05-01" .\n'
    data += "<relative> <https://example.org/with a space> 1 ."
    with test.stand_in_cage({"zoe": data}) as cage:
        process.process_event({})
    result = "<https://example.org/zoe> <https://example.org/decade> 1980 ."
    assert cage.stored["zoe", "inferences"].strip() == result


# 21: the stand-in cage and pytest
def test_other_calls_are_answered_as_the_test_or_else_answers_says(monkeypatch):
    answers = {"GET /a b": "text", "GET /a%20b?c=1": "query", "PATCH /é": 201, "GET /d": "not this"}
    monkeypatch.setattr(test, "ANSWERS", answers)
    answer = {"GET /d": 409, "GET activeUsers": 410}.get
    with test.stand_in_cage({"ann": ""}, answer) as cage:
        api = process.DatavillageApi()
        assert api.call("GET", "/a%20b?c=2") == b"text"
        assert api.call("GET", "/a%20b?c=1") == b"query"
        assert api.call("PATCH", "/%C3%A9", "ë".encode()) == b""
        errors = {409: lambda: api.call("GET", "/d"), 410: api.active_users}
        errors[404] = lambda: api.user_data("eve")
        for status, call in errors.items():
            with pytest.raises(process.DatavillageApiError, match=f" answered {status}$"):
                call()
    assert cage.sent["PATCH /é"] == "ë"
    assert cage.api.requests[3:] == ["GET /d", "GET activeUsers", "GET activeUsers/eve/data"]


def test_no_name_server_is_asked(monkeypatch):
    for name in ("getfqdn", "gethostbyaddr", "gethostbyname"):
        monkeypatch.setattr(socket, name, lambda *_: 1 / 0)
    with test.stand_in_cage({"ann": ""}):
        assert process.DatavillageApi().active_users() == ["ann"]


def test_pytest_finds_the_authors_tests_and_shows_which_hangs(cage):
    names = ["test_a.py", "a/test_a.py", "b/test_a.py", "a/unit/test_a.py"]
    text = "import test, time\ndef test_own():\n    time.sleep(0.3)\n"
    for name, content in {**dict.fromkeys(names, text), "package/test.py": "exit()"}.items():
        (cage.folder / name).parent.mkdir(parents=True, exist_ok=True)
        (cage.folder / name).write_text(content, encoding="utf-8")
    settings = cage.folder / ".pytest.ini"
    shorter = settings.read_text("utf-8").replace("\nfaulthandler_timeout = 60", "\n{} = 0.1")
    settings.write_text(shorter.format("faulthandler_timeout"), "utf-8")
    run = cage.start(sys.executable, "-m", "pytest", "-k", "test_own")
    assert run.end() == 0
    assert " 4 passed" in run.log
    assert re.search(r'Timeout .*\n(.*\n)+ +File ".*/test_a.py", line 3 in', run.log)


def test_the_tests_of_the_cage_come_last_and_pass_whatever_the_author_writes(cage):
    cage.edit("""
import logging.config, warnings
logging.config.dictConfig({"version": 1})
logging.disable(logging.CRITICAL)
warnings.simplefilter("error")
os.chdir("/")
WORKERS = 3
DATA = event = client = users = results = None
def compute(user_id, data): raise ValueError
def process_event(event): raise ValueError(event["own"])
def check_before_event(): raise OSError
""")
    command = [sys.executable, "-m", "pytest", "-v", "-p", "no:randomly"]
    run = cage.start(*command, variables={"http_proxy": "http://127.0.0.1:9"})
    run.end()
    outcomes = re.findall(r"(?m)^test\.py::(\w+) (PASSED|FAILED|ERROR)", run.log)
    own, of_the_cage = outcomes[:4], outcomes[4:]
    assert {outcome for _, outcome in own} == {"FAILED"}
    assert len(of_the_cage) >= 8
    assert all(name.startswith("test_cage_") for name, _ in of_the_cage)
    assert {outcome for _, outcome in of_the_cage} == {"PASSED"}
    assert len(run.log.splitlines()) < 90  # four short tracebacks


@pytest.mark.parametrize("module", [process, test])
def test_no_name_that_an_author_is_likely_to_use_is_taken(module):
    likely = "DATA EVENTS LOCK PAUSES_SECONDS RETRIES TIMEOUT_SECONDS TURTLE USER alice api cage "
    likely += "client count data describe event graph model parse result results store user users"
    assert not {*likely.split()} & {*vars(module)}


def test_everything_is_restored_after_a_stand_in_cage():
    def state() -> list:
        handlers = [signal.getsignal(number) for number in index.STOP_SIGNALS]
        return [dict(os.environ), index.connect, index.Algorithm, *handlers]

    before = state()
    with pytest.raises(KeyError), test.stand_in_cage({}) as cage:
        cage.publish({})
        index.main()
        raise KeyError
    assert state() == before
    with pytest.raises(ConnectionRefusedError):
        socket.create_connection(("127.0.0.1", cage.api.server_port)).close()


@pytest.mark.parametrize(
    ("arguments", "reason"),
    [
        ("nowhere.ttl", "nowhere.ttl: [Errno 2] No such file or directory: 'nowhere.ttl'"),
        ("ann.ttl empty", "empty: no *.ttl file in this folder"),
        ("latin.ttl", "latin.ttl: 'utf-8' codec can't decode byte 0xeb in position 2"),
        ("ann.ttl more", "more/ann.ttl: another file for the user 'ann'"),
        ("--event {a", "--event: Expecting property name enclosed in double quotes"),
        ("--event []", "--event: not a JSON object"),
        pytest.param(f"--event {'[' * 100_000}", "--event: ", id="deep nesting"),
        ("--results ann.ttl", "--results: [Errno 20] Not a directory: 'ann.ttl/"),
    ],
)
def test_a_bad_argument_is_one_line_and_status_2(capsys, monkeypatch, tmp_path, arguments, reason):
    monkeypatch.chdir(tmp_path)
    for folder in ("empty", "more"):
        os.mkdir(folder)
    for file in ("ann.ttl", "more/ann.ttl", "latin.ttl"):
        Path(file).write_bytes(b"Zo\xeb" if file == "latin.ttl" else b"")
    monkeypatch.setattr(sys, "argv", ["test.py", *arguments.split()])
    with pytest.raises(SystemExit, match=r"^2$"):
        test.rehearse_from_command_line()
    [line] = capsys.readouterr().err.splitlines()
    assert line.startswith(reason)
