# make demo         set up, then take tiny-qwen from checkpoint to engine and check every step
# make test         set up, then run the tests
# make check        set up, then the first case of each test that reads stored graphs (tests/marks.py says which)
# make slow         set up, then the tests that `make test` leaves out, but for the whole of `make abuse`
# make abuse        set up, then every case of hostile and faulty input; abuse-coverage counts them, fuzz draws some for MINUTES
# make benchmarks   set up, then run every benchmark at a tiny size
# make servers      set up, then start Triton and Ray Serve on loopback with Suture behind them (hundreds of megabytes each)
# make package      set up, then build sdist and wheel, and use the installed wheel from another folder
# make lint         set up, then check style and types
# make docs         set up, then build the documentation's site; a warning is an error

PYTHON ?= python3
VENV   ?= .venv
OUT    ?= out/tiny-qwen
MINUTES ?= 5

# What the tests and their many processes import is compiled once.
export PYTHONDONTWRITEBYTECODE =

# A worker for each core, which takes files next to one another: what a file's tests share is made once.
WORKERS = -n auto --dist worksteal
test check slow benchmarks: export OMP_NUM_THREADS = 1

.PHONY: demo test check slow abuse abuse-coverage fuzz benchmarks servers package lint docs clean

demo: $(VENV)/installed
	$(VENV)/bin/python pipeline.py --model tiny-qwen --dtype float16 --out $(OUT)

test: $(VENV)/installed
	$(VENV)/bin/python -m pytest $(WORKERS)

check: $(VENV)/installed
	$(VENV)/bin/python -m pytest $(WORKERS) -m "not exports and not further and not seconds and not slow and not benchmarks and not every"

slow: $(VENV)/installed
	$(VENV)/bin/python -m pytest $(WORKERS) -m slow --ignore tests/test_abuse.py

benchmarks: $(VENV)/installed
	$(VENV)/bin/python -m pytest -m benchmarks $(WORKERS)

abuse: $(VENV)/installed
	$(VENV)/bin/python -m pytest -m "slow or not slow" tests/test_abuse.py

fuzz: $(VENV)/installed
	$(VENV)/bin/python -m tests.abuse.fuzz --minutes $(MINUTES)

abuse-coverage: $(VENV)/installed
	$(VENV)/bin/python -m tests.abuse.coverage

servers: $(VENV)/installed
	$(VENV)/bin/python -m tests.servers

package: $(VENV)/installed
	PYTHON=$(abspath $(VENV))/bin/python bash .ci/package

lint: $(VENV)/installed
	$(VENV)/bin/ruff check .
	$(VENV)/bin/ruff format --check .
	bash .ci/types $(VENV)/bin/python

docs: $(VENV)/installed
	NO_MKDOCS_2_WARNING=1 PYTHONPATH=. $(VENV)/bin/mkdocs build --strict --quiet

$(VENV)/installed: requirements.txt requirements-dev.txt requirements-serve.txt
	$(PYTHON) -m venv $(VENV)
	$(VENV)/bin/pip install --quiet --disable-pip-version-check -r requirements.txt -r requirements-dev.txt -r requirements-serve.txt
	touch $@

clean:
	rm -rf out $(VENV) .setuptools dist *.egg-info
