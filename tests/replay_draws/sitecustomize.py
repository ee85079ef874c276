"""Imported by Python at its start where this directory is on PYTHONPATH: draws of tests/draws.py in a run."""

import os
import sys
from pathlib import Path

if "DeBERTa.train" in sys.orig_argv:
    from tests.draws import patch_generator, read_draws

    given = os.environ.get("DRAWS_GIVEN")
    patch_generator(Path(os.environ["DRAWS_RECORD"]), read_draws(Path(given)) if given else None)
