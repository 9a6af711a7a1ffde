# make demo         set up, then take tiny-qwen from checkpoint to engine and check every step
# make test         set up, then run the tests
# make benchmarks   set up, then run every benchmark at a tiny size
# make lint         set up, then check style

PYTHON ?= python3
VENV   ?= .venv
OUT    ?= out/tiny-qwen

.PHONY: demo test benchmarks lint clean

demo: $(VENV)/installed
	$(VENV)/bin/python pipeline.py --model tiny-qwen --dtype float16 --out $(OUT)

test: $(VENV)/installed
	$(VENV)/bin/python -m pytest -n auto

benchmarks: $(VENV)/installed
	$(VENV)/bin/python -m pytest -m benchmarks -n auto

lint: $(VENV)/installed
	$(VENV)/bin/ruff check .
	$(VENV)/bin/ruff format --check .

$(VENV)/installed: requirements.txt requirements-dev.txt
	$(PYTHON) -m venv $(VENV)
	$(VENV)/bin/pip install --quiet --disable-pip-version-check -r requirements-dev.txt
	touch $@

clean:
	rm -rf out $(VENV)
