"""A process that computes its part of a model: `python -m openchameleon.serve.follower`.

`companions` starts it; its argument is the JSON of what `with_model` is given.
"""

from __future__ import annotations

import json
import os
import signal
import sys

from openchameleon.errors import UserError
from openchameleon.serve.companions import end_with_parent


def main() -> int:
    """0: it was let go; 1: something went wrong, and a sentence says what."""
    for number in (signal.SIGINT, signal.SIGTERM):  # the first process says when to end
        signal.signal(number, signal.SIG_IGN)
    end_with_parent()
    from openchameleon.serve.parallel import with_model

    try:
        return with_model(**json.loads(sys.argv[1]), work=lambda _: 0)
    except (UserError, RuntimeError, OSError) as error:
        sentence = " ".join(str(error).split())
        print(f"openchameleon: process {os.environ['RANK']}: {sentence}", file=sys.stderr)
        return 1


if __name__ == "__main__":
    sys.exit(main())
