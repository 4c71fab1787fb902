"""python -m fedsim.cli"""

import os
import sys

import fedsim
from fedsim.cli import main

if __name__ == "__main__":
    sys.path[0] = os.path.dirname(os.path.dirname(os.path.abspath(fedsim.__file__)))  # the user's folder may hold a clients.py
    sys.exit(main())
