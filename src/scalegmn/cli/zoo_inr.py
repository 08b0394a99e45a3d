"""`python -m scalegmn.zoos --conf configs/zoos/digits_inr.yml`: fit a zoo of INRs."""

from __future__ import annotations

from scalegmn.configuration.parsing import parse
from scalegmn.reporting.errors import user_errors
from scalegmn.zoos.fit.inr_zoo import InrRecipe, make_zoo


def main() -> None:
    """Reads a recipe and makes its zoo."""
    with user_errors():
        make_zoo(parse(InrRecipe, prog="python -m scalegmn.zoos"))


if __name__ == "__main__":
    main()
