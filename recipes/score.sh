#!/usr/bin/env bash
# SCORE: its two-stage curriculum and its evaluation, on Qwen2.5-VL-7B.
# Warm-up on 10k pseudo-videos of LLaVA-OneVision-Data, then 57k captions of Koala-36M and LLaVA-Video-178K, all of them
# re-written by a teacher; 16 rollouts a video; LVBench, MLVU and Video-MME at 40, 25 and 10 %.

. "$(dirname "$0")/common.sh"

MODEL=${CHOSEN:-Qwen/Qwen2.5-VL-7B-Instruct}
IMAGES=10000 CAPTIONS=57000
KOALA=$DATA/Koala-36M/Koala_36M_1.csv
LLAVA=$DATA/LLaVA-Video-178K/0_30_s_academic_v0_1/0_30_s_academic_v0_1_cap_processed.json
ONEVISION=("$DATA"/LLaVA-OneVision-Data/*/train-*.parquet)
# One epoch of each stage, 8 videos a step.
TRAIN=(--variant paper --frames 128 --precision bf16 --lr 0.02 --prompts-per-step 8 --rollouts 16 --pseudo-steps 1250
  --steps 8375 --save-every 100)
ASK=(--concurrency 32)
if [ -n "$TESTBED" ]; then
  MODEL=testbed IMAGES=12 CAPTIONS=30
  KOALA=$DATA/koala/Koala_36M_1.csv
  LLAVA=$DATA/llava/0_30_s_testbed_v0_1/0_30_s_testbed_v0_1_cap_processed.json
  ONEVISION=("$DATA/images/train-00000-of-00001.parquet")
  TRAIN=(--variant paper --frames 16 --prompts-per-step 4 --rollouts 4 --pseudo-steps 2 --steps 8 --threads 1 --save-every 4)
  ASK=(--concurrency 4)
  render() { [ -e "$DATA/$1/truth.json" ] || run $VIDSIEVE testbed render "$DATA/$1" --format "$2" --scenes 20 --seed "$3" --broken 0.05; }
  render koala koala-36m 42
  render llava llava-video 43
  render images llava-onevision 44
fi

# 1. What is there.
run $VIDSIEVE data check "$KOALA" --list "$OUT/unusable-koala.jsonl" --readers 16
run $VIDSIEVE data check "$LLAVA" --list "$OUT/unusable-llava.jsonl" --readers 16

# 2. Pseudo-videos: 2 to 4 images, 3 to 6 frames each. Then the real ones.
run $VIDSIEVE data pseudo "${ONEVISION[@]}" "$OUT/pseudo.jsonl" --count "$IMAGES" --seed 42 --preview "$OUT/pseudo.png"
run $VIDSIEVE data merge "$KOALA" "$LLAVA" "$OUT/real.jsonl" --only captions --count "$CAPTIONS" --seed 42

# 3. The teacher. It can be stopped and gone on with; nothing is paid twice.
PSEUDO=$OUT/pseudo.jsonl REAL=$OUT/real.jsonl
if [ -n "$TEACHER" ]; then
  for part in pseudo real; do
    run $VIDSIEVE data annotate "$OUT/$part.jsonl" "$OUT/$part-annotated.jsonl" --base-url "$TEACHER" --model "$TEACHER_MODEL" "${ASK[@]}"
  done
  PSEUDO=$OUT/pseudo-annotated.jsonl REAL=$OUT/real-annotated.jsonl
else
  echo "# no --teacher: captions stay as published"
fi

# 4. Training, both stages in one run.
each train score "$OUT/run" --data "$REAL" --pseudo "$PSEUDO" --model "$MODEL" "${TRAIN[@]}" $(going_on "$OUT/run")

# 5. Evaluation.
if [ -n "$TESTBED" ]; then
  run $VIDSIEVE eval testbed --methods "$OUT/run/policy,uniform" --retention 0.25,0.1 --questions 24 --threads 1 --out "$OUT/eval"
elif [ -n "$CHOSEN" ]; then
  benchmarks lvbench mlvu videomme
else
  run $WORKBENCH reproduce score:table1 --data "$DATA" --policy "qwen2.5-vl:score=$OUT/run/policy" --out "$OUT/table1" --bundle "$OUT/table1.json"
fi
