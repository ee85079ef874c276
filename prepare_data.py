#!/usr/bin/env python3
"""Prepare text for pre-training: see `python prepare_data.py --help`, and DeBERTa/prepare_data.py."""

from DeBERTa.prepare_data import run_command

if __name__ == "__main__":
    run_command()
