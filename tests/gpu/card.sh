#!/usr/bin/env bash
# Run every stage on a borrowed GPU. Wheels that the machine lacks lie in .whl/; the results go to $OUT. See README.md beside this file.
#   bash tests/gpu/card.sh [--stage right|fast|train] [--limit-seconds N] ...
set -u
: "${OUT:?Set OUT to the directory of the results.}"
export PYTHONUNBUFFERED=1 HF_HUB_OFFLINE=1
if ls .whl/*.whl > /dev/null 2>&1; then
  if python3 -m pip install -q --no-index --no-deps --no-compile --no-cache-dir --upgrade --target /tmp/site .whl/*.whl; then
    export PYTHONPATH=/tmp/site
  else
    echo "The wheels could not be installed: what needs them is absent from the report."
  fi
fi
nvidia-smi --query-gpu=name,memory.total,driver_version --format=csv,noheader 2> /dev/null || echo "no nvidia-smi"
python3 tests/gpu/run.py "$OUT" "$@"
ls -l "$OUT"
