#!/usr/bin/env bash
# pyoxigraph 0.5.13 (beside rdflib 7.6.0).
#
# An xsd:integer of 2^63 or more, valid RDF, is stored, counted and written out again by
# pyoxigraph, but it is no number to its SPARQL: isNumeric() is false, FILTER(?n > 1) leaves
# it out and so does FILTER(?n <= 1), and one of them makes SUM() of all the others
# unbound. No error is raised. A larger xsd:decimal (here 10^20 + 0.5) is compared as it
# should be, and so is the same integer in rdflib.
#
# Seen:  pyoxigraph: stored 3, isNumeric 2, > 1: 2, <= 1: 0, SUM of the integers: None
#        rdflib:     stored 3, isNumeric 3, > 1: 3, <= 1: 0, SUM: 18446744073709551620
# SPARQL calls a term numeric if its datatype is a numeric one and its text is valid for it.
# The documentation of pyoxigraph names no limit; only the Rust crate of its datatypes says
# that an integer is kept in 64 bits.
set -euo pipefail
dir=$(mktemp -d)
trap 'rm -rf "$dir"' EXIT
python3 -m venv "$dir/venv"
"$dir/venv/bin/pip" install -q pyoxigraph==0.5.13 rdflib==7.6.0

"$dir/venv/bin/python" - <<'PY'
import sys, pyoxigraph, rdflib
DATA = """PREFIX : <http://example.org/>
:a :n 5 . :b :n 18446744073709551615 . :c :n 100000000000000000000.5 ."""
store, graph = pyoxigraph.Store(), rdflib.Graph().parse(data=DATA, format="turtle")
store.load(DATA, pyoxigraph.RdfFormat.TURTLE)

def ask(data, value):
    def count(filter):
        return len(list(data.query(f"SELECT ?s {{ ?s ?p ?n FILTER({filter}) }}")))
    [row] = data.query("SELECT (SUM(?n) AS ?sum) { ?s ?p ?n FILTER(DATATYPE(?n) = "
                       "<http://www.w3.org/2001/XMLSchema#integer>) }")
    total = row[0] and int(value(row[0]))
    return len(data), count("isNumeric(?n)"), count("?n > 1"), count("?n <= 1"), total

ox, rd = ask(store, lambda term: term.value), ask(graph, str)
print("stored, isNumeric, > 1, <= 1, SUM: pyoxigraph", ox, "rdflib", rd)
if ox != (3, 2, 2, 0, None) or rd != (3, 3, 3, 0, 18446744073709551620):
    sys.exit("CHANGED: pyoxigraph's SPARQL treats an integer of 2^63 or more otherwise")
PY
