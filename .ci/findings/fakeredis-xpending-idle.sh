#!/usr/bin/env bash
# fakeredis 2.41.0 beside redis-server 7.0.15, both asked by redis-py 8.1.0.
#
# XPENDING with IDLE n: Redis lists the entries that have been idle for n milliseconds or
# more, fakeredis only those idle for MORE than n. An entry that fakeredis itself reports
# as idle for 5000 ms is not among those it lists for IDLE 5000, and IDLE 0 leaves out what
# was delivered within the same millisecond (in a test with a stopped clock: everything).
# fakeredis's own XAUTOCLAIM does take an entry idle for exactly n, as Redis does.
#
# Seen:  Redis:     idle 5000, listed for IDLE 5000: 1, claimed by XAUTOCLAIM 5000: 1
#        fakeredis: idle 5000, listed for IDLE 5000: 0, claimed by XAUTOCLAIM 5000: 1
# fakeredis lists XPENDING as supported and names no difference.
set -euo pipefail
command -v redis-server >/dev/null || { echo "cannot run: redis-server is not installed" >&2; exit 1; }
dir=$(mktemp -d); server=
trap '[ -z "$server" ] || kill "$server" 2>/dev/null || :; wait; rm -rf "$dir"' EXIT
python3 -m venv "$dir/venv"
"$dir/venv/bin/pip" install -q redis==8.1.0 fakeredis==2.41.0
redis-server --port 0 --unixsocket "$dir/socket" --save "" --dir "$dir" >"$dir/log" & server=$!
for _ in {1..100}; do [ -S "$dir/socket" ] && break; sleep 0.1; done

"$dir/venv/bin/python" - "$dir/socket" <<'PY'
import sys, fakeredis, redis

def ask(r):
    r.xgroup_create("jobs", "g", mkstream=True)
    entry = r.xadd("jobs", {"n": 1})
    r.xreadgroup("g", "c", {"jobs": ">"})
    for _ in range(2000):  # until all of one transaction falls into the same millisecond
        p = r.pipeline()
        p.xclaim("jobs", "g", "c", 0, [entry], idle=5000)
        p.xpending_range("jobs", "g", "-", "+", 9, idle=5000)
        p.xautoclaim("jobs", "g", "c", 5000)
        p.xclaim("jobs", "g", "c", 0, [entry], idle=5000)
        p.xpending_range("jobs", "g", "-", "+", 9)
        p.time()
        start, (_, listed, auto, _, [about], end) = r.time(), p.execute()
        if start[0] == end[0] and start[1] // 1000 == end[1] // 1000:
            return about["time_since_delivered"], len(listed), len(auto[1])
    sys.exit("cannot run: this machine is too slow to ask within one millisecond")

real = ask(redis.Redis(unix_socket_path=sys.argv[1]))
fake = ask(fakeredis.FakeRedis())
print("idle, listed, claimed: Redis", real, "fakeredis", fake)
if real != (5000, 1, 1) or fake != (5000, 0, 1):
    sys.exit("CHANGED: XPENDING IDLE no longer differs at the edge")
PY
