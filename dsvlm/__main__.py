"""Entry point: `dsvlm ...` and `python -m dsvlm ...` (the form that launchers start)."""

import os
import sys


def main() -> int:
    # A stop signal must find its handler even while torch is still being imported.
    words = [argument for argument in sys.argv[1:] if not argument.startswith("-")]  # launchers put options first
    training = words[:1] == ["train"]
    if training:
        from dsvlm.train.preempt import install_handlers

        install_handlers()
    from dsvlm.cli import run

    code = run(sys.argv[1:])
    if training:
        # All files are closed. What is left are threads of gloo and DeepSpeed, which now and then abort the
        # interpreter's own way out ("terminate called without an active exception") after a run that went well.
        sys.stdout.flush()
        sys.stderr.flush()
        os._exit(code)
    return code


if __name__ == "__main__":
    sys.exit(main())
