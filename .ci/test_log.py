"""Promises 13 and 14: the log."""

import re

TALKATIVE = """
import concurrent.futures, ctypes, multiprocessing, subprocess, sys, threading, warnings
warnings.simplefilter("always")
logging.getLogger("library").addHandler(logging.StreamHandler(sys.stdout))
early_child = subprocess.Popen(["cat"], stdin=subprocess.PIPE)
ages = logging.getLogger("process.ages")

def raise_all(data): raise KeyError(data) from ValueError(data)
def process_event(event):
    data = DatavillageApi().user_data("ann")
    print(data, "\\udcff")
    print(data, file=sys.stderr, flush=True)
    os.write(2, data.encode())
    ctypes.CDLL(None).puts(data.encode())
    ctypes.CDLL(None).fflush(None)
    early_child.communicate(data.encode())
    concurrent.futures.ProcessPoolExecutor(1).submit(time.sleep, 60)  # the run ends all the same
    subprocess.run(f"echo {data}; echo {data} >&2", shell=True)
    for method in ("fork", "spawn", "forkserver"):
        with multiprocessing.get_context(method).Pool(1) as pool:
            pool.map(print, [data])
    child = multiprocessing.get_context("fork").Process(target=time.sleep, args=[60])
    child.start()
    child.terminate()
    child.join()
    ages.info("a forked child ended with %d", child.exitcode)
    for name in ("library", "process_utils", "", "urllib3", "indexing"):
        logging.getLogger(name).error(data)
    warnings.warn(data)
    thread = threading.Thread(target=raise_all, args=[data])
    thread.start()
    thread.join()
    ages.debug("of my own: %s", "佐\\udcff")
    ages.error("too few %s %s", data)
    try:
        raise_all(data)
    except Exception as error:
        ages.exception("an exception of my own")
        record = ages.makeRecord(ages.name, 40, "", 0, "formatted before", (), None)
        record.exc_text = f"ValueError: {error}"
        ages.handle(record)
    for_each_user(["ann"], lambda user_id: raise_all(data), skip_failed=True)
    raise_all(data)
"""
LINES = (
    "INFO waiting for an event at .*",
    r"INFO message [\d-]+: delivery 1 of 3",
    "INFO a forked child ended with -15",
    r"ERROR KeyError at threading\.py:\d+ run, process\.py:\d+ raise_all",
    r"DEBUG of my own: 佐\\udcff",
    "ERROR an exception of my own",
    "ERROR formatted before",
    r"ERROR user 'ann': KeyError at process\.py:\d+ <lambda>, process\.py:\d+ raise_all",
    "INFO 1 of 1 users, 1 failed",
    r"ERROR message [\d-]+: failed: KeyError at process\.py:\d+ process_event, .* raise_all",
)


def test_user_data_and_token_are_in_no_log_at_any_level_and_the_authors_own_words_are(cage):
    cage.api.users = {"ann": "secret"}
    cage.edit(TALKATIVE)
    cage.publish({})
    run = cage.start(variables={"LOGLEVEL": "debug", "PYTHONIOENCODING": "ascii"})
    assert run.end() == 1
    assert not re.search("secret|a-token", run.log)
    for line, pattern in zip(run.log.splitlines(), LINES, strict=True):
        assert re.fullmatch(rf"[\d-]{{10}} [\d:]{{8}},\d{{3}} {pattern}", line), (pattern, line)


def test_every_failure_is_one_line_and_loglevel_sets_the_level(cage):
    for level, lines in (("WARNING", 0), ("", 4), ("loud", 4)):
        cage.publish({})
        run = cage.start(variables={"LOGLEVEL": level})
        assert run.end() == 0
        assert len(run.log.splitlines()) == lines
    for token in ("secret\n", "secret €"):
        run = cage.start(variables={"DV_TOKEN": token})
        assert run.end() == 1
        assert re.fullmatch(r".* ERROR not started: GET .*/activeUsers: \w+\n", run.log)
        assert "secret" not in run.log
    for code, reason in (("open('nowhere')", "directory: 'nowhere'"), ("exit()", "called exit()")):
        cage.edit(code)
        run = cage.start()
        assert run.end() == 1
        assert run.log.startswith("Traceback") and run.log.endswith(f"{reason}\n")
    cage.edit("class DatavillageApi:\n    def __init__(self):\n        raise TypeError('secret')")
    run = cage.start()
    assert run.end() == 1
    assert re.fullmatch(r".* CRITICAL TypeError at .*index.py:\d+ main, process.py:.*\n", run.log)
    assert "secret" not in run.log
