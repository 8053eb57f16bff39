#!/usr/bin/env bash
# CaCoVID (AAAI 2026): its data, training and evaluation, on LLaVA-OneVision-7B.
# Video-R1-260k, its 104k multiple-choice questions on videos; those that one of two models answers without the video
# go (31k were left to the authors); one epoch, 8 prompts a step, 5 iterations each with replay; Tables 1 to 5.

. "$(dirname "$0")/common.sh"

MODEL=${CHOSEN:-llava-hf/llava-onevision-qwen2-7b-ov-hf}
BLIND=(--model "$MODEL" --model Qwen/Qwen2.5-VL-3B-Instruct)
# One epoch of 31,000 questions at 8 a step.
TRAIN=(--variant paper --frames 32 --precision bf16 --steps 3875 --prompts-per-step 8
  --ratio 0.02 --token-rollouts 24 --frame-rollouts 8 --iterations 5 --dynamic-ratio --body-lr 1e-7 --head-lr 1e-6
  --save-every 100)
if [ -n "$TESTBED" ]; then
  MODEL=testbed
  BLIND=(--model testbed --seeds 3)
  TRAIN=(--variant paper --frames 16 --steps 8 --prompts-per-step 4 --token-rollouts 4 --frame-rollouts 2
    --iterations 2 --dynamic-ratio --threads 1 --save-every 4)
  [ -e "$DATA/truth.json" ] || run $VIDSIEVE testbed render "$DATA" --format video-r1 --scenes 12 --seed 41 --broken 0.1 --leaked 0.2
fi

# 1. What is there: counts by source and kind, missing and broken videos in a list.
run $VIDSIEVE data check "$DATA/Video-R1-260k.json" --list "$OUT/unusable.jsonl" --readers 16

# 2. The blind test.
each data filter "$DATA/Video-R1-260k.json" "$OUT/filtered.jsonl" "${BLIND[@]}" --rule any

# 3. Training: 24 token and 8 frame rollouts a prompt. The videos are encoded once.
each train cacovid "$OUT/run" --data "$OUT/filtered.jsonl" --model "$MODEL" "${TRAIN[@]}" $(going_on "$OUT/run")

# 4. Evaluation: LongVideoBench, MLVU (dev and test) and Video-MME; published beside measured.
if [ -n "$TESTBED" ]; then
  run $VIDSIEVE eval testbed --methods "$OUT/run/policy,uniform" --retention 0.25 --questions 24 --threads 1 --out "$OUT/eval"
elif [ -n "$CHOSEN" ]; then
  benchmarks longvideobench mlvu mlvu-test videomme
else
  run $WORKBENCH reproduce cacovid:table1 --data "$DATA" --policy "llava-onevision:cacovid=$OUT/run/policy" --out "$OUT/table1" --bundle "$OUT/table1.json"
fi
