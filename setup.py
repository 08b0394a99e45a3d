"""Puts the folder configs into the package when a wheel is built; everything else is in pyproject.toml."""

import shutil
from pathlib import Path

from setuptools import setup
from setuptools.command.build_py import build_py


class BuildWithConfigs(build_py):
    """`build_py` that also copies `configs` to `scalegmn/configs`; an editable install reads them where they are."""

    def run(self) -> None:
        """Copies modules, then configurations."""
        super().run()
        if not self.editable_mode:
            target = Path(self.build_lib, "scalegmn", "configs")
            shutil.rmtree(target, ignore_errors=True)
            shutil.copytree(Path(__file__).parent / "configs", target)


setup(cmdclass={"build_py": BuildWithConfigs})
