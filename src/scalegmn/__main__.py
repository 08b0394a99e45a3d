"""`python -m scalegmn` is the command `scalegmn`, for launchers such as `torchrun -m scalegmn train ...`."""

from scalegmn.cli import main

if __name__ == "__main__":
    main()
