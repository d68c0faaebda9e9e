#!/usr/bin/env bash
# Figures of windowed layers that keep their window alone: memory and decode speed, with and without, random weights.
# usage: scripts/gpu/windows.sh PART...
#
#   gemma    shape of Gemma 3 1B, four texts of 16,448 tokens (1 min)
#   mistral  shape of Mistral 7B 0.1, likewise (2 min)
#
# Needs one GPU with 40 GB. Environment, beside common.sh's: TOKENS (16448), BATCH (4), NEW_TOKENS (128), REPEATS (2), GEMMA and MISTRAL (shapes)
source "$(dirname "${BASH_SOURCE[0]}")/common.sh"

sizes=(--tokens "${TOKENS:-16448}" --batch "${BATCH:-4}" --repeats "${REPEATS:-2}" --new-tokens "${NEW_TOKENS:-128}")

part_gemma() { run windows-gemma scripts/bench_windows.py --shape "${GEMMA:-gemma3-1b}" "${sizes[@]}" --json-out "$OUT/windows-gemma.json"; }

part_mistral() { run windows-mistral scripts/bench_windows.py --shape "${MISTRAL:-mistral-7b}" "${sizes[@]}" --json-out "$OUT/windows-mistral.json"; }

parts gemma mistral -- "$@"
