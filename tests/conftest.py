"""What every test needs: no network, English, fp32 products, and `tiny` importable."""

import os
import sys
from pathlib import Path

os.environ["HF_HUB_OFFLINE"] = "1"  # before transformers is imported, which reads it once
os.environ["FASTPRUNE_LANG"] = "en"  # whatever the locale is
sys.path.insert(0, str(Path(__file__).parent))

import precise  # noqa: F401
