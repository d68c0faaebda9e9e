#!/usr/bin/env bash
# Figures of plain decoding: tokens a second beside the time that reading the weights takes, and beside vLLM's on the same machine.
# usage: scripts/gpu/throughput.sh PART...
#
#   ours     random weights of SHAPE through Engine.generate, beside the read bound (1 min)
#   same     whether deterministic texts are those of the same prompts alone (1 min)
#   step     one captured step alone, by its rows, beside the library's products (1 min)
#   tune     launch shapes of one captured step, each measured in whole steps (1 min for each of TUNE_ROWS)
#   kernels  every Triton kernel beside ceilings that the run measures (3 min)
#   sampled  tokens a second at temperature 0 and 1 (2 min)
#   full     batches that are kept full: prompts run beside others' decoding (2 min)
#   prompts  time to the first token of prompts behind known beginnings (1 min)
#   vllm-full  the same batches through vLLM (1 to 2 min for each of FULL_BATCHES)
#   vllm     vLLM on the same shape, prompts and machine (3 min; needs VLLM_BENCH)
#
# Needs one GPU. Environment, beside common.sh's: SHAPE (qwen2.5-1.5b), BATCHES (1,8,32,128), NEW_TOKENS (256), REPEATS (3), STEP_SHAPE (1.5b; 135m for
# `tune`), ROWS (1,5,8x1,32x1,128x1), TUNE_ROWS (8x3,32x1), VLLM_BENCH (a script that times vLLM over token ids, with the options of `part_vllm` below),
# FULL_BATCHES (8 32), FULL_PROMPTS (24-96 200-800: tokens of their prompts), VLLM_SITE (folder with vLLM's packages, for a machine that has none installed)
source "$(dirname "${BASH_SOURCE[0]}")/common.sh"

SHAPE=${SHAPE:-qwen2.5-1.5b}
BATCHES=${BATCHES:-1,8,32,128}
NEW_TOKENS=${NEW_TOKENS:-256}
REPEATS=${REPEATS:-3}
FULL_BATCHES=${FULL_BATCHES:-8 32}
FULL_PROMPTS=${FULL_PROMPTS:-24-96 200-800}

part_ours() {
    run ours scripts/bench/decode_profile.py --shape "$SHAPE" --batches "$BATCHES" --new-tokens "$NEW_TOKENS" --repeats "$REPEATS" \
        --json-out "$OUT/decode.json"
}

part_same() {
    run same scripts/bench/decode_profile.py --shape "$SHAPE" --draft "${DRAFT_SHAPE:-qwen2.5-0.5b}" --same-texts "${PROMPTS:-20}" \
        --new-tokens "$NEW_TOKENS" --json-out "$OUT/same-texts.json"
}

part_step() {
    run step scripts/bench_decode_step.py --shape "${STEP_SHAPE:-1.5b}" --rows "${ROWS:-1,5,8x1,32x1,128x1}" --json-out "$OUT/step.json"
}

part_tune() {
    run tune scripts/bench/decode_tune.py --shape "${STEP_SHAPE:-135m}" --rows "${TUNE_ROWS:-8x3,32x1}" --seconds 60 --json-out "$OUT/tuned.json"
}

part_kernels() {
    run kernels scripts/bench_kernels.py --seconds 2 --deadline "${DEADLINE_S:-180}" --json-out "$OUT/kernels.json"
}

part_sampled() {
    run sampled scripts/bench_throughput.py --shape "$SHAPE" --engines foretold --modes plain --batches "$BATCHES" --prompt-tokens 128 \
        --new-tokens "$NEW_TOKENS" --temperature 0,1 --repeats "$REPEATS" --device "$DEVICE" --json-out "$OUT/throughput.json"
}

part_full() {
    # shellcheck disable=SC2086 # several spans
    run full scripts/bench/continuous_batch.py --shape "$SHAPE" --batches "${FULL_BATCHES// /,}" --prompt-tokens $FULL_PROMPTS --json-out "$OUT/full.json"
}

part_prompts() {
    run prompts scripts/bench/prompt_times.py --shape "$SHAPE" --json-out "$OUT/prompts.json"
}

part_vllm_full() {
    local batch folder
    run shape-folder scripts/gpu/shape_folder.py --shape "$SHAPE" --prompts 1 --out "$OUT/$SHAPE"
    [ "$DRY" = 1 ] && return
    folder=$(mktemp -d)  # vLLM starts Python again, which looks for modules beside the script and in the working folder first
    cp "$root/scripts/bench/continuous_batch.py" "$folder"
    for batch in $FULL_BATCHES; do
        echo "== vllm-full-$batch"
        # shellcheck disable=SC2086 # several spans
        (cd "$folder" && PYTHONPATH=${VLLM_SITE:-} VLLM_USE_FLASHINFER_SAMPLER=0 VLLM_NO_USAGE_STATS=1 HF_HUB_OFFLINE=1 timeout "$LIMIT_S" \
            "$PYTHON" continuous_batch.py --engine vllm --shape "$SHAPE" --folder "$OUT/$SHAPE" --batches "$batch" --prompt-tokens $FULL_PROMPTS \
            --json-out "$OUT/vllm-full-$batch.json") 2>&1 | tee "$OUT/vllm-full-$batch.log" | tail -3
        [ "${PIPESTATUS[0]}" -eq 0 ] || failed+=("vllm-full-$batch")
    done
    rm -r "$folder"
}

part_vllm() {
    local bench empty
    if [ -z "${VLLM_BENCH:-}" ]; then
        echo "== left out: vllm (give VLLM_BENCH=SCRIPT)" >&2
        failed+=(vllm)
        return
    fi
    bench=$(absolute "$VLLM_BENCH")
    if [ -e "$(dirname "$bench")/profile.py" ]; then  # it would stand for Python's own module, which vLLM imports
        echo "error: $(dirname "$bench")/profile.py hides Python's module of that name (move it)" >&2
        failed+=(vllm)
        return
    fi
    run shape-folder scripts/gpu/shape_folder.py --shape "$SHAPE" --prompts 128 --out "$OUT/$SHAPE"
    [ "$DRY" = 1 ] && return
    empty=$(mktemp -d)  # vLLM starts Python again, which looks for modules in the working folder first
    echo "== vllm"
    (cd "$empty" && PYTHONPATH=${VLLM_SITE:-} VLLM_USE_FLASHINFER_SAMPLER=0 timeout "$LIMIT_S" "$PYTHON" "$bench" --target "$OUT/$SHAPE" \
        --load-format dummy --skip-tokenizer --prompts-file "$OUT/$SHAPE/prompts.json" --batches "$BATCHES" --new-tokens "$NEW_TOKENS" --repeats 2 \
        --max-num-seqs 128 --gpu-mem 0.5 --json-out "$OUT/vllm.json") 2>&1 | tee "$OUT/vllm.log"
    [ "${PIPESTATUS[0]}" -eq 0 ] || failed+=(vllm)
    rmdir "$empty" 2>/dev/null
}

parts ours same step tune kernels sampled full prompts vllm-full vllm -- "$@"
