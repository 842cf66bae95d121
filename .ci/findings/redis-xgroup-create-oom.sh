#!/usr/bin/env bash
# redis-server 7.0.15 (as Debian 12 has it), asked by redis-py 8.1.0.
#
# On a full Redis (used memory over maxmemory, policy noeviction) a worker may still
# XREADGROUP under a consumer name nobody has used before (which makes that consumer),
# XCLAIM and XACK. But XGROUP CREATE for a group that is ALREADY there, which would store
# nothing, is refused with OOM before Redis looks whether the group exists. So "create the
# group at the start, ignore BUSYGROUP" keeps a worker from starting on the very queue it
# is there to empty.
#
# Seen:  before: BUSYGROUP Consumer Group name already exists
#        full:   OutOfMemoryError; XREADGROUP 1 entry, XCLAIM 1, XACK 1
# The documentation of XGROUP CREATE promises BUSYGROUP for a group that exists, and its page
# about that error advises to catch it at each start; neither names OOM. (COMMAND INFO does
# show a "denyoom" flag for the subcommand.)
set -euo pipefail
command -v redis-server >/dev/null || { echo "cannot run: redis-server is not installed" >&2; exit 1; }
dir=$(mktemp -d); server=
trap '[ -z "$server" ] || kill "$server" 2>/dev/null || :; wait; rm -rf "$dir"' EXIT
python3 -m venv "$dir/venv"
"$dir/venv/bin/pip" install -q redis==8.1.0
redis-server --port 0 --unixsocket "$dir/socket" --save "" --dir "$dir" >"$dir/log" & server=$!
for _ in {1..100}; do [ -S "$dir/socket" ] && break; sleep 0.1; done

"$dir/venv/bin/python" - "$dir/socket" <<'PY'
import sys, redis
r = redis.Redis(unix_socket_path=sys.argv[1])

def create():
    try:
        r.xgroup_create("jobs", "workers", mkstream=True)
        return "created"
    except redis.ResponseError as error:
        return f"{type(error).__name__}: {error}"

create()
r.xadd("jobs", {"n": 1})
before = create()
r.config_set("maxmemory-policy", "noeviction")
r.config_set("maxmemory", 1)
full = create()
entry = r.xreadgroup("workers", "never-seen", {"jobs": ">"})[0][1][0][0]
claimed, acked = r.xclaim("jobs", "workers", "other", 0, [entry]), r.xack("jobs", "workers", entry)
print(r.info("server")["redis_version"], "|", before, "|", full, "|", len(claimed), acked)
if "BUSYGROUP" not in before or "OutOfMemory" not in full or (len(claimed), acked) != (1, 1):
    sys.exit("CHANGED: XGROUP CREATE of a group that exists is no longer the one refused with OOM")
PY
