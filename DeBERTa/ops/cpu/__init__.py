"""Faster CPU implementations: fewer passes over memory, bfloat16 on AMX tiles.

Without a C++ compiler the same classes run on PyTorch's operations and draw the same dropout masks.
"""
