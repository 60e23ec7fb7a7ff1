"""How hanorec is built. The loops stand in scripts beside the package, where readers look; an
installed package has copies of them in hanorec/scripts."""

import shutil
from pathlib import Path

from setuptools import find_packages, setup
from setuptools.command.build_py import build_py

ROOT = Path(__file__).parent
SCRIPTS = ["train_sft.py", "train_dpo.py", "train_brmrs.py", "evaluate.py"]


class BuildWithScripts(build_py):
    """The build of the package, with the scripts in it. An editable install finds them here."""

    def run(self) -> None:
        super().run()
        if self.editable_mode:
            return
        folder = Path(self.build_lib, "hanorec", "scripts")
        folder.mkdir(exist_ok=True)
        (folder / "__init__.py").touch()
        for name in SCRIPTS:
            shutil.copyfile(ROOT / name, folder / name)


setup(
    name="hanorec",
    version="0.1.0",
    description="HaNoRec, a multimodal recommendation method, from scratch in PyTorch",
    long_description=(ROOT / "README.md").read_text(encoding="utf-8"),
    long_description_content_type="text/markdown",
    license="Apache-2.0",
    packages=find_packages(include=["hanorec", "hanorec.*"]),
    package_data={"hanorec": ["assets/posterland-base/*"]},
    cmdclass={"build_py": BuildWithScripts},
    entry_points={"console_scripts": ["hanorec = hanorec.__main__:hanorec"]},
    python_requires=">=3.11",
    install_requires=[
        "torch>=2.8",
        "transformers>=5.6",
        "safetensors>=0.4",
        "pillow>=10",
        "numpy>=1.26",
        "tqdm>=4.60",
    ],
    extras_require={
        "test": [
            "pytest>=8",
            "pytest-xdist>=3",  # the suite in two processes: pytest -n 2
            "hypothesis>=6",
            "ruff>=0.6",
            "matplotlib>=3.8",
            "setuptools>=70.1",  # a test builds the wheel
        ],
        "plots": ["matplotlib>=3.8"],
        "bench": [
            "matplotlib>=3.8",
            # Transformers reads GGUF through these two.
            "gguf>=0.10",
            "accelerate>=1.0",
            # Peers that the benchmarks compare with.
            "faiss-cpu>=1.8",
            "trl>=0.20",
            "peft>=0.15",
        ],
    },
)
