#!/usr/bin/env bash
# Figures of the codec: a pair's calibration, what coded sessions cost and lose, and how fast they come back.
# usage: scripts/gpu/codec.sh PART...
#
#   convert    the pair from its GGUF files (30 s; without a network give TARGET_PIECES and DRAFT_PIECES)
#   texts      folders of texts to calibrate and test on, out of this machine's files (1 to 3 min; texts.py says what it looks for)
#   calibrate  a pack within a restore budget (2 min)
#   full       a pack without one (1 min; OUT/full.pack)
#   curve      a pack of before with its divergence curve measured anew (1 min; OLD_PACK to PACK)
#   resume     a session back from its file beside recomputing it, 1K to 32K tokens (2 min)
#   suspend    stages of suspending 8K and 16K tokens (1 min)
#   shapes     resuming random weights of larger shapes, and our KVTC baseline beside it (4 min)
#   domains    bits and divergence on kinds of text that nobody calibrated on (3 min)
#   bits       bits an element against divergence, both packs, KVTC calibrated on the same text, and all compared (5 min)
#   tasks      questions after a resume, at each of CONTEXTS (8K 2 min, 16K 4 min, 32K 8 min)
#   position   bits and divergence against position in texts of 32K tokens (3 min)
#   continue   whether sessions go on with the same words (2 min)
#   greedy     greedy text in float32 beside transformers' (2 min)
#   formats    what KV attended in few bits costs (2 min)
#   sweep      features and sizes of the predictor (5 min)
#
# Needs one GPU with 40 GB. Parts after `calibrate` need its pack (PACK), all need TEXTS. Environment, beside common.sh's:
# PAIR (qwen2.5-coder), TEXTS (OUT/texts), SOURCES (folders that texts are looked for in: /usr), PACK (OUT/PAIR.pack), BUDGET (.19: restore budget),
# TOKENS (277000: to calibrate on; `full` takes 600000), LENGTHS (1024,4096,8192,16384,32000), CONTEXTS (8192 16384 32768), TEST_TOKENS (24576),
# SAMPLES (4: texts of a task), CONTEXT (1024: tokens of a document), CURVE_TOKENS (106496: that divergence is measured on, of all kinds together),
# OLD_PACK (PACK: of `curve`)
source "$(dirname "${BASH_SOURCE[0]}")/common.sh"

PAIR=${PAIR:-qwen2.5-coder}
TEXTS=$(absolute "${TEXTS:-$OUT/texts}")
PACK=$(absolute "${PACK:-$OUT/$PAIR.pack}")
OLD_PACK=$(absolute "${OLD_PACK:-$PACK}")
FULL_PACK=$OUT/full.pack
BUDGET=${BUDGET:-0.19}
TOKENS=${TOKENS:-277000}
FULL_TOKENS=${FULL_TOKENS:-600000}
LENGTHS=${LENGTHS:-1024,4096,8192,16384,32000}
CONTEXTS=${CONTEXTS:-8192 16384 32768}
CONTEXT=${CONTEXT:-1024}
CURVE_TOKENS=${CURVE_TOKENS:-106496}
TEST_TOKENS=${TEST_TOKENS:-24576}
SAMPLES=${SAMPLES:-4}
REPEATS=${REPEATS:-3}
baselines=kvtc-0.25bit,kvtc-0.5bit,turboquant-mean-2bit,fp8
qualities=near-lossless,balanced,compact,tiny
common=(--pair "$PAIR" --device "$DEVICE")

