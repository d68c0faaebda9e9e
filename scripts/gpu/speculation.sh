#!/usr/bin/env bash
# Figures of speculation: tokens a second with automatic and with fixed drafts over plain decoding, what steps cost, and a stream of requests.
# usage: scripts/gpu/speculation.sh PART...
#
#   head     smollm2 with the draft head that ships (2 min)
#   states   smollm2 with the draft head on its last states (2 min)
#   pair     the qwen2.5-coder pair, drafts of its 0.5B model and of the text itself (4 min; `codec.sh convert` first)
#   pair-states  the same target with the draft head on its last states that `heads.sh pair-states` made, and drafts of the text itself (4 min)
#   sampled  smollm2 with the head that ships at temperature 1 as well (3 min)
#   shapes   captured steps of random weights: milliseconds of drafting and verification, the acceptance that they need, first tokens (3 min)
#   load     Poisson streams of requests (2 min)
#   profile  where a step's time goes: kernels, gaps, host; both heads, plain and with two drafts (2 min)
#
# Needs one GPU. Environment, beside common.sh's: BATCHES (1,8,32), TURNS (5), NEW_TOKENS (96), LENGTHS (2: fixed drafts that are timed beside automatic
# ones), STATES (folder of the head on last states: draft/pretrained/smollm2-135m/last-states), PAIR_STATES (that of the qwen2.5-coder target's:
# OUT/head-pair-states), PAIR_LENGTHS (2,3), SHAPE and DRAFT_SHAPE (qwen2.5-1.5b, qwen2.5-0.5b),
# RATES (20,100,300: requests a second), REQUESTS (200)
source "$(dirname "${BASH_SOURCE[0]}")/common.sh"

BATCHES=${BATCHES:-1,8,32}
TURNS=${TURNS:-5}
NEW_TOKENS=${NEW_TOKENS:-96}
LENGTHS=${LENGTHS:-2}
STATES=$(absolute "${STATES:-$root/draft/pretrained/smollm2-135m/last-states}")
PAIR_STATES=$(absolute "${PAIR_STATES:-$OUT/head-pair-states}")
timed=(--batches "$BATCHES" --turns "$TURNS" --new-tokens "$NEW_TOKENS")

part_head() {
    run head scripts/bench/speculation_costs.py --pair smollm2 --lengths "$LENGTHS" --sources draft "${timed[@]}" --json-out "$OUT/speculation-head.json"
}

part_states() {
    run states scripts/bench/speculation_costs.py --pair smollm2 --pair-draft "$STATES" --lengths "$LENGTHS" --sources draft "${timed[@]}" \
        --json-out "$OUT/speculation-states.json"
}

part_pair() {
    run pair scripts/bench/speculation_costs.py --pair qwen2.5-coder --lengths "$LENGTHS" --sources draft ngram "${timed[@]}" \
        --json-out "$OUT/speculation-pair.json"
}

part_pair_states() {
    need "$PAIR_STATES" "heads.sh pair-states" || return
    run pair-states scripts/bench/speculation_costs.py --pair qwen2.5-coder --pair-draft "$PAIR_STATES" --lengths "${PAIR_LENGTHS:-2,3}" \
        --sources draft ngram "${timed[@]}" --json-out "$OUT/speculation-pair-states.json"
    run profile-pair-states scripts/gpu/profile_steps.py --pair qwen2.5-coder --draft "$PAIR_STATES" --device "$DEVICE" --batches "$BATCHES" \
        --json-out "$OUT/steps-pair-states.json"
}

part_sampled() {
    run sampled scripts/bench/speculation_costs.py --pair smollm2 --lengths "$LENGTHS" --sources draft --sampled "${timed[@]}" \
        --json-out "$OUT/speculation-sampled.json"
}

part_shapes() {
    run shapes scripts/bench/speculation_costs.py --shape "${SHAPE:-qwen2.5-1.5b}" --draft "${DRAFT_SHAPE:-qwen2.5-0.5b}" --batches "$BATCHES" \
        --lengths "${SHAPE_LENGTHS:-2,4}" --prefill "${PREFILL:-4096}" --json-out "$OUT/speculation-shapes.json"
}

part_load() {
    run load scripts/bench_load.py --pair smollm2 --device "$DEVICE" --rates "${RATES:-20,100,300}" --requests "${REQUESTS:-200}" --new-tokens 64 \
        --slo-ttft 0.2 --slo-token 0.005 --json-out "$OUT/load.json"
}

part_profile() {
    run profile-head scripts/gpu/profile_steps.py --pair smollm2 --device "$DEVICE" --batches "$BATCHES" --json-out "$OUT/steps-head.json"
    run profile-states scripts/gpu/profile_steps.py --pair smollm2 --draft "$STATES" --device "$DEVICE" --batches "$BATCHES" \
        --json-out "$OUT/steps-states.json"
}

parts head states pair pair-states sampled shapes load profile -- "$@"
