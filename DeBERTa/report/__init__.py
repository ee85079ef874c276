"""A page about a run or several, from what a run directory holds.

See `python -m DeBERTa.report --help`. Nothing here loads torch.
"""
