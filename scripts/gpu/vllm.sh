#!/usr/bin/env bash
# Figures inside vLLM: a returning prompt after a restart, computed, read from raw blocks at 1 GB/s, and restored by our connector.
# usage: scripts/gpu/vllm.sh PART...
#
#   smollm2   2,048 to 7,680 tokens (6 min)
#   qwen      the same with the qwen2.5-coder pair (8 min; `codec.sh convert calibrate` first, or give QWEN_DRAFT=trunk)
#   overhead  throughput of requests that miss (4 min)
#   damage    answers from a store that is damaged at random (5 min)
#
# Needs one GPU and vLLM (docs/vllm.md; VLLM_SITE names a folder with its packages where it is not installed). Each mode is two processes, of which
# vLLM's imports and start take a minute: give LIMIT_S 200 s for each mode at least (three modes: 600, the default).
# Environment, beside common.sh's: LENGTHS (2048,4096,7680), MODES (plain,disk,foretold), REPEATS (3), MEMORY (.2: share of the GPU's memory),
# WAIT_S (45: how long coding is waited for), SMOLLM2 and QWEN (models' folders; default: where the pairs are converted to), QWEN_DRAFT, QWEN_PACK
source "$(dirname "${BASH_SOURCE[0]}")/common.sh"

LENGTHS=${LENGTHS:-2048,4096,7680}
MODES=${MODES:-plain,disk,foretold}
export PYTHONPATH=$PYTHONPATH${VLLM_SITE:+:$(absolute "$VLLM_SITE")}
export VLLM_USE_FLASHINFER_SAMPLER=0 HF_HUB_OFFLINE=1

folder() {  # PAIR target|draft: where a pair's model is converted to
    [ "$DRY" = 1 ] && echo "FOLDER/$1-$2" && return
    (cd "$root" && "$PYTHON" scripts/gpu/convert_pair.py --pair "$1" 2>/dev/null) | sed -n "$([ "$2" = target ] && echo 1 || echo 2)s/: .*//p"
}

rows() {  # NAME MODEL OPTIONS...: all modes in one command, which compares their texts; its processes start together and take turns
    local name=$1 model=$2
    shift 2
    need "$model" "a model's folder: part convert of codec.sh makes those of the pairs" || return
    [ "$DRY" = 1 ] || mkdir -p "$OUT/$name-logs"
    run "$name" scripts/bench_vllm.py --model "$model" --tokens "$LENGTHS" --modes "$MODES" --disk-speed 1 --repeats "${REPEATS:-3}" --together \
        --wait-s "${WAIT_S:-45}" --gpu-memory "${MEMORY:-0.2}" --logs "$OUT/$name-logs" "$@" --json-out "$OUT/vllm-$name.json"
}

part_smollm2() { rows smollm2 "${SMOLLM2:-$(folder smollm2 target)}" --draft trunk; }

part_qwen() {
    local pack=()
    [ -n "${QWEN_PACK:-}" ] && pack=(--pack "$(absolute "$QWEN_PACK")")
    rows qwen "${QWEN:-$(folder qwen2.5-coder target)}" --draft "${QWEN_DRAFT:-$(folder qwen2.5-coder draft)}" "${pack[@]}"
}

part_overhead() {
    run overhead scripts/bench_vllm.py --model "${SMOLLM2:-$(folder smollm2 target)}" --overhead "${ROUNDS:-9}" --new-tokens 32 \
        --gpu-memory "${MEMORY:-0.2}" --json-out "$OUT/overhead.json"
}

part_damage() {
    run damage scripts/bench_vllm.py --damage "${REQUESTS:-2000}" --gpu-memory "${MEMORY:-0.2}" --json-out "$OUT/damage.json"
}

parts smollm2 qwen overhead damage -- "$@"
