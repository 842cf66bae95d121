"""Promises 20 and 21: the rehearsal, its check of Turtle, the stand-in cage, and pytest."""

import json
import logging
import os
import pty
import re
import signal
import socket
import sys
import time
from pathlib import Path
from unittest.mock import Mock

import pyoxigraph
import pytest

import index
import process
import test

PROJECT = Path(__file__).parent.parent
FINE = '<a:b> <a:c> "d" .\n'


@pytest.fixture
def rehearse(monkeypatch, capsys, caplog):
    """Return a function that does what `python test.py` does; it returns status and output."""

    def rehearse(process_event, *arguments: object) -> tuple[int, str]:
        monkeypatch.setattr(process, "process_event", process_event)
        monkeypatch.setattr(sys, "argv", ["test.py", *map(str, arguments)])
        return test.rehearse_from_command_line(), capsys.readouterr().out

    monkeypatch.setattr(test, "USERS", {"ann": FINE, "ben": FINE})
    # The rehearsal is a process that ends, so it restores nothing.
    monkeypatch.setattr(index, "STOP_SIGNALS", index.STOP_SIGNALS)
    for name in ("WORKERS", "PROGRESS_SECONDS"):
        monkeypatch.setattr(process, name, getattr(process, name))
    monkeypatch.setattr(logging.getLogger(), "handlers", [])
    caplog.set_level("INFO")  # and so the level is restored
    return rehearse


def do(method: str, *calls: tuple):
    """Return a `process_event` that calls a method of the API with each of these arguments."""
    return lambda event: [getattr(process.DatavillageApi(), method)(*call) for call in calls]


ANN, BEN, UNEXPLAINED = ("ann", FINE), ("ben", FINE), ("ben", "", "explains")
EMPTY, WRONG, RELATIVE = ("ben", " \n"), ("ben", "oops", "explains"), ("ben", "<x> <a:b> 1 .")
SUMMARIES = {
    # The algorithm, whom the event names, what is shown above the summary, and its numbers.
    "all are well": (do("store", UNEXPLAINED, ANN, BEN), None, "    <a:b> ", (2, 3, 0, 0, 0, 0, 0)),
    "another's": (do("store", ANN, BEN), ["ben"], "not asked for: ann", (1, 2, 0, 1, 0, 0, 1)),
    "empty": (do("store", EMPTY), ["ben"], "empty: ben: inferences", (1, 1, 0, 0, 1, 0, 0)),
    "not valid": (do("store", ANN, WRONG), None, "not valid: ben: exp", (2, 2, 0, 0, 0, 1, 1)),
    "relative": (do("store", ANN, RELATIVE), None, "not valid: ben: inf", (2, 2, 0, 0, 0, 1, 1)),
    "malformed": (do("store"), "ann", "without a result: ben", (2, 0, 2, 0, 0, 0, 1)),
    "no users": (do("store"), None, "no data asked for, nothing st", (2, 0, 0, 0, 0, 0, 0)),
    "unknown": (do("user_data", ["eve"]), ["eve"], "without a result: ", (1, 0, 1, 0, 0, 0, 1)),
}
VALID = """@prefix e: <https://example.org/> . [] e:knows _:b1, (e:a <https://example.org/%7B%7D>) .
e:zoe e:says "it's \\"<file:a> and <b>\\"", '''a
b''', "x"@en-US, "1"^^e:type, 1, true ; a e:a%20b . # <file:c>"""
TURTLE = {
    "all of Turtle": (VALID, ""),
    "a space in an IRI": ("<a:a b> <a:b> 1 .", ".+"),
    "a graph": ("<a:g> { <a:a> <a:b> 1 . }", ".+"),
    "an emoji of json.dumps": (r'<a:a> <a:b> "\ud83d\ude00" .', ".+"),
    "N3": ("<a:a> = <a:b> .", ".+"),
    "deep nesting": ("[" * 100_000, ".+"),
    "a surrogate": ("\udcff", ".+"),
    "a word in line 10,000": ("<a:a> <a:b> 1 .\n" * 9_999 + "oops", r".+ line 10000\b.*oops.*"),
    "a file": ('<a:a> <a:b> "1"^^<FILE:///a> .', "a relative IRI became FILE:///a; parse .+"),
    "relative": ("<a:a> <a:b> 1 . <card#me> <a:b> 1 .", "<card#me> is relative, so it depends .+"),
}
BAD_ARGUMENTS = {
    "no file": ("nowhere.ttl", "nowhere.ttl: [Errno 2] No such file or directory: 'nowhere.ttl'"),
    "no data": (".ci", ".ci: no *.ttl file in this folder"),
    "two files": ("README.md README.md", "README.md: another file for the user 'README'"),
    "no object": ("--event []", "--event: not a JSON object"),
    "deep nesting": (f"--event {'[' * 100_000}", "--event: "),
    "no folder": ("--results README.md", "--results: [Errno 20] Not a directory: 'README.md/"),
}


