# make demo   check rules, train two small models on real text, compare them, write from one
# make test   the fast suite; make test-slow the rest; make test-brian with Brian2, test-transformers with an older
#             transformers, test-fla with flash-linear-attention's kernels; make sanitize the kernels under sanitizers;
#             make wheel a wheel, tried
PYTHON ?= python3
BIN := .venv/bin
STAMP := .venv/.installed

.PHONY: demo test test-slow test-brian test-transformers test-fla wheel sanitize lint types format clean

PIP := PIP_CONSTRAINT=constraints.txt $(BIN)/python -m pip install --quiet --disable-pip-version-check
KERNELS := CMakeLists.txt $(wildcard fastweights/engine/csrc/*)

# what is compiled (only for this machine) is installed beside the other packages of .venv
$(STAMP): pyproject.toml constraints.txt $(KERNELS)
	test -x $(BIN)/python || $(PYTHON) -m venv .venv
	$(PIP) torch
	$(PIP) --config-settings=cmake.define.FASTWEIGHTS_ISAS=native --editable '.[dev]'
	$(PIP) --no-deps fla-core einops mlstm_kernels  # references to compare with, read by the path of their files
	touch $(STAMP)

demo: $(STAMP)
	$(BIN)/python examples/demo.py

test: $(STAMP)
	$(BIN)/python -m pytest -n 2 -m 'not slow'

test-slow: $(STAMP)
	$(BIN)/python -m pytest -n 2 -m slow

# exported synapses beside Brian2, which needs an older numpy than the constraints have
test-brian: $(STAMP)
	$(BIN)/python -m pip install --quiet --disable-pip-version-check --upgrade --target build/brian 'brian2>=2.9' 'numpy<2.4'
	PYTHONPATH=build/brian $(BIN)/python -m pytest tests/neuro/test_synapses.py -k brian

# models of transformers as they were before 5.15
test-transformers: $(STAMP)
	$(BIN)/python -m pip install --quiet --disable-pip-version-check --upgrade --target build/transformers 'transformers==5.14.*' 'numpy<2.4'
	PYTHONPATH=build/transformers $(BIN)/python -m pytest -n 2 tests/hf

# the GPU kernels of flash-linear-attention, run by Triton's interpreter
test-fla: $(STAMP)
	$(BIN)/python -m pip install --quiet --disable-pip-version-check --upgrade --no-deps --target build/fla 'triton==3.9.*'
	TRITON_INTERPRET=1 PYTHONPATH=build/fla $(BIN)/python -m pytest -n 2 tests/compat/test_fla_kernels.py

# a wheel for all instruction sets of this processor family, tried in an environment of its own
wheel: $(STAMP)
	rm -rf dist build/wheel && mkdir -p build/wheel
	$(PIP:install=wheel) --no-deps --wheel-dir dist .
	$(BIN)/python -m venv build/wheel/venv
	PIP_CONSTRAINT=constraints.txt build/wheel/venv/bin/python -m pip install --quiet --disable-pip-version-check torch dist/*.whl
	cd build/wheel && venv/bin/python ../../.ci/wheel.py

# the kernels under the address and undefined-behaviour sanitizers: their tests, several times slower
sanitize: $(STAMP)
	cmake -S . -B build/sanitize -DCMAKE_BUILD_TYPE=RelWithDebInfo -DFASTWEIGHTS_ISAS=native -DFASTWEIGHTS_SANITIZE=ON
	cmake --build build/sanitize --parallel 2
	FASTWEIGHTS_KERNELS=build/sanitize ASAN_OPTIONS=detect_leaks=0 LD_PRELOAD="$$(cc -print-file-name=libasan.so) $$(cc -print-file-name=libubsan.so)" \
		$(BIN)/python -m pytest -p no:cacheprovider tests/engine/test_kernels.py tests/engine/test_prepared.py tests/engine/test_long_tensors.py \
		tests/engine/test_convolution.py tests/engine/test_gated_norm.py -m 'not slow'

lint: $(STAMP)
	$(BIN)/ruff check .
	$(BIN)/ruff format --check .

types: $(STAMP)
	$(BIN)/pyright --pythonpath $(BIN)/python

format: $(STAMP)
	$(BIN)/ruff check --fix .
	$(BIN)/ruff format .

clean:
	rm -rf .venv runs build dist
