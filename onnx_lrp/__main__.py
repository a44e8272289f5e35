"""``python -m onnx_lrp`` is the command ``onnx-lrp``."""

import sys

from onnx_lrp.cli import main

if __name__ == "__main__":
    sys.exit(main())
