#!/usr/bin/env bash
# requests 2.34.2 with urllib3 2.8.0, Python 3.11, concurrent.futures.ProcessPoolExecutor.
#
# A ConnectionError or ReadTimeout of requests raised in a worker of a process pool arrives
# in the parent with another text: where the worker's message names the host and the port,
# the parent's says "None". The exceptions of urllib3 are pickled without their pool and
# build their text again from what is left, and requests uses that text. What a parent
# logs of a failed call then does not tell which server failed. (error.request survives.)
#
# Seen:  worker: HTTPConnectionPool(host='127.0.0.1', port=N): Max retries exceeded with ...
#        parent: None: Max retries exceeded with url: /job (Caused by ...('None: Failed ...
#        and the same of "Read timed out."
# The documentation of requests and urllib3 does not say that the text changes; the source
# of urllib3 says of leaving out the pool only that it is for pickling.
set -euo pipefail
dir=$(mktemp -d)
trap 'rm -rf "$dir"' EXIT
python3 -m venv "$dir/venv"
"$dir/venv/bin/pip" install -q requests==2.34.2 urllib3==2.8.0

cat >"$dir/errors.py" <<'PY'
import multiprocessing, socket, sys
from concurrent.futures import ProcessPoolExecutor
import requests

def get(url, as_text):
    session = requests.Session()
    session.trust_env = False  # no proxy of this machine
    try: session.get(url, timeout=0.5)
    except requests.RequestException as error:
        if as_text: return str(error)
        raise

if __name__ == "__main__":
    silent, closed = socket.create_server(("127.0.0.1", 0)), socket.create_server(("127.0.0.1", 0))
    ports = silent.getsockname()[1], closed.getsockname()[1]
    closed.close()
    with ProcessPoolExecutor(1, mp_context=multiprocessing.get_context("spawn")) as pool:
        for port, kind in zip(ports, (requests.ReadTimeout, requests.ConnectionError)):
            url = f"http://127.0.0.1:{port}/job"
            worker = pool.submit(get, url, True).result(30)
            error = pool.submit(get, url, False).exception(30)
            print(f"worker: {worker}\nparent: {error}")
            named, lost = "127.0.0.1" in worker, str(error).startswith("None: ")
            if not (isinstance(error, kind) and named and lost and error.request.url == url):
                sys.exit("CHANGED: an error of requests keeps its text on the way out of a pool")
PY
"$dir/venv/bin/python" "$dir/errors.py"
