#!/usr/bin/env bash
# Masked language modelling: ./mlm.sh NAME [flags of python -m DeBERTa.train; they override the preset]
set -euo pipefail
ROOT=$(cd "$(dirname "${BASH_SOURCE[0]}")" && pwd)
source "$ROOT/experiments/common.sh"

NAMES=(bert-tiny deberta-tiny bert-base deberta-base xlarge-v2 xxlarge-v2)
name=${1-}
shift || true
data=${DATA:-wikitext-103}
length=512
preset=(--num_training_steps 1000000 --dump_interval 10000 --learning_rate 1e-4)
case $name in
  bert-base) preset+=(--model_config bert_base.json --warmup 10000 --train_batch_size 256 --max_ngram 1) ;;
  deberta-base) preset+=(--model_config deberta_base.json --warmup 10000 --train_batch_size 256 --max_ngram 3) ;;
  xlarge-v2) preset+=(--model_config deberta_xlarge.json --warmup 1000 --train_batch_size 32 --max_ngram 3) ;;
  xxlarge-v2) preset+=(--model_config xxlarge.json --warmup 1000 --train_batch_size 32 --max_ngram 3) ;;
  deberta-tiny)
    data=${DATA:-sample}
    length=128
    preset=(--model_config deberta_tiny.json --num_training_steps 400 --dump_interval 200 --log_interval 20
      --warmup 40 --learning_rate 2e-3 --train_batch_size 48 --max_ngram 3)
    ;;
  bert-tiny)
    # Absolute positions are learned one by one: with 128 of them, a small BERT sees a bag of words for 1000s of steps.
    data=${DATA:-sample}
    length=32
    preset=(--model_config bert_tiny.json --num_training_steps 800 --dump_interval 400 --log_interval 20
      --warmup 60 --learning_rate 2e-3 --train_batch_size 128 --adam_beta2 0.98)
    ;;
  *) usage ./mlm.sh "${NAMES[@]}" ;;
esac
train "$name" MLM "$length" "$data" "${preset[@]}" -- "$@"