@pytest.mark.parametrize(("work", "users", "shown", "numbers"), SUMMARIES.values(), ids=SUMMARIES)
def test_the_summary_counts_what_is_odd(rehearse, work, users, shown, numbers):
    status, text = rehearse(work, "--event", json.dumps({"userIds": users}))
    line, summary = text.splitlines()[-2:]
    names = ("users", "results", "without a result", "not asked for", "empty", "not valid")
    counts = ", ".join(map("{}: {}".format, names, numbers))
    assert re.fullmatch(rf"{counts}, seconds: \d\.\d, exit status: {numbers[-1]}", summary)
    assert status == numbers[-1]
    assert line.startswith(shown)


def test_without_pyoxigraph_it_is_unknown_what_is_not_valid(rehearse, monkeypatch):
    monkeypatch.setitem(sys.modules, "pyoxigraph", None)
    _, text = rehearse(do("store", WRONG))
    assert re.search(r"-m pip install pyoxigraph==[\d.]+\n.*, not valid: unknown without ", text)


def test_results_are_written_to_files(rehearse, tmp_path, monkeypatch):
    folder, turtle = tmp_path / "new" / "results", '<a:b> <a:c> "Zoë\x0c\x85" .\r\n# 佐江'
    monkeypatch.setattr(test, "USERS", {"a/b ë": ""})
    rehearse(do("store", ("a/b ë", turtle, "explains")), "--results", folder)
    assert (folder / "explains" / "a%2Fb%20%C3%AB.ttl").read_bytes() == turtle.encode()


def test_files_and_folders_of_files_are_the_users(rehearse, tmp_path, monkeypatch):
    (tmp_path / "folder").mkdir()
    for name in ("zoë.ttl", "folder/b.c.ttl", "folder/.d.ttl", "folder/e.txt"):
        (tmp_path / name).write_bytes(f"# {name}\r\n".encode())
    monkeypatch.setattr(process, "compute", lambda user_id, data: data)
    _, output = rehearse(process.process_event, tmp_path / "zoë.ttl", tmp_path / "folder")
    found = re.findall(r"(.*): inferences\n    (.*)\n", output)
    assert found == [("zoë", "# zoë.ttl\r"), ("b.c", "# folder/b.c.ttl\r")]


def test_what_the_cage_does_not_show_is_shown_and_tracebacks_are_marked(rehearse):
    def process_event(event: dict) -> None:
        print("printed")
        logging.getLogger("library").warning("by a library")
        work = Mock(side_effect=[process.ProcessingError(), ValueError("1\n\n3")])
        process.for_each_user(["ann", "ben"], work, skip_failed=True)
        raise type("SyntaxErrorOfALibrary", (SyntaxError,), {"__str__": lambda self: "its text"})

    _, output = rehearse(process_event)
    assert {"printed", "home| ValueError: 1", "home| 3", "home| its text"} <= {*output.split("\n")}
    assert " WARNING by a library\n" in output
    assert output.count("Traceback") == output.count("\nhome| Traceback") == 2


def test_progress_names_the_one_user_in_progress_and_is_not_repeated(rehearse):
    def process_event(event: dict) -> None:
        process.PROGRESS_SECONDS /= 40  # it is some seconds in a rehearsal, which is watched
        process.for_each_user(["ann", "ben"], lambda user_id: time.sleep(0.3 * (user_id == "ann")))

    _, output = rehearse(process_event)
    assert re.findall("0 of 2 .*", output) == ["0 of 2 users, 0 failed, in progress: user 'ann'"]


def test_a_breakpoint_stops_one_user_and_ctrl_c_names_that_user(cage):
    cage.edit("def compute(user_id, data):\n    breakpoint()\n    return user_id")
    terminal, end = pty.openpty()
    run = cage.start(sys.executable, "-u", "test.py", stdin=end)
    os.write(terminal, b"p 'user', user_id\nc\n")
    run.until(lambda: "('user', 'alice')" in run.log and run.log.count("(Pdb) ") > 2)
    os.killpg(run.pid, signal.SIGINT)
    run.end()
    assert re.search(r"\nstopped in user 'bob':\n(.+\n)+.+ in cmdloop\n", run.log)  # of pdb


def test_ctrl_c_ends_the_rehearsal_and_shows_where_its_main_thread_is(cage):
    cage.edit("def process_event(event):\n    print('hangs')\n    time.sleep(99)")
    run = cage.start(sys.executable, "-u", "test.py")
    run.until(lambda: "hangs\n" in run.log)
    os.killpg(run.pid, signal.SIGINT)
    assert run.wait(10) == -signal.SIGINT
    assert re.search(r"\nstopped in process_event:\n(.+\n)+    time\.sleep\(99\)\n", run.log)


