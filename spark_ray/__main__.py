"""`python -m spark_ray`: the same as `spark-ray`."""

import sys

from .cli import main

sys.exit(main())
