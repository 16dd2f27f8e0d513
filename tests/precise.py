"""Imported where a test process starts: it hides what the processor multiplies fast.

So products of fp32 weights stay in fp32, and tests compare the same figures on every machine. Tests
that are about the processor's features set them.
"""

import torch

torch.cpu.get_capabilities = dict
