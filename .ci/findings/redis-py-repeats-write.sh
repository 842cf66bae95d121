#!/usr/bin/env bash
# redis-py 8.1.0 (with redis-server 7.0.15).
#
# One call of incr(), rpush() or a transaction can be carried out more than once, with no
# error: if the reply is late (here a script keeps the server busy for longer than the
# client's socket_timeout), the client drops the connection and sends the command again on
# a new one. Both copies lie in the server's buffers, and both run. The value returned is
# that of the last copy: the first INCR of a new key returns 2 or more, one RPUSH makes a
# list of 2 or more. No retry was asked for.
#
# Seen:  incr -> 2, rpush -> 2, transaction -> [2]; with retry=None: TimeoutError, then 1
# The documentation says that failed commands are retried by default, also after a timeout,
# and warns that too short a timeout can make the client retry what would have succeeded; it
# does not say that a write is then applied again, nor which commands are safe from this.
set -euo pipefail
command -v redis-server >/dev/null || { echo "cannot run: redis-server is not installed" >&2; exit 1; }
dir=$(mktemp -d); server=
trap '[ -z "$server" ] || kill "$server" 2>/dev/null || :; wait; rm -rf "$dir"' EXIT
python3 -m venv "$dir/venv"
"$dir/venv/bin/pip" install -q redis==8.1.0
redis-server --port 0 --unixsocket "$dir/socket" --save "" --dir "$dir" >"$dir/log" & server=$!
for _ in {1..100}; do [ -S "$dir/socket" ] && break; sleep 0.1; done

"$dir/venv/bin/python" - "$dir/socket" <<'PY'
import sys, threading, time, redis
BUSY = """local function now() local t = redis.call('TIME'); return t[1] * 1000 + t[2] / 1000 end
local stop = now() + 1500; repeat until now() > stop"""
other = redis.Redis(unix_socket_path=sys.argv[1], socket_timeout=30)
other.ping()

def while_busy(call, **options):
    client = redis.Redis(unix_socket_path=sys.argv[1], socket_timeout=1, **options)
    client.ping()
    busy = threading.Thread(target=other.eval, args=(BUSY, 0)); busy.start(); time.sleep(0.2)
    try: return call(client)
    except redis.TimeoutError as error: return type(error).__name__
    finally: busy.join()

seen = [while_busy(lambda r: r.incr("a")), while_busy(lambda r: r.rpush("b", "job")),
        while_busy(lambda r: r.pipeline().incr("c").execute())[0]]
once = while_busy(lambda r: r.incr("d"), retry=None)
print("one call each:", seen, "| without retry:", once, int(other.get("d")))
if min(seen) < 2 or once != "TimeoutError" or other.get("d") != b"1":
    sys.exit("CHANGED: a write whose reply is late is no longer carried out twice")
PY
