"""Promises 15 and 16: the rehearsal and the author's tests."""

import json
import os
import pty
import re
import shutil
import signal
import socket
import sys
import time
from pathlib import Path

import pytest
import yaml

import test


# 15: the rehearsal
def test_the_rehearsal_shows_and_writes_what_was_stored_and_shows_what_was_not(cage, tmp_path):
    pytest.importorskip("rdflib")
    cage.edit("""
def compute(user_id, data):
    print("printed", user_id)
    time.sleep(0.03)
    if user_id == "raises":
        raise ValueError("line 1\\n\\nline 3 of ë")
    if user_id == "known":
        raise ProcessingError("no birth date")
    return data
sample = process_event
def process_event(event):
    with contextlib.suppress(ProcessingError):
        sample(event)
""")
    bob = '<a:b> <a:c>  "1\x0c2\u20283\x854" .\n\n# \u2603'
    users = {"0%2Fbob": bob, "1 zoë": '\ufeff<a:b> <a:c> "Zoë" .\r\n# 佐江\n', "€" * 80: ""}
    users |= dict.fromkeys(map(str, range(100, 190)), " \n") | {"raises": "", "known": ""}
    users |= {"line": "<a:a> <a:b> <a:c> .\n<a:a> <a:b> oops .\n", "end": "<a:a> <a:b> <a:c>"}
    users |= {"space": "<a:a b> <a:b> <a:c> .", "folder": "<file:///home/a> <a:b> <a:c> ."}
    users |= {"fine": '<a:a> <relative> "<file:a>" . # comment'}
    event = json.dumps({"userIds": [*users, "no-file"]})
    results = tmp_path / "new" / "results"
    (tmp_path / "sample").mkdir()
    for user_id, text in users.items():
        (tmp_path / "sample" / f"{user_id}.ttl").write_bytes(text.encode("utf-8"))
    arguments = ["test.py", "--event", event, "--results", results, tmp_path / "sample"]
    run = cage.start(sys.executable, *arguments, variables={"PYTHONIOENCODING": "ascii"})
    assert run.end() == 1
    log, _, report = run.log.partition("\n\n")
    assert re.search(r"(?m)^[\d-]{10} [\d:,]{12} INFO \d+ of 101 users, 0 failed", log)
    assert log.count("printed ") == 100
    assert re.search(r"\nhome\| ValueError: line 1\nhome\| \nhome\| line 3 of \\xeb\n", log)
    assert log.count("home| Traceback") == log.count("Traceback") == 1
    indented = bob.replace("\n", "\n    ").replace("\u2028", "\\u2028").replace("\x85", "\\x85")
    assert report.startswith(f"0%2Fbob: inferences\n    {indented}".replace("\u2603", "\\u2603"))
    assert "\n... and 88 more; --results FOLDER writes them all\n" in report
    assert re.findall("(?m)^without a result: (.*)", report) == ["known", "no-file", "raises"]
    assert "\nempty: ... and 71 more\n" in report
    invalid = re.findall("(?m)^not valid: ([a-z]+): inferences: .", report)
    assert invalid == ["line", "end", "space", "folder"]
    assert "a relative IRI became file:///home/a; parse the data with publicID=" in report
    assert re.search(r"\nnot written: (\\u20ac)+: inferences: .* File name too long", report)
    counts = "users: 101, results: 98, without a result: 3, empty: 91, not valid: 4, not written: 1"
    assert re.search(rf"\n{counts}, seconds: \d\.\d, exit status: 1\n$", report)
    written = {path.name: path.read_bytes() for path in results.rglob("inferences/*")}
    assert len(written) == 97
    assert written["0%252Fbob.ttl"] == bob.encode("utf-8")
    assert written["1%20zo%C3%AB.ttl"] == '<a:b> <a:c> "Zoë" .\r\n# 佐江\n'.encode()


@pytest.mark.parametrize("line", ["breakpoint()", "while True: print('in a loop'); time.sleep(9)"])
def test_a_breakpoint_and_ctrl_c_work_in_the_rehearsal(cage, line):
    cage.edit(f"""
def work(user_id):
    {line}
    return user_id
def process_event(event):
    for_each_user(["alice", "bob"], work)
""")
    terminal, end = pty.openpty()
    run = cage.start(sys.executable, "-u", "test.py", stdin=end, start_new_session=True)
    if line == "breakpoint()":
        run.until(lambda: "(Pdb) " in run.log)
        time.sleep(0.3)
        assert run.log.count("-> ") == 1  # one user at a time
        os.write(terminal, b"p 'user', user_id\nc\n")
        run.until(lambda: "('user', 'alice')" in run.log and run.log.count("(Pdb) ") > 2)
    run.until(lambda: "in a loop" in run.log or "(Pdb) " in run.log)
    os.killpg(run.pid, signal.SIGINT)
    assert run.wait(5) == -signal.SIGINT


