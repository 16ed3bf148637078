#!/usr/bin/env bash
# Everything in turn on one GPU, each stage in a process of its own with a limit, about 20 minutes in all by estimate:
#   bash benchmarks/gpu/all.sh OUT [doctor|data|engine|end|one|serving|http ...]
# Figures and logs go to OUT; what failed or took too long is named, and the rest still runs. RUN and MODEL may name a
# run and a model that are there already.
set -u
failed=0
out=$(realpath -m "${1:?where to}") && shift
run=${RUN:-$out/run} model=${MODEL:-$out/q7b} here=benchmarks/gpu
mkdir -p "$out"

stage() { # name, seconds, command
  local name=$1 limit=$2 began=$SECONDS code=0
  shift 2
  timeout -k 10 "$limit" "$@" > "$out/$name.log" 2>&1 || code=$?
  [ $code = 0 ] || failed=1
  echo "$name: $([ $code = 0 ] && echo ended || echo "FAILED with $code, see $out/$name.log") after $((SECONDS - began)) s"
}

data() {
  python $here/runs.py "$run" && python $here/random_model.py "$model" 7b
}

[ $# -gt 0 ] || set -- doctor data engine end one serving http
for name in "$@"; do
  case $name in
    doctor) stage doctor 100 gubs doctor ;;
    data) export -f data && export run model here && stage data 900 bash -c data ;;
    engine) stage engine 300 python $here/engine.py --json "$out/engine.jsonl" ;;
    end) stage end 400 python $here/end_to_end.py --run "$out/end" --json "$out/end.jsonl" ;;
    one) stage one 400 python $here/one_rank.py --run "$run" --model "$model" --ranks 4 --records 1 8 \
      --profile "$out/profile.txt" --json "$out/one.jsonl" ;;
    serving) stage serving 200 python $here/serving.py --run "$run" --model "$model" --json "$out/serving.jsonl" ;;
    http) stage filter 200 python $here/filter.py --run "$run" --model "$model" &&
      stage http 300 python benchmarks/serve.py --run "$run" --preset paper --gpus --rounds 1 --requests 24 \
        --seconds 8 --json "$out/http.json" ;;
    *) echo "no such stage: $name" && failed=1 ;;
  esac
done
shopt -s nullglob
figures=("$out"/*.jsonl)
[ ${#figures[@]} = 0 ] || python $here/table.py "${figures[@]}"
exit $failed
