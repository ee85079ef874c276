#!/usr/bin/env python3
"""Prepare text for pre-training: see `--help`, and DeBERTa/prepare_data.py."""

from DeBERTa.packages import require_packages

if __name__ == "__main__":
    require_packages()
    from DeBERTa.prepare_data import run_command

    run_command()
