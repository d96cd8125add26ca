"""Entry point: `dsvlm ...` and `python -m dsvlm ...` (the form that launchers start)."""

import sys


def main() -> int:
    # A stop signal must find its handler even while torch is still being imported.
    words = [argument for argument in sys.argv[1:] if not argument.startswith("-")]  # launchers put options first
    if words[:1] == ["train"]:
        from dsvlm.train.preempt import install_handlers

        install_handlers()
    from dsvlm.cli import run

    return run(sys.argv[1:])


if __name__ == "__main__":
    sys.exit(main())
