#!/usr/bin/env bash
# rdflib 7.6.0 (beside pyoxigraph 0.5.13).
#
# A triple that was just parsed is not found by a SPARQL query that repeats it letter for
# letter, and DELETE DATA with it deletes nothing: the Turtle parser rewrites typed
# literals when it makes them ("...Z" of an xsd:dateTime becomes "...+00:00", "1" of an
# xsd:boolean "true", "010" of an xsd:integer "10"), the SPARQL parser keeps them as they
# are written, and terms are compared by their text. INSERT DATA of the same triple then
# makes a second one. pyoxigraph's Store finds and deletes all three.
#
# Seen (found, left after DELETE DATA, triples after INSERT DATA):
#   rdflib (False, 1, 2) for all three; for "2024-05-01T10:00:00+00:00": (True, 0, 1)
#   pyoxigraph found and deleted
# The documentation of NORMALIZE_LITERALS says that every literal is normalized as it is
# made, with no exception for those that a query or an update makes.
set -euo pipefail
dir=$(mktemp -d)
trap 'rm -rf "$dir"' EXIT
python3 -m venv "$dir/venv"
"$dir/venv/bin/pip" install -q rdflib==7.6.0 pyoxigraph==0.5.13

"$dir/venv/bin/python" - <<'PY'
import sys, pyoxigraph, rdflib
XSD = "http://www.w3.org/2001/XMLSchema#"

def ask(text, kind):
    triple = f'<http://example.org/s> <http://example.org/p> "{text}"^^<{XSD}{kind}> .'
    graph = rdflib.Graph().parse(data=triple, format="turtle")
    found = graph.query(f"ASK {{ {triple} }}").askAnswer
    again = rdflib.Graph().parse(data=triple, format="turtle")
    again.update(f"INSERT DATA {{ {triple} }}")
    graph.update(f"DELETE DATA {{ {triple} }}")
    store = pyoxigraph.Store()
    store.load(triple, pyoxigraph.RdfFormat.TURTLE)
    there = bool(store.query(f"ASK {{ {triple} }}"))
    store.update(f"DELETE DATA {{ {triple} }}")
    return (found, len(graph), len(again)), there and len(store) == 0

cases = ("2024-05-01T10:00:00Z", "dateTime"), ("1", "boolean"), ("010", "integer")
seen = [ask(*case) for case in cases]
plain = ask("2024-05-01T10:00:00+00:00", "dateTime")
print("rdflib, pyoxigraph:", seen, "| written as rdflib writes it:", plain)
if seen != [((False, 1, 2), True)] * 3 or plain != ((True, 0, 1), True):
    sys.exit("CHANGED: rdflib finds a literal written as it was parsed")
PY
