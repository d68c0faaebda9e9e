#!/usr/bin/env bash
# Draft heads: training, and their acceptance on messages that training did not have.
# usage: scripts/gpu/heads.sh PART...
#
#   messages    users' messages to train on (1 s)
#   states      a head on the target's last states, trained from STATES on (MINUTES)
#   exit        a head on the target's first layers, trained from the one that ships on (MINUTES)
#   search      architectures compared, 35 s each (10 min)
#   pair-states a head on the last states of the qwen2.5-coder target, trained from nothing (PAIR_MINUTES + 2 min; `codec.sh convert` first)
#   acceptance  of the head that ships, of STATES, and of what the parts above made, on kinds of messages that are never trained on (2 min)
#
# Needs one GPU with 40 GB, for pair-states one with 141 GB (or PAIR_ROWS=1024). Environment, beside common.sh's: MINUTES (5, sampling included), STATES
# (folder of a head on last states to begin with: draft/pretrained/smollm2-135m/last-states; empty: from nothing), ROWS (4096: conversations drawn at a
# time), HELD_OUT (384), MESSAGES (5000),
# PAIR_MINUTES (4: as MINUTES), PAIR_SAMPLE_MINUTES (1: of these, for sampling), PAIR_ROWS (4096)
source "$(dirname "${BASH_SOURCE[0]}")/common.sh"

MINUTES=${MINUTES:-5}
SHIPPED=$root/draft/pretrained/smollm2-135m
STATES=${STATES-$SHIPPED/last-states}
drawn=(--pair smollm2 --device "$DEVICE" --vocab 20480 --head tied --minutes "$MINUTES" --prompt-share 0.6 --rows "${ROWS:-4096}"
    --held-out "${HELD_OUT:-384}" --prompts "$OUT/messages.txt" --other-prompts "$root/scripts/train/other_prompts.txt")

part_messages() { run messages scripts/everyday_prompts.py --count "${MESSAGES:-5000}" --out "$OUT/messages.txt"; }

part_states() {
    local start=()
    need "$OUT/messages.txt" "part messages" || return
    [ -n "$STATES" ] && start=(--start "$(absolute "$STATES")")
    run states scripts/train_draft.py "${drawn[@]}" --exit-layer 10+20+last --draft-layers 1 "${start[@]}" --out "$OUT/head-states" \
        --json-out "$OUT/train-states.json"
}

part_exit() {
    need "$OUT/messages.txt" "part messages" || return
    run exit scripts/train_draft.py "${drawn[@]}" --exit-layer 5 --draft-layers 3 --start "$SHIPPED" --out "$OUT/head-exit" --json-out "$OUT/train-exit.json"
}

part_search() {
    run search scripts/train_draft.py --pair smollm2 --device "$DEVICE" --minutes 10 --sample-minutes 3 \
        --search "6,2,16384,own 6,2,16384,tied 7,1,16384,tied 5,3,12288,tied 6,2,8192,own 4,2,16384,own" --search-seconds 35 --out "$OUT/head-search" \
        --json-out "$OUT/train-search.json"
}

# Layers at a third and two thirds of 28; the learning rate is what shipped heads were trained with by the ratio of the widths, and was not searched for.
# Half of the messages are about programs; texts are sampled from nearly greedy ones on, as greedy decoding is what is mostly asked of it.
part_pair_states() {
    run pair-messages scripts/everyday_prompts.py --count 10000 --code-share 0.5 --out "$OUT/messages-pair.txt"
    need "$OUT/messages-pair.txt" "the messages of part pair-states" || return
    run pair-states scripts/train_draft.py --pair qwen2.5-coder --device "$DEVICE" --exit-layer 9+18+last --draft-layers 1 --vocab 24576 --head tied \
        --minutes "${PAIR_MINUTES:-4}" --sample-minutes "${PAIR_SAMPLE_MINUTES:-1}" --rows "${PAIR_ROWS:-4096}" \
        --held-out 256 --temperatures 0.3,1 --prompt-share 0.6 --batch-tokens 16384 --learning-rate 4e-4 --unroll 3 --report-every 100 \
        --prompts "$OUT/messages-pair.txt" --other-prompts "$root/scripts/train/other_prompts.txt" --out "$OUT/head-pair-states" \
        --json-out "$OUT/train-pair-states.json"
}

part_acceptance() {
    local folder pair
    for folder in "$SHIPPED" ${STATES:+"$STATES"} "$OUT"/head-*/; do
        case $(basename "$folder") in head-pair-*) pair=qwen2.5-coder ;; *) pair=smollm2 ;; esac
        run "acceptance-$(basename "$folder")" scripts/eval_acceptance.py --pair "$pair" --draft "$folder" --device "$DEVICE" --repeats "${REPEATS:-4}" \
            --json-out "$OUT/acceptance-$(basename "$folder").json"
    done
}

parts messages states exit search pair-states acceptance -- "$@"
