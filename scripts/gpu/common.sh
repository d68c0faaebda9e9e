# Sourced by the scripts beside it: where things lie, how a part is run, and which parts were asked for (part-name: function part_part_name).
#
# Environment of all of them:
#   OUT     folder for results, logs and packs (default: gpu-results)
#   PYTHON  interpreter with the project's dependencies (default: python3)
#   DEVICE  cuda or cpu (default: cuda; a CPU serves to try a script with small sizes)
#   LIMIT_S seconds after which one command is ended (default: 600)
#   DRY     1: print the commands and run none
set -uo pipefail
shopt -s nullglob

root=$(cd "$(dirname "${BASH_SOURCE[0]}")/../.." && pwd)
PYTHON=${PYTHON:-python3}
DEVICE=${DEVICE:-cuda}
LIMIT_S=${LIMIT_S:-600}
DRY=${DRY:-0}

# Commands run in the repository's root: paths that the caller gave are made independent of it.
absolute() { case $1 in /*) echo "$1" ;; *) echo "$PWD/$1" ;; esac; }
OUT=$(absolute "${OUT:-gpu-results}")
export PYTHONPATH=$root:$root/scripts${PYTHONPATH:+:$PYTHONPATH}
export PYTHONUNBUFFERED=1 TOKENIZERS_PARALLELISM=false
failed=()

# run NAME SCRIPT OPTIONS...: one command; what it prints goes to OUT/NAME.log as well. A failure is noted, and the next command runs all the same.
run() {
    local name=$1 began=$SECONDS code
    shift
    if [ "$DRY" = 1 ]; then
        printf '%q ' "$@"
        echo
        return
    fi
    mkdir -p "$OUT"
    echo "== $name: $*"
    (cd "$root" && timeout --kill-after 10 "$LIMIT_S" "$PYTHON" "$@") 2>&1 | tee "$OUT/$name.log"
    code=${PIPESTATUS[0]}
    echo "== $name: status $code after $((SECONDS - began)) s"
    [ "$code" -eq 0 ] || failed+=("$name")
}

# need FILE WHAT: whether a file is there that another part makes; else the part is left out, by name.
need() {
    [ "$DRY" = 1 ] || [ -e "$1" ] && return
    echo "== left out: ${1:-a path} is missing ($2)" >&2
    failed+=("$1")
    return 1
}

# parts NAMES -- ASKED...: run the functions part_NAME that were asked for; none, or a name that is unknown: say which there are.
parts() {
    local known=() name
    while [ "$1" != -- ]; do known+=("$1"); shift; done
    shift
    if [ $# -eq 0 ]; then
        sed -n '2,/^[^#]/{/^#/s/^# \{0,1\}//p}' "$0"
        echo "parts: ${known[*]} (all: each of them)"
        exit 2
    fi
    [ "$*" = all ] && set -- "${known[@]}"
    for name in "$@"; do
        if [[ " ${known[*]} " != *" $name "* ]]; then
            echo "error: unknown part '$name' (parts: ${known[*]}, or all)" >&2
            exit 2
        fi
    done
    for name in "$@"; do "part_${name//-/_}"; done
    [ "${#failed[@]}" -eq 0 ] && exit 0
    echo "== failed: ${failed[*]}" >&2
    exit 1
}
