"""Promises 18 and 19: the log."""

import logging
import re

import pytest

import index
import process

TALKATIVE = """
import subprocess, sys, threading
logging.getLogger("library").addHandler(logging.StreamHandler(sys.stdout))
program = subprocess.Popen(["tee", "-a", "/dev/stderr"], stdin=subprocess.PIPE)
def fail(data, depth=7):
    if depth:
        fail(data, depth - 1)
    raise KeyError(data) from ValueError(data)
def process_event(event):
    data = "secret " + os.environ["DV_TOKEN"]
    print(data, "\\udcff")
    program.communicate(data.encode())
    for name in ("library", "process_a", "indexing"):
        logging.getLogger(name).error(data)
    thread = threading.Thread(target=fail, args=[data])
    thread.start()
    thread.join()
    logging.getLogger("process.own").debug("in my own words: %s", "佐\\udcff")
    for_each_user(["ann"], lambda user_id: fail(data))
"""
LINES = r"""INFO waiting for an event at .*
INFO message [\d-]+: 佐, delivery 1 of 3
ERROR KeyError at threading.py:\d+ run, (process.py:\d+ fail, ){3}…(, process.py:\d+ fail){4}
DEBUG in my own words: 佐\\udcff
ERROR user 'ann': KeyError at process.py:\d+ <lambda>, (.*, ){3}…(, process.py:\d+ fail){4}
INFO 1 of 1 users, 1 failed
ERROR message [\d-]+: delivered again in 75 s, because it failed: 1 of 1 users failed: .*
"""
PLACE = r"ProcessingError at test_log\.py:\d+ test_\w+"
ERRORS = {"too \n few": "too few", " ": PLACE, 10**5_000: PLACE}  # Python refuses to print that
PREFIXES = {
    "the trigger": ({"type": ["secret"], "trigger": "full"}, "full, "),
    "none": ({"type": " ", "trigger": 1}, ""),
    "cut": ({"type": "x" * 5_000}, "x" * 40 + ", "),
    "printable": ({"type": "a\nb\udcff\x1b\u2028c"}, "a b   c, "),
}


def test_the_log_shows_the_authors_own_words_and_no_data_and_no_token(cage):
    cage.edit(TALKATIVE)
    cage.publish({"type": "佐", "trigger": "full"})
    run = cage.start(variables={"LOGLEVEL": "debug", "PYTHONIOENCODING": "ascii"})
    assert run.end() == 1
    assert "secret" not in run.log
    assert re.fullmatch(re.sub("(?m)^(?=.)", r"[\\d-]{10} [\\d:]{8},\\d{3} ", LINES), run.log)


@pytest.mark.parametrize("line_break", ["\n", "\x0b", "\u2028"])
def test_a_record_is_one_line_but_a_handler_of_the_author_sees_all(line_break):
    error = (KeyError, KeyError("secret"), None)
    record = logging.makeLogRecord({"msg": f"first{line_break}second", "exc_info": error})
    assert index.OneLineFormatter("%(message)s").format(record) == "first"
    assert logging.Formatter().format(record) == f"first{line_break}second\nKeyError: 'secret'"


@pytest.mark.parametrize(("argument", "line"), ERRORS.items(), ids=["text", "empty", "unreadable"])
def test_a_processing_error_is_logged_as_its_message_or_else_its_place(argument, line):
    with pytest.raises(process.ProcessingError) as caught:
        raise process.ProcessingError(argument)
    assert re.fullmatch(line, process.describe_error(caught.value))


@pytest.mark.parametrize(("event", "prefix"), PREFIXES.values(), ids=PREFIXES)
def test_the_line_of_a_delivery_names_the_type_or_else_the_trigger(event, prefix):
    assert index.log_prefix_of(event) == prefix
