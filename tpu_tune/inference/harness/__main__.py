"""`python -m tpu_tune.inference.harness`: lm-evaluation-harness's command line, which here knows `--model tpu_tune`."""

from __future__ import annotations

import sys

from tpu_tune.errors import UserError

if __name__ == "__main__":
    try:
        from lm_eval.__main__ import cli_evaluate

        import tpu_tune.inference.harness  # noqa: F401 - registers the model class

        cli_evaluate()
    except UserError as error:
        print(f"tpu_tune: {' '.join(str(error).split())}", file=sys.stderr)
        sys.exit(1)
