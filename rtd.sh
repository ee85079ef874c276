#!/usr/bin/env bash
# Replaced token detection: ./rtd.sh NAME [flags of python -m DeBERTa.train; they override the preset]
set -euo pipefail
ROOT=$(cd "$(dirname "${BASH_SOURCE[0]}")" && pwd)
source "$ROOT/experiments/common.sh"

NAMES=(deberta-v3-tiny deberta-v3-{xsmall,small,base,large}{,-continue})
name=${1-}
shift || true
data=${DATA:-wikitext-103}
length=512
preset=(--num_training_steps 1000000 --dump_interval 10000 --warmup 10000 --learning_rate 1e-4 --train_batch_size 256)
size=${name#deberta-v3-}
case $name in
  deberta-v3-xsmall) preset+=(--model_config rtd_xsmall.json --learning_rate 3e-4 --train_batch_size 64) ;;
  deberta-v3-small | deberta-v3-base | deberta-v3-large) preset+=(--model_config "rtd_$size.json") ;;
  deberta-v3-xsmall-continue | deberta-v3-small-continue | deberta-v3-base-continue | deberta-v3-large-continue)
    size=${size%-continue}
    # The public xsmall checkpoint is wider (384) than the model trained from scratch (256).
    [[ $size != xsmall ]] || size=xsmall_continue
    preset+=(--model_config "rtd_$size.json" --num_training_steps 100000 --learning_rate 5e-5)
    if [[ -z $(flag_value init_generator "" "$@") || -z $(flag_value init_discriminator "" "$@") ]]; then
      say "$name goes on from published weights: fetch pytorch_model.generator.bin and pytorch_model.bin of"
      say "microsoft/${name%-continue} and pass them as --init_generator FILE --init_discriminator FILE"
      exit 2
    fi
    ;;
  deberta-v3-tiny)
    data=${DATA:-sample}
    length=128
    preset=(--model_config rtd_tiny.json --num_training_steps 400 --dump_interval 200 --log_interval 20
      --warmup 40 --learning_rate 2e-3 --train_batch_size 48)
    ;;
  *) usage ./rtd.sh "${NAMES[@]}" ;;
esac
train "$name" RTD "$length" "$data" "${preset[@]}" -- "$@"
