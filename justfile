# What a change must pass before anybody looks at it.
check:
    ruff check .
    ruff format --check .
    mypy
    pytest tests/test_house.py

# The tests of the paths given, or the suite.
test *paths:
    pytest {{paths}}

# Mend the format, what lint can mend, and the generated pages.
fix:
    ruff check --fix .
    ruff format .
    python docs/generate.py

# The example, from its checkpoint to a verified bundle.
example:
    pipeline run pipeline.yaml

# Everything, on a fresh virtual environment, as continuous integration does.
ci:
    .ci/run
