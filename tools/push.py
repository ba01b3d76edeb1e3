"""The same as `resnext-det push`; works in a checkout that is not installed."""

import sys
from pathlib import Path

sys.path.insert(0, str(Path(__file__).resolve().parent.parent))
from resnext_det_cli import run_tool

if __name__ == "__main__":
    run_tool("push")
