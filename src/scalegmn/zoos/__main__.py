"""`python -m scalegmn.zoos --conf configs/zoos/digits_inr.yml`: fit a zoo of INRs."""

from __future__ import annotations

from scalegmn.cli import parse
from scalegmn.log import user_errors
from scalegmn.zoos.recipes import InrRecipe, make_zoo


def main() -> None:
    """Reads a recipe and makes its zoo."""
    with user_errors():
        make_zoo(parse(InrRecipe, prog="python -m scalegmn.zoos"))


if __name__ == "__main__":
    main()
