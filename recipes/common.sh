# What both recipes share: their options, and running or printing a command.
set -euo pipefail

VIDSIEVE=${VIDSIEVE:-vidsieve}
TORCHRUN=${TORCHRUN:-torchrun}
# The papers' tables are made by the workbench of this checkout.
export PYTHONPATH="$(cd "$(dirname "$0")/.." && pwd)${PYTHONPATH:+:$PYTHONPATH}"
WORKBENCH=${WORKBENCH:-python -m workbench}
GPUS="" DATA="" OUT="" CHOSEN="" TEACHER="" TEACHER_MODEL="Qwen/Qwen3-VL-235B-A22B-Instruct" TESTBED="" PRINT=""

usage() {
  sed -n '2,/^$/s/^# \{0,1\}//p' "$0"
  cat <<'END'
Options:
  --data DIR           the published sets (recipes/README.md says what lies where)
  --out DIR            where everything goes; the same command goes on there
  --model NAME         another model than the paper's, as Qwen/Qwen3-VL-8B-Instruct: the same training and benchmarks
  --gpus N             processes, one a GPU (8; 2 with --testbed)
  --teacher URL        OpenAI-compatible server that re-writes captions (score.sh); without it they stay as published
  --teacher-model NAME its model (Qwen/Qwen3-VL-235B-A22B-Instruct)
  --testbed            the whole recipe in small, on files of the testbed in the published layouts: no download, minutes
  --print              print the commands, run nothing
END
}

while [ $# -gt 0 ]; do
  case "$1" in
    --data | --out | --model | --gpus | --teacher | --teacher-model)
      [ $# -gt 1 ] || { echo "$1 needs a value" >&2; exit 2; }
      case "$1" in
        --data) DATA=$2 ;; --out) OUT=$2 ;; --model) CHOSEN=$2 ;; --gpus) GPUS=$2 ;; --teacher) TEACHER=$2 ;; --teacher-model) TEACHER_MODEL=$2 ;;
      esac
      shift 2 ;;
    --testbed) TESTBED=yes; shift ;;
    --print) PRINT=yes; shift ;;
    -h | --help) usage; exit 0 ;;
    *) echo "unknown option $1; see $0 --help" >&2; exit 2 ;;
  esac
done
[ -n "$OUT" ] || { echo "--out is needed; see $0 --help" >&2; exit 2; }
[ -n "$DATA" ] || [ -n "$TESTBED" ] || { echo "--data is needed, or --testbed; see $0 --help" >&2; exit 2; }
[ -n "$DATA" ] || DATA=$OUT/data
[ -n "$GPUS" ] || GPUS=$([ -n "$TESTBED" ] && echo 2 || echo 8)

# Print a command, and run it.
run() {
  echo "+ $*"
  if [ -z "$PRINT" ]; then "$@"; fi
}

# The same on every GPU. Two processes on one machine without any share its cores.
each() { run $TORCHRUN --standalone --nproc-per-node "$GPUS" -m vidsieve "$@"; }

# The benchmarks in the arguments, with the policy and the strongest method without training beside it.
benchmarks() {
  for name in "$@"; do
    run $VIDSIEVE eval "$name" "$DATA/$name" --model "$MODEL" --methods "$OUT/run/policy,divprune" --retention 0.4,0.25,0.1 --out "$OUT/$name"
  done
}

# Goes on with a run where there is one.
going_on() { if [ -e "$1/metrics.jsonl" ]; then echo --resume; fi; }