@pytest.mark.parametrize(("turtle", "error"), TURTLE.values(), ids=TURTLE)
def test_an_error_or_a_relative_iri_in_turtle_is_one_line(turtle, error):
    assert re.fullmatch(error, test.error_in(turtle) or test.mistake_in(turtle))


def test_the_first_example_of_the_readme_computes_what_it_says():
    readme = (PROJECT / "README.md").read_text(encoding="utf-8")
    [example] = re.findall(r"(?ms)^```python\n(def compute.*?)^```", readme)
    exec(example, names := vars(process) | {"pyoxigraph": pyoxigraph})
    data = '<https://example.org/zoe> <https://schema.org/birthDate> "1987-05-01" ; <a b> 1 .'
    assert " <https://example.org/decade> 1980 ." in names["compute"]("zoe", data)


def test_other_calls_are_answered_as_the_test_or_else_answers_says(monkeypatch):
    answers = {"GET /a b": "text", "GET /a%20b?c=1": "query", "PATCH /é": 201, "GET /d": "not this"}
    monkeypatch.setattr(test, "ANSWERS", answers)
    with test.stand_in_cage({}, {"GET /d": 409}.get) as cage:
        call = process.DatavillageApi().call
        assert call("GET", "/a%20b?c=2") == b"text"
        assert call("GET", "/a%20b?c=1") == b"query"
        assert call("PATCH", "/%C3%A9", "ë".encode()) == b""
        with pytest.raises(process.DatavillageApiError, match="answered 409"):
            call("GET", "/d")
    assert cage.sent["PATCH /é"] == "ë"


def test_no_name_server_is_asked(monkeypatch):
    monkeypatch.setattr(socket, "gethostbyaddr", None)  # getfqdn calls it too
    with test.stand_in_cage({"ann": ""}):
        assert process.DatavillageApi().active_users() == ["ann"]


def test_pytest_finds_the_authors_tests_and_shows_which_hangs(cage):
    own = "import test, time\ndef test_own():\n    time.sleep(0.3)\n"
    ini = (PROJECT / ".pytest.ini").read_text("utf-8").replace("_timeout = 60", "_timeout = 0.1")
    files = dict.fromkeys(["test_a.py", "a/test_a.py", "b/test_a.py", "a/unit/test_a.py"], own)
    for name, text in {**files, "package/test.py": "exit()", ".pytest.ini": ini}.items():
        (cage.folder / name).parent.mkdir(parents=True, exist_ok=True)
        (cage.folder / name).write_text(text, "utf-8")
    run = cage.start(Path(sys.executable).with_name("pytest"), "-k", "test_own")
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
DATA = event = client = users = results = compute = process_event = check_before_event = None
""")
    run = cage.start(sys.executable, "-m", "pytest", "-v", variables={"http_proxy": "http://0:9"})
    run.end()
    outcomes = re.findall(r"(?m)^test\.py::(test_cage_)?\w+ ([A-Z]+)", run.log)
    assert outcomes[:4] == [("", "FAILED")] * 4
    assert outcomes[4:] == [("test_cage_", "PASSED")] * max(8, len(outcomes) - 4)
    assert "\n> " not in run.log  # as tracebacks are short


def test_no_name_that_an_author_is_likely_to_use_is_taken():
    likely = "DATA EVENTS LOCK PAUSES_SECONDS RETRIES TIMEOUT_SECONDS TURTLE USER alice api cage "
    likely += "client count data describe event graph model parse result results store user users"
    assert not {*likely.split()} & {*vars(process), *vars(test)}


def test_everything_is_restored_after_a_stand_in_cage():
    before = [dict(os.environ), index.connect, index.Algorithm, signal.getsignal(signal.SIGTERM)]
    with pytest.raises(KeyError), test.stand_in_cage({}) as cage:
        cage.publish({})
        index.main()
        raise KeyError
    after = [dict(os.environ), index.connect, index.Algorithm, signal.getsignal(signal.SIGTERM)]
    assert after == before
    assert cage.api.fileno() == -1  # closed


@pytest.mark.parametrize(("arguments", "reason"), BAD_ARGUMENTS.values(), ids=BAD_ARGUMENTS)
def test_a_bad_argument_is_one_line_and_status_2(rehearse, capsys, monkeypatch, arguments, reason):
    monkeypatch.chdir(PROJECT)
    with pytest.raises(SystemExit, match=r"^2$"):
        rehearse(process.process_event, *arguments.split())
    [line] = capsys.readouterr().err.splitlines()
    assert line.startswith(reason)