def test_a_bad_argument_is_one_line_and_status_2(capsys, monkeypatch, tmp_path):
    monkeypatch.chdir(tmp_path)
    os.mkdir("empty")
    os.mkdir("more")
    for file in ("alice.ttl", "more/alice.ttl", "latin.ttl"):
        Path(file).write_bytes(b"Zo\xeb" if file == "latin.ttl" else b"")
    for arguments, reason in (
        ("nowhere.ttl", "nowhere.ttl: [Errno 2] No such file or directory: 'nowhere.ttl'"),
        ("alice.ttl empty", "empty: no *.ttl file in this folder"),
        ("latin.ttl", "latin.ttl: 'utf-8' codec can't decode byte 0xeb in position 2"),
        ("alice.ttl more", "more/alice.ttl: another file for the user 'alice'"),
        ("--event {a", "--event: Expecting property name enclosed in double quotes"),
        ("--event []", "--event: not a JSON object"),
        (f"--event {'[' * 100_000}", "--event: "),
        ("--results alice.ttl", "--results: [Errno 20] Not a directory: 'alice.ttl/"),
    ):
        monkeypatch.setattr(sys, "argv", ["test.py", *arguments.split()])
        with pytest.raises(SystemExit, match=r"^2$"):
            test.rehearse_from_command_line()
        [line] = capsys.readouterr().err.splitlines()
        assert line.startswith(reason)


# 16: pytest
def test_nothing_in_an_authors_folder_stops_the_tests_and_no_likely_name_is_taken(cage):
    cage.edit("""
import logging.config, sys, warnings
logging.config.dictConfig({"version": 1})
logging.disable(logging.CRITICAL)
warnings.simplefilter("error")
os.chdir("/")
WORKERS = 3
DATA = event = client = users = results = None
def compute(user_id, data): raise ValueError
def process_event(event): own_helper.note(event["own"])
""")
    file = cage.folder / "process.py"  # it imports a helper that imports it, and the entry
    text = file.read_text("utf-8").replace("import req", "import own_helper, req", 1)
    file.write_text(text, "utf-8")
    helper = "import index, process\ndef note(text): index.connect().set('noted', text)\n"
    own_tests = ["test_a.py", "a/test_a.py", "b/test_a.py", "a/unit/test_a.py", "package/test_b.py"]
    own_test = "from test import stand_in_cage\ndef test_own():\n    with stand_in_cage({}): pass\n"
    files = dict.fromkeys(own_tests, own_test)
    files |= {"own_helper.py": helper, "package/__init__.py": "", "env/pyvenv.cfg": ""}
    files |= dict.fromkeys(("package/test.py", "env/lib/own/test_c.py"), "raise SystemExit")
    for name, text in files.items():
        (cage.folder / name).parent.mkdir(parents=True, exist_ok=True)
        (cage.folder / name).write_text(text, encoding="utf-8")
    clone = shutil.copytree(cage.folder, cage.folder.with_name("clone"))
    clone.rename(cage.folder / "clone")
    (cage.folder / "link").symlink_to(".")
    (cage.folder / "dangling").symlink_to("nowhere")
    os.mkfifo(cage.folder / "test_pipe")
    with socket.socket(socket.AF_UNIX) as server:
        server.bind(f"/proc/self/fd/{os.open(cage.folder, os.O_RDONLY)}/test_socket")
    command = [sys.executable, "-m", "pytest", "-v", "-p", "no:randomly"]
    run = cage.start(*command, variables={"http_proxy": "http://127.0.0.1:9"})
    run.end()
    outcomes = re.findall(r"(?m)^(\S+)::(\w+) (PASSED|FAILED|ERROR)", run.log)
    assert {(name, "test_own", "PASSED") for name in own_tests} <= {*outcomes}, run.log
    tests = [(name, outcome) for file, name, outcome in outcomes if file == "test.py"]
    assert [outcome for name, outcome in tests if "test_cage_" in name] == ["PASSED"] * 9, run.log
    assert all("test_cage_" in name for name, _ in tests[-9:])  # the author's come first
    assert len(run.log.splitlines()) < 90  # though four tests fail
    cage.publish({"own": "event"})
    assert cage.start().end() == 0
    assert cage.queue.get("noted") == "event"
    likely = "DATA EVENTS TURTLE USER alice api cage client data event graph result results users"
    assert not {*likely.split()} & {*vars(test)}
    config = yaml.safe_load((cage.folder / "datavillage.yaml").read_text(encoding="utf-8"))
    script, entry = ["pip install -r requirements.txt"], "python index.py"
    assert config == {"env": "python", "script": script, "entry": entry}
