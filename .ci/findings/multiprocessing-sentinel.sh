#!/usr/bin/env bash
# Python 3.11 (3.11.7), multiprocessing on Linux; no package is needed.
#
# A Process that has ended can look as if it had not: if it forked a child of its own that
# lives on, then with the start methods "fork" and "spawn" Process.sentinel does not become
# ready and join(timeout) waits for the whole timeout, while is_alive() says False and
# exitcode is there, at once. The sentinel is the read end of a pipe, and the grandchild
# has inherited the write end. With "forkserver" the same program is told at once.
#
# Seen:  fork        sentinel ready False, join waited True,  alive False, exit code 3
#        spawn       sentinel ready False, join waited True,  alive False, exit code 3
#        forkserver  sentinel ready True,  join waited False, alive False, exit code 3
# The documentation says that the sentinel becomes ready when the process ends, and names
# neither grandchildren nor a difference between the start methods there.
set -euo pipefail
dir=$(mktemp -d)
trap 'rm -rf "$dir"' EXIT
python3 -m venv --without-pip "$dir/venv"

cat >"$dir/ended.py" <<'PY'
import multiprocessing, os, platform, sys, time
from multiprocessing.connection import wait

def work():
    if os.fork() == 0:
        time.sleep(4)  # the grandchild
    os._exit(3)

def look(method):
    process = multiprocessing.get_context(method).Process(target=work)
    process.start()
    time.sleep(1.5)  # far longer than work() takes
    ready = bool(wait([process.sentinel], 0.2))
    start = time.monotonic()
    process.join(1)
    waited = time.monotonic() - start > 0.8
    return ready, waited, process.is_alive(), process.exitcode

if __name__ == "__main__":
    seen = {method: look(method) for method in ("fork", "spawn", "forkserver")}
    time.sleep(4)  # leave no grandchild behind
    print(platform.python_version(), "ready, waited, alive, code:", seen)
    late, told = (False, True, False, 3), (True, False, False, 3)
    if seen != {"fork": late, "spawn": late, "forkserver": told}:
        sys.exit("CHANGED: the sentinel of a process with a living grandchild behaves otherwise")
PY
"$dir/venv/bin/python" "$dir/ended.py"
