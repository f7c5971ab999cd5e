#!/usr/bin/env bash
# Compiles the proofs in a folder of its own, has coqchk check them again, and compares the axioms
# they rest on with axioms.txt. Prints a line and the seconds for each step; 1 where one fails.
#
#   bash proofs/coq/check.sh [FOLDER]      # apt-get install coq
set -euo pipefail
here="$(cd "$(dirname "${BASH_SOURCE[0]}")" && pwd)"
folder="${1:-$(mktemp -d)}"
modules=(Composition Operations Certificate Meanings Integrals Negative)
mkdir -p "$folder" && cp "$here"/*.v "$folder"/ && cd "$folder"
step() { local start=$SECONDS; local name=$1; shift; "$@" && echo "$name: $((SECONDS - start)) s"; }
if grep -nE '\b(Admitted|admit|Axiom|Parameter|Conjecture|Abort)\b' ./*.v; then
  echo "something is not proved"; exit 1
fi
for module in "${modules[@]}"; do step "$module.v" coqc -q -Q . Fullgrad "$module.v"; done
# our modules only: Coq's own library is the distribution's
step coqchk coqchk -silent -Q . Fullgrad ${modules[@]/#/-norec Fullgrad.}
coqc -q -Q . Fullgrad Audit.v | grep -oE '^[A-Za-z_]+(\.[A-Za-z_]+)+' | sort -u > found.txt
diff "$here/axioms.txt" found.txt
echo "axioms: those of the reals in Coq's library, $(wc -l < found.txt)"
