from pathlib import Path

from setuptools import find_packages, setup

setup(
    name="hanorec",
    version="0.1.0",
    description="HaNoRec, a multimodal recommendation method, from scratch in PyTorch",
    long_description=Path(__file__).with_name("README.md").read_text(encoding="utf-8"),
    long_description_content_type="text/markdown",
    license="Apache-2.0",
    packages=find_packages(include=["hanorec", "hanorec.*"]),
    package_data={"hanorec": ["assets/posterland-base/*"]},
    python_requires=">=3.11",
    install_requires=["torch>=2.8", "transformers>=5.6", "safetensors>=0.4", "pillow>=10", "numpy>=1.26", "tqdm>=4.60"],
    extras_require={
        "test": ["pytest>=8", "hypothesis>=6", "ruff>=0.6", "matplotlib>=3.8"],
        "plots": ["matplotlib>=3.8"],
        # transformers reads GGUF through gguf and accelerate; the other three are peers that the benchmarks compare with
        "bench": ["matplotlib>=3.8", "gguf>=0.10", "accelerate>=1.0", "faiss-cpu>=1.8", "trl>=0.20", "peft>=0.15"],
    },
)
