"""The command `rto`, `python -m rto` and `accelerate launch -m rto`."""

import sys

if __name__ == "__main__" and not sys.flags.safe_path:
    del sys.path[0]  # the present folder, before anything is imported that might lie there

from rto.imports import close_present_folder


def main() -> int:
    """Run the command; its libraries are imported once the present folder is closed to them."""
    close_present_folder()
    from rto.cli import main as command

    return command()


if __name__ == "__main__":
    sys.exit(main())
