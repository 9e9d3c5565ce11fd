"""Exit with 0 if the run that these flags of main.py describe is complete, with 1 if it has to be run."""

import contextlib
import io
import sys
from pathlib import Path

sys.path.insert(0, str(Path(__file__).resolve().parent.parent))

import main
from lib import UserError, results


def is_complete(argv: list[str]) -> bool:
    """Return whether the run file of the command line ``argv`` is there, says complete, and was made by these flags."""
    try:
        with contextlib.redirect_stderr(io.StringIO()):  # what is wrong with them main.py itself will say
            args = main.make_parser().parse_args(argv)
            run = main.check_args(args).run
    except (UserError, SystemExit):
        return False
    return results.is_complete(results.read_run(Path(args.save), run), main.flags_of(args))


if __name__ == "__main__":
    sys.exit(not is_complete(sys.argv[1:]))
