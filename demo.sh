#!/usr/bin/env bash
# The whole of longscan in a few minutes on two CPU cores: prepare, train, stop, resume, evaluate, sample.
# Each command is shown before it runs, so that you can run it again by hand. Everything lies in .demo/.
set -euo pipefail
cd "$(dirname "$0")"

corpus=.demo/corpus
run=.demo/run
stop_at=${DEMO_STOP_AT:-200}

heading() { printf '\n\033[1m%s\033[0m\n' "$*"; }
show() {
  local word line=
  for word in "$@"; do
    case $word in *[\ \(]*) line+=" '$word'" ;; *) line+=" $word" ;; esac
  done
  printf '\033[36m$%s\033[0m\n' "$line"
  "$@"
}

started=$SECONDS
rm -rf .demo

heading "1. Prepare the Python standard library as a corpus"
show longscan prepare python-stdlib --output $corpus --shard-mib 4

heading "2. Train a small Griffin with two Ray workers, and stop half-way"
show longscan train griffin-demo "data.corpora=[$corpus]" --run $run --stop-at "$stop_at"

heading "3. The same command resumes in new processes; the next step sees the row that follows"
show longscan train griffin-demo "data.corpora=[$corpus]" --run $run
python - "$run/ledger.jsonl" "$stop_at" <<'PYTHON'
import json, sys
lines = {entry["step"]: entry for entry in map(json.loads, open(sys.argv[1]))}
before, after = lines[int(sys.argv[2])], lines[int(sys.argv[2]) + 1]
for entry in (before, after):
    print(f"step {entry['step']} (incarnation {entry['incarnation']}) trained rows {entry['rows'][0]} to {entry['rows'][1] - 1}")
assert after["rows"][0] == before["rows"][1], "the resumed run lost or repeated rows"
PYTHON

heading "4. Evaluate on held-out files at lengths it was not trained on"
show longscan eval extrapolate $run

heading "5. Continue a prompt"
show longscan generate $run 'def __init__(self, ' --tokens 300 --temperature 0.7

heading "Done in $((SECONDS - started)) s"
echo "run folder: $run   plot: $run/evals/extrapolation.png   curves: .venv/bin/tensorboard --logdir $run/tensorboard"
