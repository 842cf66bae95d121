#!/usr/bin/env bash
# joblib 1.6.0 (with the loky it carries), Python 3.11.
#
# After a joblib.Parallel call has returned, its workers stay, and are listed by
# multiprocessing.active_children() like any other child. They are Process objects with
# all of its methods, but kill() raises AttributeError: loky's Popen has no kill(), only
# terminate(). Clean-up code that goes over active_children() and kills what it finds
# therefore stops at the first worker of a library it may not know is in use.
#
# Seen:  2 workers listed, both instances of multiprocessing.process.BaseProcess
#        kill():      AttributeError: 'Popen' object has no attribute 'kill'
#        terminate(): works, join() returns, is_alive() False
# Python documents kill() for every Process (since 3.7); joblib and loky describe idle
# workers and how to shut them down, and do not mention that kill() is missing.
set -euo pipefail
dir=$(mktemp -d)
trap 'rm -rf "$dir"' EXIT
python3 -m venv "$dir/venv"
"$dir/venv/bin/pip" install -q joblib==1.6.0

cat >"$dir/workers.py" <<'PY'
import multiprocessing, os, sys
from joblib import Parallel, delayed

if __name__ == "__main__":
    Parallel(n_jobs=2)(delayed(os.getpid)() for _ in range(4))
    workers, errors = multiprocessing.active_children(), []
    for worker in workers:
        assert isinstance(worker, multiprocessing.process.BaseProcess)
        try:
            worker.kill()
        except AttributeError as error:
            errors.append(str(error))
    for worker in workers:
        worker.terminate()
        worker.join(10)
    alive = [worker.is_alive() for worker in workers]
    print(len(workers), "workers |", errors, "| alive after terminate():", alive)
    if not workers or len(errors) != len(workers) or any(alive):
        sys.exit("CHANGED: loky's workers are not listed any more, or have a kill()")
PY
"$dir/venv/bin/python" "$dir/workers.py"
