"""docs/architectures.md lists what can be read, as the registries of operators have it."""

import re
from pathlib import Path

from scalegmn.interop.onnx.operators import ONNX_OPERATORS
from scalegmn.interop.torch_modules.operators import OPERATORS

PAGE = (Path(__file__).parents[2] / "docs" / "architectures.md").read_text()


def test_every_family_of_operators_is_listed():
    table = PAGE.split("| family | operations |")[1].split("\n\n")[0]
    rows = dict(re.findall(r"^\| ([^|`]+) \| (.*) \|$", table, re.MULTILINE))
    listed = {name: family for family, names in rows.items() for name in re.findall(r"`(\w+)`", names)}
    assert listed == {name: item.family for name, item in OPERATORS.items()}


def test_every_onnx_operator_is_listed():
    names = re.search(r"^Operators: (.*)\.$", PAGE, re.MULTILINE)
    assert {*re.findall(r"`(\w+)`", names[1])} == {*ONNX_OPERATORS, "Shape", "Size"}
