"""Entry point: `dsvlm ...` and `python -m dsvlm ...` (the form that launchers start)."""

import sys


def main() -> int:
    # A stop signal must find its handler even while torch is still being imported.
    if len(sys.argv) > 1 and sys.argv[1] == "train":
        from dsvlm.train.preempt import install_handlers

        install_handlers()
    from dsvlm.cli import run

    return run(sys.argv[1:])


if __name__ == "__main__":
    sys.exit(main())
