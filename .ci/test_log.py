"""Promises 18 and 19: the log."""

import logging
import re

import pytest

import index
import process
from test import stand_in_cage

TALKATIVE = """
import subprocess, sys, threading, warnings
logging.getLogger("library").addHandler(logging.StreamHandler(sys.stdout))
early_child = subprocess.Popen(["cat"], stdin=subprocess.PIPE)
def fail(data):
    raise KeyError(data) from ValueError(data)
def process_event(event):
    data = "secret " + os.environ["DV_TOKEN"]
    print(data, "\\udcff")
    for descriptor in (1, 2):
        os.write(descriptor, data.encode())
    early_child.communicate(data.encode())
    warnings.warn(data)
    for name in ("library", "process_a", "indexing"):
        logging.getLogger(name).error(data)
    thread = threading.Thread(target=fail, args=[data])
    thread.start()
    thread.join()
    logging.getLogger("process.own").error("wrong %s %s", data)
    logging.getLogger("process.own").debug("in my own words: %s", "佐\\udcff")
    for_each_user(["ann"], lambda user_id: fail(data), skip_failed=True)
    fail(data)
"""
LINES = """INFO waiting for an event at .*
INFO message [\\d-]+: delivery 1 of 3
ERROR KeyError at threading.py:.* run, process.py:\\d+ fail
DEBUG in my own words: 佐\\\\udcff
ERROR user 'ann': KeyError at .*, process.py:\\d+ fail
INFO 1 of 1 users, 1 failed
ERROR message [\\d-]+: delivered again in 75 s, because it failed: KeyError at .*:\\d+ fail
"""


def test_the_log_shows_the_authors_own_words_and_no_data_and_no_token(cage):
    cage.edit(TALKATIVE)
    cage.publish({})
    run = cage.start(variables={"LOGLEVEL": "debug", "PYTHONIOENCODING": "ascii"})
    assert run.end() == 1
    assert "secret" not in run.log
    assert re.fullmatch(re.sub("(?m)^(?=.)", r"[\\d-]{10} [\\d:]{8},\\d{3} ", LINES), run.log)


def test_an_exit_in_process_py_is_the_reason_why_it_cannot_be_imported(cage):
    cage.edit("raise SystemExit")
    run = cage.start()
    assert run.end() == 1
    assert run.log == "ImportError: process.py called exit()\n"


@pytest.fixture
def log(tmp_path, monkeypatch):
    """The lines of the log so far, without the time, of what happens in this process."""
    for name in ("index", "process"):
        monkeypatch.setattr(logging.getLogger(name), "handlers", [])
    with open(tmp_path / "log", "w+", encoding="utf-8", errors="backslashreplace") as file:
        index.start_logging(file)
        yield lambda: [line[24:] for line in (tmp_path / "log").read_text("utf-8").splitlines()]


@pytest.mark.parametrize("line_break", ["\n", "\x0b", "\u2028"])
def test_a_record_is_one_line_but_a_handler_of_the_author_sees_all(log, caplog, line_break):
    try:
        raise KeyError("alice")
    except KeyError:
        logging.getLogger("process.own").exception(f"first{line_break}second")
    assert log() == ["ERROR first"]
    assert f"first{line_break}second\nTraceback" in caplog.text


def raise_in(depth: int, error: BaseException) -> None:
    if depth:
        raise_in(depth - 1, error)
    raise error


UNREADABLE = type("Unreadable", (process.ProcessingError,), {"__str__": None})
PLACE = r"test_log\.py:\d+ raise_in"
DESCRIPTIONS = [
    (0, process.ProcessingError("too \n few"), "too few"),
    (0, process.ProcessingError(" "), f"ProcessingError at {PLACE}"),
    (0, UNREADABLE(), f"Unreadable at {PLACE}"),
    (8, KeyError("secret"), f"KeyError at ({PLACE}, ){{4}}…(, {PLACE}){{4}}"),
]


@pytest.mark.parametrize(("depth", "error", "line"), DESCRIPTIONS)
def test_an_exception_is_logged_as_type_and_places_or_as_its_own_message(depth, error, line):
    with pytest.raises(type(error)) as caught:
        raise_in(depth, error)
    assert re.fullmatch(line, process.describe_error(caught.value))


NAMES = [
    ({"type": "SCORE", "trigger": "full"}, "SCORE, "),
    ({"type": ["secret"], "trigger": "full"}, "full, "),
    ({"type": " ", "trigger": 1}, ""),
    ({"type": "x" * 5_000}, "x" * 40 + ", "),
    ({"type": "a\nb\udcff\x1b\u2028c"}, "a b   c, "),
]


@pytest.mark.parametrize(("event", "name"), NAMES)
def test_the_line_of_a_delivery_names_the_type_or_else_the_trigger(log, monkeypatch, event, name):
    monkeypatch.setattr(process, "process_event", lambda event: None)
    with stand_in_cage({}) as cage:
        message_id = cage.publish(event)
        assert index.main() == 0
    assert f"INFO message {message_id}: {name}delivery 1 of 3" in log()