# what there is to calibrate on (the kinds that are there, and the share of each in the tokens): once TEXTS is made
calibration=() mix= curve=()
need_texts() {
    local kind
    need "$TEXTS/cal" "part texts" || return
    calibration=() mix=
    # what a curve is measured on: other kinds, and files of the calibration's own that it has not seen (not those that a generator makes, which repeat)
    curve=("$TEXTS"/curve/*/)
    for kind in std lib rst man yaml; do
        [ -d "$TEXTS/mix/$kind" ] && curve+=("$TEXTS/mix/$kind")
    done
    for kind in std:8 lib:3 rst:1.5 man:1.5 yaml:.75 logs:.75 json:.75 chat:.4; do
        if [ -d "$TEXTS/cal/${kind%:*}" ]; then
            calibration+=("$TEXTS/cal/${kind%:*}")
            mix+=${mix:+,}${kind#*:}
        fi
    done
}
named() { local folder; for folder in "$TEXTS/$1"/*/; do echo "$(basename "$folder")=${folder%/}"; done; }  # NAME=DIR of every kind there
filler=("$TEXTS/test/markdown" "$TEXTS/test/changelog" "$TEXTS/long/prose")

part_texts() {
    local site
    site=$("$PYTHON" -c 'import sysconfig; print(sysconfig.get_paths()["purelib"])')
    # shellcheck disable=SC2086 # several folders
    run texts scripts/gpu/texts.py --from ${SOURCES:-/usr} "$site" --chat-pair "$PAIR" --out "$TEXTS"
}

part_convert() {
    local pieces=()
    # shellcheck disable=SC2206 # several files
    [ -n "${TARGET_PIECES:-}" ] && pieces+=(--target-pieces $TARGET_PIECES)
    # shellcheck disable=SC2206
    [ -n "${DRAFT_PIECES:-}" ] && pieces+=(--draft-pieces $DRAFT_PIECES)
    run convert scripts/gpu/convert_pair.py --pair "$PAIR" "${pieces[@]}"
}

part_calibrate() {
    need_texts || return
    run calibrate scripts/calibrate.py "${common[@]}" --text "${calibration[@]}" --mix "$mix" --tokens "$TOKENS" --context "$CONTEXT" \
        --restore-budget "$BUDGET" --curve-text "${curve[@]}" --curve-tokens "$CURVE_TOKENS" --out "$PACK" --json-out "$OUT/calibrate.json"
}

part_curve() {
    need_texts || return
    need "$OLD_PACK" "OLD_PACK" || return
    run curve scripts/calibrate.py "${common[@]}" --complete "$OLD_PACK" --text "$TEXTS/mix" --tokens 8192 --context "$CONTEXT" \
        --curve-text "${curve[@]}" --curve-tokens "$CURVE_TOKENS" --out "$PACK" --json-out "$OUT/curve.json"
}

part_full() {
    need_texts || return
    run full scripts/calibrate.py "${common[@]}" --text "${calibration[@]}" --mix "$mix" --tokens "$FULL_TOKENS" --context "$CONTEXT" \
        --recomputed-layers 4 --predictor dense --budget 0.056 --out "$FULL_PACK" --json-out "$OUT/calibrate-full.json"
}

part_resume() {
    need "$PACK" "part calibrate" || return
    run resume scripts/bench_resume.py "${common[@]}" --pack "$PACK" --tokens "$LENGTHS" --repeats "$REPEATS" \
        --json-out "$OUT/resume.json" --plot "$OUT/resume.png"
}

part_suspend() {  # the second length's figures are those of compiled shapes: the first ones of a process take a second more
    need "$PACK" "part calibrate" || return
    run suspend scripts/bench_resume.py "${common[@]}" --pack "$PACK" --tokens "${SUSPEND_LENGTHS:-8192,16384}" --repeats 5 --json-out "$OUT/suspend.json"
}

part_shapes() {
    run shapes-1.5b scripts/bench_resume.py --shapes qwen2.5-1.5b+0.5b --draft-layers 0 --taps 1 --recomputed-layers 4 --device "$DEVICE" \
        --tokens "$LENGTHS" --repeats "$REPEATS" --json-out "$OUT/resume-1.5b.json" --plot "$OUT/resume-1.5b.png"
    run shapes-8b scripts/bench_resume.py --shapes llama-8b+0.5b --draft-layers 8 --taps 3 --device "$DEVICE" \
        --tokens "$LENGTHS" --repeats "$REPEATS" --json-out "$OUT/resume-8b.json" --plot "$OUT/resume-8b.png"
    run shapes-kvtc scripts/bench_resume.py --shapes qwen2.5-1.5b+0.5b --draft-layers 8 --taps 3 --recomputed-layers 4 --device "$DEVICE" \
        --tokens "$LENGTHS" --repeats "$REPEATS" --kvtc kvtc-0.5bit --json-out "$OUT/resume-kvtc.json" --plot "$OUT/resume-kvtc.png"
    run shapes-70b scripts/bench_resume.py --shapes llama-70b+1b --device "$DEVICE" --tokens 8192 --repeats 1 --json-out "$OUT/resume-70b.json"
}

part_domains() {
    local kinds
    need "$PACK" "part calibrate" || return
    mapfile -t kinds < <(named test; named long | sed 's/^code=/long-code=/')
    run domains scripts/eval_sessions.py "${common[@]}" --pack "$PACK" --text "${filler[@]}" --tasks domains --domains "${kinds[@]}" \
        --domain-tokens "${DOMAIN_TOKENS:-8192}" --domain-context "$CONTEXT" --qualities "$qualities" --json-out "$OUT/domains.json"
}

part_bits() {
    local text pack name ours=foretold,foretold-step0.5,foretold-step0.8,foretold-step1.2,foretold-step1.7,foretold-step2.8
    need_texts || return
    text=("${common[@]}" --text "$TEXTS/mix" --calibration-text "${calibration[@]}" --calibration-tokens "${CALIBRATION_TOKENS:-131072}"
        --tokens "$TEST_TOKENS" --context "$CONTEXT")
    run bits-kvtc scripts/bench_codec.py "${text[@]}" --methods kvtc --json-out "$OUT/bits-kvtc.json"
    for pack in "$PACK" "$FULL_PACK"; do
        need "$pack" "parts calibrate and full" || continue
        name=$(basename "$pack" .pack)
        run "bits-$name" scripts/bench_codec.py "${text[@]}" --pack "$pack" --methods "$ours" --json-out "$OUT/bits-$name.json"
        run "compare-$name" scripts/codec_compare.py "$OUT/bits-$name.json" "$OUT/bits-kvtc.json" \
            --json-out "$OUT/codec-$name.json" --plot "$OUT/codec-$name.png"
    done
}

part_tasks() {
    local length
    need "$PACK" "part calibrate" || return
    for length in $CONTEXTS; do
        run "tasks-$length" scripts/eval_sessions.py "${common[@]}" --pack "$PACK" --text "${filler[@]}" --tasks planted,long --contexts "$length" \
            --samples "$SAMPLES" --batch "$SAMPLES" --long-questions 2 --qualities "$qualities" --baselines "$baselines" \
            --baseline-text "$TEXTS/cal/std" "$TEXTS/cal/rst" --json-out "$OUT/tasks-$length.json"
    done
}

part_position() {
    need "$PACK" "part calibrate" || return
    run position scripts/eval_sessions.py "${common[@]}" --pack "$PACK" --text "${filler[@]}" --tasks position \
        --long "code=$TEXTS/long/code" "agent=$TEXTS/long/agent" --position-context "${POSITION_CONTEXT:-32700}" --position-texts 2 \
        --qualities near-lossless,balanced,tiny --plot "$OUT/position.png" --json-out "$OUT/position.json"
}

part_continue() {
    local kinds
    need "$PACK" "part calibrate" || return
    mapfile -t kinds < <(named test)
    run continue scripts/eval_sessions.py "${common[@]}" --pack "$PACK" --text "${filler[@]}" --tasks continuation --domains "${kinds[@]}" \
        --continuation-prompts "$SAMPLES" --new-tokens 32 --qualities near-lossless,balanced --json-out "$OUT/continuation.json"
}

part_greedy() {
    local earlier=()
    [ "$PAIR" = qwen2.5-coder ] && earlier=(--against scripts/results/greedy-cpu-qwen2.5-coder.json)
    run greedy scripts/check_greedy.py "${common[@]}" --max-new-tokens "${GREEDY_TOKENS:-48}" "${earlier[@]}" --json-out "$OUT/greedy.json"
}

part_formats() {
    need "$TEXTS/mix" "part texts" || return
    run formats scripts/eval_hot.py "${common[@]}" --text "$TEXTS/mix" --tokens "$TEST_TOKENS" --context "$CONTEXT" --json-out "$OUT/formats.json"
}

part_sweep() {
    need_texts || return
    run sweep scripts/sweep_predictor.py "${common[@]}" --text "${calibration[@]}" --tokens "$TOKENS" --recomputed-layers 4 \
        --json-out "$OUT/sweep.json" --plot "$OUT/sweep.png"
}

parts convert texts calibrate full curve resume suspend shapes domains bits tasks position continue greedy formats sweep -- "$@"
