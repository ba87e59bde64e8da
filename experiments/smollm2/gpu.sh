#!/bin/sh
# The comparison of sums.yaml on one GPU: supervised training, tuning, five seeds. No GPU has run it yet.
#
#     make runs/smollm2 && PYTHONPATH=. .venv/bin/python experiments/smollm2/tables.py runs/sums    # on any machine
#     JOBS=6 sh experiments/smollm2/gpu.sh tune && JOBS=6 sh experiments/smollm2/gpu.sh compare     # on the GPU
set -e
PYTHON=${PYTHON:-python}
export PYTHONPATH="${PWD}/src"
RECIPE=experiments/smollm2/sums.yaml
GPU="--model.device cuda"
if [ "$1" = tune ]; then
	[ -e runs/smollm2-sums/config.json ] || "$PYTHON" -m vineppo sft experiments/smollm2/sft-sums.yaml $GPU
	"$PYTHON" -m vineppo tune $RECIPE --algorithms counterfactual,vineppo,reinforce,grpo,ppo --grid learner.lr=1e-5,2e-5,4e-5,8e-5 \
		$GPU --eval.num_problems 256 --budget tokens="${BUDGET:-60000}" --rungs 2 --eta 2 --target 0.99 \
		--seeds 100-100 --jobs "${JOBS:-4}" --out runs/tune-sums
elif [ "$1" = compare ]; then
	"$PYTHON" -m vineppo compare $RECIPE --arms runs/tune-sums/arms.yaml --baselines reinforce,grpo,ppo --seeds 0-4 \
		--budget tokens="${BUDGET:-120000}" --jobs "${JOBS:-4}" --eval.split test --run.save_rollouts false $GPU --out runs/compare-sums
else
	echo "usage: gpu.sh tune, and then gpu.sh compare" >&2
	exit 2
fi
