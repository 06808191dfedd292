"""`python -m tpu_tune` is `tpu-tune`."""

import sys

from tpu_tune.cli import main

sys.exit(main())
