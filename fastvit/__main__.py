"""python -m fastvit"""

import sys

from fastvit.cli import main

sys.exit(main())
