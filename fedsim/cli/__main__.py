"""python -m fedsim.cli"""

import sys

from fedsim.cli import main
from fedsim.core.home import ROOT

if __name__ == "__main__":
    sys.path[0] = ROOT  # the user's folder may hold a clients.py
    sys.exit(main())
