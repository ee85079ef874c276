#!/usr/bin/env python3
"""Prepare text for pre-training: see `python prepare_data.py --help`, and DeBERTa/prepare_data.py."""

import sys

from DeBERTa.prepare_data import main

if __name__ == "__main__":
    sys.exit(main())
