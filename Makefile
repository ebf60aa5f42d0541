# Every target sets up by itself what it needs in .venv, and does nothing twice.
.PHONY: demo serve test check bench soak format clean
BIN := .venv/bin

demo:    ## a conversation in text and pictures with the embedded model -> demo/index.html
	@tools/setup.sh core
	@$(BIN)/openchameleon demo --out demo

serve:   ## the page and the API, with the embedded model -> http://127.0.0.1:8000
	@tools/setup.sh serve
	@$(BIN)/openchameleon serve

test:    ## the whole suite, but for what is marked slow
	@tools/setup.sh dev
	@$(BIN)/python -m pytest -m "not slow"

check:   ## format, lint, types, direction of imports
	@tools/setup.sh dev
	@$(BIN)/ruff format --check .
	@$(BIN)/ruff check .
	@$(BIN)/mypy
	@$(BIN)/python tools/check_imports.py

bench:   ## speed: one JSON line a measurement
	@tools/setup.sh dev
	@for script in $(filter-out bench/common.py,$(wildcard bench/*.py)); do \
	  $(BIN)/python $$script --out bench/results.jsonl || exit 1; \
	done

soak:    ## the long loops that `make test` leaves out
	@tools/setup.sh dev
	@$(BIN)/python -m pytest -m slow --timeout 3600

format:  ## rewrites the code as `make check` wants it
	@tools/setup.sh dev
	@$(BIN)/ruff format .
	@$(BIN)/ruff check --fix .

clean:   ## removes .venv, caches and the demo's output
	rm -rf .venv demo dist .pytest_cache .mypy_cache .ruff_cache .hypothesis
	find . -name __pycache__ -type d -prune -exec rm -rf {} +
