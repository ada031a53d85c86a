PYTHON ?= python3
BIN := .venv/bin
STAMP := .venv/.installed
OLDEST := .venv-oldest
MODEL := models/emoji-flux
GRIDS := 64-50 64-40 64-28 64-20 96-50 96-40 96-28 96-20
# A training that was of no use has said so, with 3; what was compared is made all the same.
OF_NO_USE := test $$? -eq 3
ON_VALIDATION := --validation-prompts $(MODEL)/prompts/validation.txt

TWO := $(BIN)/torchrun --nproc-per-node 2 -m lesa.cli

QWEN := models/emoji-qwen
VIDEO := models/emoji-video

.PHONY: setup demo bench bench-claims bench-grids bench-histories bench-qwen bench-video gpu-report grids runs \
	predictors predictor-many predictors-qwen predictors-video test test-oldest lint format clean

setup: $(STAMP)

$(STAMP): pyproject.toml constraints.txt
	test -x $(BIN)/pip || $(PYTHON) -m venv .venv
	$(BIN)/pip install --disable-pip-version-check -c constraints.txt -e '.[dev]'
	touch $@

# FLUX, then a Qwen-Image with guidance, then a HunyuanVideo.
demo: setup
	$(BIN)/lesa demo
	for model in $(QWEN) $(VIDEO); do \
		$(BIN)/lesa demo --model $$model --pairs 8 --timed 2 --schedules paper:7 --budgets "" --out out/demo/$${model#*/} || exit 1; \
	done

# Every method on the schedules of the paper and on the one planned for it, other projects' caches and better samplers
# among them, and all of them against 500 steps too. Two processes share the pictures; one of them times, alone. Scores
# that fetch weights of their own need the extra `scores` and a network; without them their columns say so.
bench: setup
	$(BIN)/pip install --disable-pip-version-check -c constraints.txt -e '.[peers]'
	$(TWO) bench $(MODEL) --pairs 100 --batch-size 25 --fine 500 --peers all \
		--scores MS-SSIM,LPIPS,CLIP,ImageReward

# What is claimed of our methods, on 200 pairs: planned schedules and the paper's; one predictor on many grids, and what
# histories hold, side by side; then, alone, how long planning, training and calibration take.
bench-claims: setup runs
	$(TWO) bench $(MODEL) --batch-size 25 --timed 0 --no-bound --out out/bench-claims
	$(BIN)/python benchmarks/claims.py out/bench-claims
	$(MAKE) --jobs 2 --output-sync=target bench-grids bench-histories
	rm -rf out/timed/trained out/timed/calibrated
	$(BIN)/lesa plan $(MODEL) --data out/runs --budgets 8 --forecaster lagrange:3
	$(BIN)/lesa train $(MODEL) --data out/runs --budgets 8 --forecaster lagrange:3 --rounds 3 $(ON_VALIDATION) \
		--validation 24 --out out/timed/trained || $(OF_NO_USE)
	$(BIN)/lesa calibrate $(MODEL) --prompts $(MODEL)/prompts/train.txt --out out/timed/calibrated || $(OF_NO_USE)

# What a history holds, and what storing less of it costs; unusual runs.
bench-histories: setup
	$(BIN)/python benchmarks/memory.py --pairs 200 --histories model int8 fp8 --predictors $(MODEL)/lesa/lesa-paper7 \
		$(MODEL)/lesa/lesa-paper10 $(MODEL)/lesa/lesa-planned6 $(MODEL)/lesa/lesa-planned6/at-output
	$(BIN)/python benchmarks/hybrid.py --predictor $(MODEL)/lesa/lesa-many

# One predictor on eight grids, beside a specialist for each, all trained alike. A grid is image size - steps.
bench-grids: setup grids
	for grid in $(GRIDS); do \
		train="$(BIN)/lesa train $(MODEL) --data out/grids/$$grid --method lesa-continuous --tap output --budgets 6 \
			--updates 0 200 --rounds 2 $(ON_VALIDATION) --validation 16"; \
		$$train --forecaster lagrange:3 --out out/specialists/first/$$grid || $(OF_NO_USE) || exit 1; \
		$$train --predictor out/specialists/first/$$grid --out out/specialists/$$grid || $(OF_NO_USE) || exit 1; \
	done
	$(BIN)/python benchmarks/grids.py --one $(MODEL)/lesa/lesa-many \
		--specialists $(foreach grid,$(GRIDS),out/specialists/$(grid))

grids: setup
	for grid in $(GRIDS); do \
		$(BIN)/lesa collect $(MODEL) --prompts $(MODEL)/prompts/train.txt --limit 32 --steps $${grid#*-} --tokens 41 \
			--call "{\"height\": $${grid%-*}, \"width\": $${grid%-*}}" --out out/grids/$$grid || exit 1; \
	done

# One predictor for 20 to 50 steps, two image sizes and 4 to 10 full steps: trained on schedules planned for Lagrange
# rows, then once more on schedules planned for itself.
predictor-many: setup grids
	train="$(BIN)/lesa train $(MODEL) --data $(foreach grid,$(GRIDS),out/grids/$(grid)) --method lesa-continuous \
		--tap output --budgets 10,8,6,5,4 --updates 0 3000 --rounds 1 --floor -50 $(ON_VALIDATION) --validation 16"; \
	{ $$train --forecaster lagrange:3 --out out/many || $(OF_NO_USE); } && \
	{ $$train --predictor out/many --out $(MODEL)/lesa/lesa-many || $(OF_NO_USE); } && rm -r $(MODEL)/lesa/lesa-many/ground-truth

# Runs of emoji-flux with every step full.
runs: setup
	$(BIN)/lesa collect $(MODEL) --prompts $(MODEL)/prompts/train.txt --limit 48 --out out/runs

# The predictors shipped with the model, and what the benchmark compares them with.
predictors: runs
	for n in 7 10; do \
		train="$(BIN)/lesa train $(MODEL) --data out/runs --schedule paper:$$n \
			$(ON_VALIDATION) --validation 24"; \
		$$train --method lesa --out $(MODEL)/lesa/lesa-paper$$n || $(OF_NO_USE) || exit 1; \
		$$train --method lesa --history all --out $(MODEL)/lesa/lesa-paper$$n/with-forecasts || $(OF_NO_USE) || exit 1; \
		$$train --method l2p --out $(MODEL)/lesa/l2p-paper$$n || $(OF_NO_USE) || exit 1; \
		$$train --method l2p --loss steps --out $(MODEL)/lesa/l2p-paper$$n/per-step || $(OF_NO_USE) || exit 1; \
	done
	for n in 10:2 8:2 6:3 5:3 4:3; do \
		$(BIN)/lesa train $(MODEL) --data out/runs --budgets $${n%:*} --forecaster lagrange:$${n#*:} --rounds 3 \
			$(ON_VALIDATION) --validation 24 \
			--out $(MODEL)/lesa/lesa-planned$${n%:*} || $(OF_NO_USE) || exit 1; \
	done
	$(BIN)/lesa train $(MODEL) --data out/runs --budgets 6 --forecaster lagrange:3 --rounds 3 --tap output \
		$(ON_VALIDATION) --validation 24 \
		--out $(MODEL)/lesa/lesa-planned6/at-output || $(OF_NO_USE)

# The predictors shipped with emoji-qwen, for the paper's schedules at three taps and for planned ones, both streams at once.
predictors-qwen: setup
	$(BIN)/lesa collect $(QWEN) --prompts $(QWEN)/prompts/train.txt --limit 48 --out out/runs-qwen
	$(BIN)/lesa collect $(QWEN) --prompts $(QWEN)/prompts/train.txt --limit 48 --tap norm --out out/runs-qwen-norm
	train="$(BIN)/lesa train $(QWEN) --validation-prompts $(QWEN)/prompts/validation.txt --validation 24 \
		--updates 200 200 --rounds 2 --data"; \
	for n in 7 10; do \
		out=$(QWEN)/lesa/lesa-paper$$n; \
		$$train out/runs-qwen --schedule paper:$$n --out $$out || $(OF_NO_USE) || exit 1; \
		$$train out/runs-qwen --schedule paper:$$n --tap output --out $$out/at-output || $(OF_NO_USE) || exit 1; \
		$$train out/runs-qwen-norm --schedule paper:$$n --tap norm --out $$out/at-norm || $(OF_NO_USE) || exit 1; \
		$$train out/runs-qwen --schedule paper:$$n --method l2p --out $(QWEN)/lesa/l2p-paper$$n || $(OF_NO_USE) || exit 1; \
	done; \
	for n in 10 8; do \
		$$train out/runs-qwen --budgets $$n --forecaster taylor:1 --out $(QWEN)/lesa/lesa-planned$$n || $(OF_NO_USE) || exit 1; \
	done

# Every method on emoji-qwen: on the paper's schedules, and on the schedule planned for it, at every tap of a predictor.
bench-qwen: setup
	$(TWO) bench $(QWEN) --no-bound --pairs 100 --batch-size 25 --timed 1 --budgets 10,8 --out out/bench-qwen

# Every method on clips, at the output and at the norm.
bench-video: setup
	$(BIN)/lesa bench $(VIDEO) --pairs 24 --timed 1 --batch-size 24 --schedules paper:7,paper:8,paper:10 --budgets 10,9,8 \
		--out out/bench-video

# The predictors shipped with emoji-video: at the output, the paper's place, and at the norm.
predictors-video: setup
	$(BIN)/lesa collect $(VIDEO) --prompts $(VIDEO)/prompts/train.txt --limit 32 --tap norm --out out/runs-video
	train="$(BIN)/lesa train $(VIDEO) --data out/runs-video --rounds 1 --updates 200 150 \
		--validation-prompts $(VIDEO)/prompts/validation.txt --validation 16"; \
	for n in 7 8 10; do \
		$$train --schedule paper:$$n --out $(VIDEO)/lesa/lesa-paper$$n || $(OF_NO_USE) || exit 1; \
		$$train --schedule paper:$$n --method l2p --out $(VIDEO)/lesa/l2p-paper$$n || $(OF_NO_USE) || exit 1; \
		$$train --schedule paper:$$n --tap norm --out $(VIDEO)/lesa/lesa-paper$$n/at-norm || $(OF_NO_USE) || exit 1; \
	done; \
	for n in 10 9 8; do \
		$$train --budgets $$n --out $(VIDEO)/lesa/lesa-planned$$n || $(OF_NO_USE) || exit 1; \
	done

# The real FLUX.1-dev, Qwen-Image and HunyuanVideo with random weights on one GPU, in less than nine minutes; small ones
# on the CPU with TINY=--tiny.
gpu-report: setup
	$(BIN)/python benchmarks/gpu.py $(TINY)

test: setup
	$(BIN)/python -m pytest

# With the oldest versions that pyproject.toml declares, in an environment of their own.
test-oldest: $(OLDEST)/.installed
	$(OLDEST)/bin/python -m pytest

$(OLDEST)/.installed: pyproject.toml constraints-oldest.txt
	test -x $(OLDEST)/bin/pip || $(PYTHON) -m venv $(OLDEST)
	$(OLDEST)/bin/pip install --disable-pip-version-check -c constraints-oldest.txt -e '.[bench,models]' \
		hypothesis pytest scipy
	touch $@

lint: setup
	$(BIN)/ruff check
	$(BIN)/ruff format --check
	$(BIN)/pyright

format: setup
	$(BIN)/ruff check --fix
	$(BIN)/ruff format

# What was measured, recorded and trained into out/ stays.
clean:
	rm -rf .venv $(OLDEST) dist .hypothesis .pytest_cache .ruff_cache
	find benchmarks models src tests -name __pycache__ -prune -exec rm -rf {} +
